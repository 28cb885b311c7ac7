"""eSCN (`escn_backbone`)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from fairchem.core.models.escn.escn import eSCNBackbone, eSCNForceHead
from torch import Tensor, nn

from fairchem_scd.denoising.adapter import Adapter, register_adapter
from fairchem_scd.denoising.conditions import BoundModulation
from fairchem_scd.denoising.hooks import hooked, with_scalars

_HEADS = {"energy": {"module": "escn_energy_head"}, "forces": {"module": "escn_force_head"}}


@register_adapter
class ESCNAdapter(Adapter):
    host_class = eSCNBackbone
    names = ("escn_backbone",)
    legacy_heads = {"escn": _HEADS, "escn_dens": _HEADS}

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        # Left from the one-piece model. The host's heads take their block out; without them it has no gradient.
        backbone.energy_block = None

    @property
    def encoding_spec(self) -> dict[str, Any]:
        backbone = self.backbone
        return {"lmax_list": backbone.lmax_list, "channels": backbone.sphere_channels, "bound": 0.001}

    def vector_head(self) -> nn.Module:
        return eSCNForceHead(self.backbone)

    @property
    def scalar_channels(self) -> int:
        return self.backbone.sphere_channels_all

    @property
    def num_modulated(self) -> int:
        return len(self.backbone.layer_blocks) - 1  # block 0 has no residual

    def scalars(self, embedding: Any) -> Tensor:
        return embedding["node_embedding"].embedding[:, self._rows].flatten(1)

    def element_embeddings(self) -> Iterable[nn.Module]:
        return (self.backbone.sphere_embedding,)

    @contextmanager
    def in_pass(self, modulation: BoundModulation | None, heads: Iterable[nn.Module]) -> Iterator[None]:
        with ExitStack() as stack:
            if modulation is not None:
                for i, block in enumerate(self.backbone.layer_blocks[1:]):
                    stack.enter_context(self._modulated(block, modulation, i))
            yield

    @contextmanager
    def _modulated(self, block: nn.Module, modulation: BoundModulation, index: int) -> Iterator[None]:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = copy.copy(args[0])  # the residual is to stay as it is
            x.embedding = with_scalars(x.embedding, self._rows, lambda x: modulation.scalars(index, x))
            return (x, *args[1:])

        def leave(module: nn.Module, args: tuple[Any, ...], update: Any) -> Any:
            update.embedding = with_scalars(update.embedding, self._rows, lambda x: modulation.update(index, x))
            return update

        with hooked(block.register_forward_pre_hook(enter), block.register_forward_hook(leave)):
            yield

    @property
    def _rows(self) -> list[int]:
        """The l = 0 row of each resolution."""
        sizes = [(lmax + 1) ** 2 for lmax in self.backbone.lmax_list]
        return [sum(sizes[:i]) for i in range(len(sizes))]

    @contextmanager
    def encoded(self, encoding: Tensor) -> Iterator[None]:
        # Block 0 has no residual: what enters it is the node embedding, and nothing else reads that.
        def add(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0].clone()
            x.embedding = x.embedding + encoding
            return (x, *args[1:])

        with hooked(self.backbone.layer_blocks[0].register_forward_pre_hook(add)):
            yield
