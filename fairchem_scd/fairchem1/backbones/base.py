"""What the adapters of fairchem 1.10's backbones have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, ClassVar

from torch import nn

from fairchem_scd.denoising.adapter import Adapter
from fairchem_scd.errors import ConfigError


class Fairchem1Adapter(Adapter):
    """The answers that most of the host's backbones share, by the arguments and attributes that they have in common.

    Class attributes:
        vectors_need_forces: `vector_head` works only in a backbone that was built with `regress_forces: true`.
        runs_lone_structures: the backbone runs a batch in which a structure has no edge, as long as another has one.
        elements_key: the argument that sets the size of the backbone's table of elements; None: there is none.
        scalar_heads: the last layer of each class of the host's scalar heads.
        legacy_outputs: output layers of the legacy model that the host's backbone still builds, and its heads take out.
    """

    vectors_need_forces: ClassVar[bool] = True
    runs_lone_structures: ClassVar[bool] = True
    elements_key: ClassVar[str | None] = "max_num_elements"
    scalar_heads: ClassVar[Mapping[type[nn.Module], str]] = {}
    legacy_outputs: ClassVar[Sequence[str]] = ()

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        """Check the backbone's arguments, before the model is built.

        Args:
            config: the arguments, and `otf_graph` of the model.

        Raises:
            ConfigError: with these arguments the backbone cannot be trained with denoising.
        """
        if cls.vectors_need_forces and config.get("regress_forces", True) is False:
            raise ConfigError("model.backbone.regress_forces is false: denoising predicts vectors; set it to true")
        if config.get("otf_graph", True) is False:
            raise ConfigError(
                "model.otf_graph is false: a corrupted structure needs a graph of its own, "
                "not the data's; set otf_graph to true"
            )
        if config.get("use_pbc", True) is False and find_spec("torch_cluster") is None:
            raise ConfigError(
                "model.backbone.use_pbc is false: graphs without periodic boundaries need torch_cluster, which is not "
                "installed; set it to true and give the data a large cell or pbc: False (docs/molecules.md)"
            )

    @classmethod
    def check_heads(cls, config: Mapping[str, Any], heads: Mapping[str, Mapping[str, Any]]) -> None:
        """Check the heads of a model, before it is built.

        Args:
            config: the backbone's arguments.
            heads: the `model.heads` block.

        Raises:
            ConfigError: with these heads some parameters of the backbone would have no gradient.
        """
        return

    def drop_legacy_outputs(self) -> None:
        """Take the legacy model's output layers out of the backbone.

        In a model without the heads that take them out, their parameters would never have a gradient.
        """
        for name in self.legacy_outputs:
            if hasattr(self.backbone, name):
                setattr(self.backbone, name, None)

    @property
    def max_num_elements(self) -> int | None:
        """One more than the highest atomic number that the backbone knows; None: not known."""
        return getattr(self.backbone, "max_num_elements", None)

    @property
    def conservative(self) -> bool:
        return self.backbone.regress_forces and not getattr(self.backbone, "direct_forces", True)

    def scalar_layers(self, head: nn.Module) -> Sequence[nn.Module]:
        return [head.get_submodule(name) for kind, name in self.scalar_heads.items() if isinstance(head, kind)]

    @contextmanager
    def skip_energy_readout(self) -> Iterator[None]:
        # The host's backbones prepare for derivatives with respect to positions and strain by these two attributes.
        names = [name for name in ("regress_forces", "regress_stress") if getattr(self.backbone, name, False)]
        names = names if self.conservative else []
        for name in names:
            setattr(self.backbone, name, False)
        try:
            yield
        finally:
            for name in names:
                setattr(self.backbone, name, True)

    def set_drop_path(self, rate: float) -> None:
        """Set the drop-path rate of every block.

        Raises:
            ConfigError: the backbone has no drop path.
        """
        raise ConfigError(f"task.denoising.drop_path: {self.names[0]} has no drop path; leave it out")

    def set_drop_path_per(self, per: str) -> bool:
        """Let the drop path of every block draw for whole structures or for each atom, at the rate that it has.

        Args:
            per: "structure" or "atom".

        Returns:
            Whether any block has a drop path.
        """
        return False
