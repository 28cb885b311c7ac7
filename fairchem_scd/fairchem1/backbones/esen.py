"""eSEN (`esen_backbone`), with direct forces or the energy's gradient."""

from __future__ import annotations

from collections.abc import Iterable

from fairchem.core.models.esen.esen import Linear_Force_Head, MLP_EFS_Head, MLP_Energy_Head, eSEN_Backbone
from torch import nn

from fairchem_scd.denoising.adapter import register_adapter
from fairchem_scd.denoising.coefficients import CoefficientsAdapter
from fairchem_scd.fairchem1.backbones.base import Fairchem1Adapter


@register_adapter
class ESENAdapter(CoefficientsAdapter, Fairchem1Adapter):
    """Direct and conservative heads; what the blocks do is in `CoefficientsAdapter`."""

    host_class = eSEN_Backbone
    names = ("esen_backbone",)
    scalar_heads = {MLP_Energy_Head: "energy_block.4", MLP_EFS_Head: "energy_block.4"}

    def vector_head(self) -> nn.Module:
        return Linear_Force_Head(self.backbone)

    def recomputed(self, heads: Iterable[nn.Module]) -> Iterable[tuple[nn.Module, str]]:
        # There is no `state_of_pass`: the rotations of the edges are among a block's arguments.
        return [(self.backbone, "blocks")] if self.backbone.activation_checkpointing else []
