"""eSEN (`esen_backbone`), with direct forces or the energy's gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from fairchem.core.models.esen.esen import Linear_Force_Head, eSEN_Backbone
from torch import Tensor, nn

from fairchem_scd.denoising.adapter import Adapter, register_adapter
from fairchem_scd.denoising.conditions import BoundModulation
from fairchem_scd.denoising.hooks import RecomputeInContext, hooked, replaced, with_scalars


@register_adapter
class ESENAdapter(Adapter):
    host_class = eSEN_Backbone
    names = ("esen_backbone",)

    @property
    def encoding_spec(self) -> dict[str, Any]:
        backbone = self.backbone
        return {"lmax_list": [backbone.lmax], "channels": backbone.sphere_channels, "bound": 1.0}

    def vector_head(self) -> nn.Module:
        return Linear_Force_Head(self.backbone)

    @property
    def scalar_channels(self) -> int:
        return self.backbone.sphere_channels

    @property
    def num_modulated(self) -> int:
        return len(self.backbone.blocks)

    def scalars(self, embedding: Any) -> Tensor:
        return embedding["node_embedding"][:, 0]

    def element_embeddings(self) -> Iterable[nn.Module]:
        return (self.backbone.sphere_embedding,)

    def in_pass(self, modulation: BoundModulation | None, heads: Iterable[nn.Module]) -> AbstractContextManager[None]:
        if modulation is None:
            return nullcontext()
        # Stand-ins, since activation checkpointing runs blocks again; rotations are among what a block is given.
        blocks = [
            RecomputeInContext(block, partial(_modulated, block, modulation, i))
            for i, block in enumerate(self.backbone.blocks)
        ]
        return replaced(self.backbone, "blocks", blocks)

    @contextmanager
    def encoded(self, encoding: Tensor) -> Iterator[None]:
        # What enters the edge-degree embedding is the node embedding; the former adds to it, outside what activation
        # checkpointing runs again.
        def add(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0] + encoding, *args[1:])

        with hooked(self.backbone.edge_degree_embedding.register_forward_pre_hook(add)):
            yield


@contextmanager
def _modulated(block: nn.Module, modulation: BoundModulation, index: int) -> Iterator[None]:
    """While entered, modulate what messages are made of and their sum: row 0 of the coefficients is l = 0."""

    def enter(module: nn.Module, args: tuple[Any, ...], normed: Tensor) -> Tensor:
        return with_scalars(normed, [0], lambda x: modulation.scalars(index, x))

    def leave(module: nn.Module, args: tuple[Any, ...], update: Tensor) -> Tensor:
        return with_scalars(update, [0], lambda x: modulation.update(index, x))

    with hooked(block.norm_1.register_forward_hook(enter), block.edge_wise.register_forward_hook(leave)):
        yield
