"""eSCN (`escn_backbone`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fairchem.core.models.escn.escn import eSCNBackbone, eSCNForceHead
from torch import Tensor, nn

from fairchem_scd.backbones.base import Adapter, register_adapter

_HEADS = {"energy": {"module": "escn_energy_head"}, "forces": {"module": "escn_force_head"}}


@register_adapter
class ESCNAdapter(Adapter):
    host_class = eSCNBackbone
    names = ("escn_backbone",)
    one_piece = {"escn": _HEADS, "escn_dens": _HEADS}

    @property
    def encoding_spec(self) -> dict[str, Any]:
        backbone = self.backbone
        return {"lmax_list": backbone.lmax_list, "channels": backbone.sphere_channels, "bound": 0.001}

    def vector_head(self) -> nn.Module:
        return eSCNForceHead(self.backbone)

    @contextmanager
    def encoded(self, encoding: Tensor) -> Iterator[None]:
        # Block 0 has no residual: what enters it is the node embedding, and nothing else reads that.
        def add(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0].clone()
            x.embedding = x.embedding + encoding
            return (x, *args[1:])

        handle = self.backbone.layer_blocks[0].register_forward_pre_hook(add)
        try:
            yield
        finally:
            handle.remove()
