"""PaiNN (`painn_backbone`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

from fairchem.core.models.painn.painn import PaiNNBackbone, PaiNNForceHead
from torch import Tensor, nn

from fairchem_scd.denoising.adapter import Adapter, register_adapter
from fairchem_scd.denoising.conditions import BoundModulation
from fairchem_scd.denoising.hooks import hooked
from fairchem_scd.errors import ConfigError


@register_adapter
class PaiNNAdapter(Adapter):
    """Atoms have scalars [N, C] and vectors [N, 3, C]; what tells forces has rows of both."""

    host_class = PaiNNBackbone
    names = ("painn_backbone",)
    legacy_heads = {"painn": {"energy": {"module": "painn_energy_head"}, "forces": {"module": "painn_force_head"}}}
    moved = {"out_energy": "energy", "out_forces": "forces"}
    vectors_need_forces = runs_lone_structures = False
    elements_key = "num_elements"

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        # Left from the one-piece model. The host's heads take theirs out; without them it has no gradient.
        backbone.out_energy = backbone.out_forces = None

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        super().check(config)
        if config.get("direct_forces", True) is False:
            raise ConfigError(
                "model.backbone.direct_forces is false: what the host's painn_force_head returns then is the gradient "
                "of the sum of all atom features, not of the energy; set it to true"
            )

    @property
    def encoding_spec(self) -> dict[str, Any]:
        return {"lmax_list": [1], "channels": self.backbone.hidden_channels, "bound": 1.0}

    def vector_head(self) -> nn.Module:
        # The head takes the backbone's own output module out of it: that of a stand-in.
        return PaiNNForceHead(SimpleNamespace(direct_forces=True, hidden_channels=self.backbone.hidden_channels))

    @property
    def max_num_elements(self) -> int:
        return self.backbone.atom_emb.embeddings.num_embeddings + 1  # without an element 0

    @property
    def scalar_channels(self) -> int:
        return self.backbone.hidden_channels

    @property
    def num_modulated(self) -> int:
        return len(self.backbone.message_layers)

    def scalars(self, embedding: Any) -> Tensor:
        return embedding["node_embedding"]

    def element_embeddings(self) -> Iterable[nn.Module]:
        return (self.backbone.atom_emb,)

    @contextmanager
    def in_pass(self, modulation: BoundModulation | None, heads: Iterable[nn.Module]) -> Iterator[None]:
        with ExitStack() as stack:
            if modulation is not None:
                for i, message in enumerate(self.backbone.message_layers):
                    stack.enter_context(_modulated(message, modulation, i))
            yield

    @contextmanager
    def encoded(self, encoding: Tensor) -> Iterator[None]:
        scalars, vectors = encoding[:, 0], encoding[:, 1:]  # l = 1 in the order x, y, z

        def add_scalars(module: nn.Module, args: tuple[Any, ...], x: Tensor) -> Tensor:
            return x + scalars

        # Vectors begin at zero inside the host's forward: they are added where the first block reads them, and, since
        # its residual is not reached from here, to what it returns.
        def read_vectors(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x, vec, *rest = args
            return (x, vec + vectors, *rest)

        def keep_vectors(module: nn.Module, args: tuple[Any, ...], update: tuple[Tensor, Tensor]) -> Any:
            return update[0], update[1] + vectors

        first = self.backbone.message_layers[0]
        with hooked(
            self.backbone.atom_emb.register_forward_hook(add_scalars),
            first.register_forward_pre_hook(read_vectors),
            first.register_forward_hook(keep_vectors),
        ):
            yield


@contextmanager
def _modulated(message: nn.Module, modulation: BoundModulation, index: int) -> Iterator[None]:
    """While entered, modulate the scalars that messages are made of, and the update they come to."""

    def enter(module: nn.Module, args: tuple[Any, ...], normed: Tensor) -> Tensor:
        return modulation.scalars(index, normed)

    def leave(module: nn.Module, args: tuple[Any, ...], update: tuple[Tensor, Tensor]) -> Any:
        return modulation.update(index, update[0]), update[1]

    with hooked(message.x_layernorm.register_forward_hook(enter), message.register_forward_hook(leave)):
        yield
