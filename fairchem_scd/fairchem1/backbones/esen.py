"""eSEN (`esen_backbone`), with direct forces or the energy's gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from fairchem.core.models.esen.esen import Linear_Force_Head, MLP_EFS_Head, MLP_Energy_Head, eSEN_Backbone
from torch import Tensor, nn

from fairchem_scd.denoising.adapter import register_adapter
from fairchem_scd.denoising.conditions import BoundModulation
from fairchem_scd.denoising.hooks import changed_inputs, changed_output, with_scalars
from fairchem_scd.fairchem1.backbones.base import Fairchem1Adapter


@register_adapter
class ESENAdapter(Fairchem1Adapter):
    """Atoms have spherical-harmonic coefficients [N, (lmax + 1)², C], whose row 0 is l = 0."""

    host_class = eSEN_Backbone
    names = ("esen_backbone",)
    scalar_heads = {MLP_Energy_Head: "energy_block.4", MLP_EFS_Head: "energy_block.4"}

    def vector_head(self) -> nn.Module:
        return Linear_Force_Head(self.backbone)

    @property
    def scalar_channels(self) -> int:
        return self.backbone.sphere_channels

    def scalars(self, embedding: Any) -> Tensor:
        return embedding["node_embedding"][:, 0]

    def element_embeddings(self) -> Iterable[nn.Module]:
        return (self.backbone.sphere_embedding,)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.backbone.blocks

    @contextmanager
    def modulated(self, block: nn.Module, index: int, modulation: BoundModulation) -> Iterator[None]:
        def enter(normed: Tensor) -> Tensor:
            return with_scalars(normed, [0], partial(modulation.scalars, index))

        def leave(update: Tensor) -> Tensor:
            return with_scalars(update, [0], partial(modulation.update, index))

        with changed_output(block.norm_1, enter), changed_output(block.edge_wise, leave):
            yield

    @property
    def encoding_spec(self) -> dict[str, Any]:
        backbone = self.backbone
        return {"lmax_list": [backbone.lmax], "channels": backbone.sphere_channels, "bound": 1.0}

    def encoded(self, encoding: Tensor) -> AbstractContextManager[None]:
        # The edge-degree embedding gets the atoms' first features and adds to them. Activation checkpointing does not
        # run it again.
        return changed_inputs(self.backbone.edge_degree_embedding, lambda x, *rest: (x + encoding, *rest))

    def recomputed(self, heads: Iterable[nn.Module]) -> Iterable[tuple[nn.Module, str]]:
        # There is no `state_of_pass`: the rotations of the edges are among a block's arguments.
        return [(self.backbone, "blocks")] if self.backbone.activation_checkpointing else []
