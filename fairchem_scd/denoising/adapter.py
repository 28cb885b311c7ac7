"""The shape of a backbone adapter, and the registry of them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any, ClassVar

from torch import Tensor, nn

from fairchem_scd.denoising.conditions import BoundModulation
from fairchem_scd.errors import ConfigError


class Adapter(ABC):
    """What the package must know of one host backbone class.

    Class attributes:
        host_class: the backbone class, matched exactly: a subclass may compute something else.
        names: the names the host registers it under.
        one_piece: legacy models of backbone and heads in one, by name, that this backbone is the hydra twin of,
            each with the twin's heads.
        moved: modules of those models that lie in one of the twin's heads, and in which.
        dropped: arguments of those models that the twin has no use for, with the only value that loses nothing.
        vectors_need_forces: `vector_head` works only in a backbone that was built with regress_forces.
        lone_structures: the backbone runs batches in which a structure has no edge, though another has.
        elements_key: the argument that sizes its table of elements; None: it cannot be changed.
    """

    host_class: ClassVar[type[nn.Module]]
    names: ClassVar[tuple[str, ...]]
    legacy_heads: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {}
    moved: ClassVar[Mapping[str, str]] = {"energy_block": "energy", "force_block": "forces"}
    dropped: ClassVar[Mapping[str, Any]] = {}
    vectors_need_forces: ClassVar[bool] = True
    runs_lone_structures: ClassVar[bool] = True
    elements_key: ClassVar[str | None] = "max_num_elements"

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        """Raise ConfigError where the backbone's arguments rule out denoising. Called before the model is built."""
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
        """Raise ConfigError where heads leave parts of a backbone with those arguments without a gradient."""
        return

    @classmethod
    def hydra_heads(cls, name: str, arguments: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The heads of the hydra twin of the one-piece model `name` with those arguments."""
        return copy.deepcopy(dict(cls.legacy_heads[name]))

    @abstractmethod
    def vector_head(self) -> nn.Module:
        """Another instance of the backbone's own direct force head: (data, embedding) → {name: [N, 3]}.

        Where it has none, an EdgeVectorHead.
        """

    @property
    def encoding_spec(self) -> dict[str, Any]:
        """`lmax_list`, `channels` and `bound` for a ForceEncoding of this backbone.

        Raises:
            ConfigError: its atoms have no features that turn with the structure.
        """
        raise self.cannot_condition_on_forces()

    @classmethod
    def cannot_condition_on_forces(cls) -> ConfigError | None:
        """The reason; None if it can."""
        if cls.encoding_spec is not Adapter.encoding_spec:
            return None
        return ConfigError(
            f"task.denoising: {cls.names[0]} has no vector features that forces could be told by, as dens does and "
            "scd with condition: [forces]; scd with its default condition and noisy_nodes work there"
        )

    @property
    def max_num_elements(self) -> int | None:
        """One more than the highest atomic number that the backbone knows; None: not known."""
        return getattr(self.backbone, "max_num_elements", None)

    @property
    def conservative(self) -> bool:
        """Whether forces are the energy's gradient. By the host's rule, for backbones that have the choice."""
        return self.backbone.regress_forces and not getattr(self.backbone, "direct_forces", True)

    def readout(self) -> Iterable[nn.Module]:
        """Parts of the backbone that the host's heads alone read: neither vector head nor `scalars`."""
        return ()

    @contextmanager
    def skip_energy_readout(self) -> Iterator[None]:
        """While entered, a conservative backbone does not prepare for derivatives by positions."""
        backbone = self.backbone
        switches = [name for name in ("regress_forces", "regress_stress") if getattr(backbone, name, False)]
        switches = switches if self.conservative else []
        for name in switches:
            setattr(backbone, name, False)
        try:
            yield
        finally:
            for name in switches:
                setattr(backbone, name, True)

    @property
    def scalar_channels(self) -> int:
        """Number C of l = 0 features of an atom, all resolutions together."""
        raise self._cannot("embed")

    @property
    def num_modulated(self) -> int:
        """Number of blocks that a condition can modulate."""
        raise self._cannot("modulate")

    def scalars(self, embedding: Any) -> Tensor:
        """[N, C] final l = 0 features, of what the backbone's forward returned."""
        raise self._cannot("embed")

    def in_pass(self, modulation: BoundModulation | None, heads: Iterable[nn.Module]) -> AbstractContextManager[None]:
        """While entered, a pass runs: every block that can be modulated calls `given.scalars` and `given.update`.

        What the host runs again in backward must run as it first did, whatever was run since.

        Args:
            given: the modulation; None: no condition, and no trace.
            heads: the heads that run in this pass.
        """
        if modulation is not None:
            raise self._cannot("modulate")
        return nullcontext()

    def element_embeddings(self) -> Iterable[nn.Module]:
        """What turns an atom's element into its first features; frozen in pre-training."""
        raise self._cannot("embed elements")

    def set_drop_path(self, rate: float) -> None:
        """Set the drop-path rate of every block."""
        raise ConfigError(f"task.denoising.drop_path: {self.names[0]} has no drop path; leave it out")

    def _cannot(self, what: str) -> ConfigError:
        return ConfigError(
            f"task.denoising.scd: {type(self).__name__}, the adapter of {self.names[0]}, does not say how to {what}; "
            "it needs scalar_channels, num_modulated, scalars, in_pass and element_embeddings (see "
            "fairchem_scd.backbones.Adapter). With condition: [] nothing is embedded"
        )

    def encoded(self, encoding: Tensor) -> AbstractContextManager[None]:
        """While entered, add `encoding` [N, Σ(lmax+1)², C] to the node embedding before the first block."""
        raise NotImplementedError(f"{type(self).__name__} has an encoding_spec, and so needs encoded")


_ADAPTERS: dict[type[nn.Module], type[Adapter]] = {}


def register_adapter(cls: type[Adapter]) -> type[Adapter]:
    """Make an adapter known for its `host_class`."""
    _ADAPTERS[cls.host_class] = cls
    return cls


def adapters() -> Sequence[type[Adapter]]:
    """All known adapters."""
    return list(_ADAPTERS.values())


def known_backbones() -> list[str]:
    """Names of the host backbones that have an adapter."""
    return sorted(name for cls in adapters() for name in cls.names)


def adapter_class(host_class: type[nn.Module]) -> type[Adapter]:
    """The adapter of a backbone class.

    Raises:
        ConfigError: there is none; the message lists the known backbones and says how to add one.
    """
    if host_class not in _ADAPTERS:
        for found in entry_points(group="fairchem_scd.adapters"):  # of other packages
            found.load()
    if host_class not in _ADAPTERS:
        raise ConfigError(
            f"model.backbone: no adapter for {host_class.__module__}.{host_class.__qualname__}; "
            f"known backbones: {', '.join(known_backbones())}. "
            "To add one, subclass fairchem_scd.backbones.Adapter: see docs/adding-a-backbone.md."
        )
    return _ADAPTERS[host_class]


def adapter_for(backbone: nn.Module) -> Adapter:
    """The adapter of a backbone. Raises ConfigError if there is none."""
    return adapter_class(type(backbone))(backbone)
