"""EquiformerV2 (`equiformer_v2_backbone`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fairchem.core.models.equiformer_v2.equiformer_v2 import EquiformerV2Backbone
from fairchem.core.models.equiformer_v2.heads import EqV2VectorHead
from torch import Tensor, nn

from fairchem_scd.backbones.base import Adapter, register_adapter
from fairchem_scd.config import ConfigError

_HEADS = {"energy": {"module": "equiformerV2_scalar_head"}, "forces": {"module": "equiformerV2_vector_head"}}


@register_adapter
class EquiformerV2Adapter(Adapter):
    host_class = EquiformerV2Backbone
    names = ("equiformer_v2_backbone",)
    one_piece = {"equiformer_v2": _HEADS, "equiformer_v2_dens": _HEADS}
    # The first is an option of EquiformerV2's own repository that the host never had.
    dropped = {"use_tp_reparam": False, "use_energy_lin_ref": False}

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        super().check(config)
        if len(config.get("lmax_list") or [6]) > 1:
            raise ConfigError("model.backbone.lmax_list: the host's EquiformerV2 runs with one resolution only")

    @property
    def encoding_spec(self) -> dict[str, Any]:
        backbone = self.backbone
        return {"lmax_list": backbone.lmax_list, "channels": backbone.sphere_channels, "bound": 1.0}

    def vector_head(self) -> nn.Module:
        return EqV2VectorHead(self.backbone)

    @contextmanager
    def encoded(self, encoding: Tensor) -> Iterator[None]:
        # The edge-degree embedding is the last thing added before the first block, and lies outside what activation
        # checkpointing runs again.
        def add(module: nn.Module, args: tuple[Any, ...], degree: Any) -> Any:
            degree.embedding = degree.embedding + encoding
            return degree

        handle = self.backbone.edge_degree_embedding.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()
