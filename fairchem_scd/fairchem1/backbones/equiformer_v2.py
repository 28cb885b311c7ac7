"""EquiformerV2 (`equiformer_v2_backbone`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from fairchem.core.models.equiformer_v2.drop import GraphDropPath
from fairchem.core.models.equiformer_v2.equiformer_v2 import EquiformerV2Backbone
from fairchem.core.models.equiformer_v2.heads import EqV2VectorHead
from fairchem.core.models.equiformer_v2.transformer_block import SO2EquivariantGraphAttention
from torch import Tensor, nn

from fairchem_scd.denoising.adapter import Adapter, register_adapter
from fairchem_scd.denoising.conditions import BoundModulation
from fairchem_scd.denoising.hooks import RecomputeInContext, hooked, replaced, with_scalars
from fairchem_scd.errors import ConfigError

_HEADS = {"energy": {"module": "equiformerV2_scalar_head"}, "forces": {"module": "equiformerV2_vector_head"}}


@register_adapter
class EquiformerV2Adapter(Adapter):
    host_class = EquiformerV2Backbone
    names = ("equiformer_v2_backbone",)
    legacy_heads = {"equiformer_v2": _HEADS, "equiformer_v2_dens": _HEADS}
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

    @property
    def scalar_channels(self) -> int:
        return self.backbone.sphere_channels

    @property
    def num_modulated(self) -> int:
        return len(self.backbone.blocks)

    def scalars(self, embedding: Any) -> Tensor:
        return embedding["node_embedding"].embedding[:, 0]

    def element_embeddings(self) -> Iterable[nn.Module]:
        return (self.backbone.sphere_embedding,)

    def set_drop_path(self, rate: float) -> None:
        for block in self.backbone.blocks:
            if block.drop_path is None:  # built without: it has no weights
                block.drop_path = GraphDropPath(rate)
            block.drop_path.drop_prob = rate

    @contextmanager
    def in_pass(self, modulation: BoundModulation | None, heads: Iterable[nn.Module]) -> Iterator[None]:
        backbone = self.backbone
        with ExitStack() as stack:
            if backbone.activation_checkpoint:
                rotations = _Rotations(backbone.SO3_rotation)
                blocks = []
                for i, block in enumerate(backbone.blocks):
                    conditioned = () if modulation is None else (partial(_modulated, block, modulation, i),)
                    blocks.append(RecomputeInContext(block, rotations.restored, *conditioned))
                stack.enter_context(replaced(backbone, "blocks", blocks))
                for head in heads:
                    for name, child in head.named_children():
                        if isinstance(child, SO2EquivariantGraphAttention):
                            stack.enter_context(replaced(head, name, RecomputeInContext(child, rotations.restored)))
            elif modulation is not None:
                for i, block in enumerate(backbone.blocks):
                    stack.enter_context(_modulated(block, modulation, i))
            yield

    @contextmanager
    def encoded(self, encoding: Tensor) -> Iterator[None]:
        # The edge-degree embedding is the last thing added before the first block, and lies outside what activation
        # checkpointing runs again.
        def add(module: nn.Module, args: tuple[Any, ...], degree: Any) -> Any:
            degree.embedding = degree.embedding + encoding
            return degree

        with hooked(self.backbone.edge_degree_embedding.register_forward_hook(add)):
            yield


@contextmanager
def _modulated(block: nn.Module, modulation: BoundModulation, index: int) -> Iterator[None]:
    """While entered, modulate what attention reads and writes: row 0 of the coefficients is l = 0."""

    def enter(module: nn.Module, args: tuple[Any, ...], normed: Tensor) -> Tensor:
        return with_scalars(normed, [0], lambda x: modulation.scalars(index, x))

    def leave(module: nn.Module, args: tuple[Any, ...], update: Any) -> Any:
        update.embedding = with_scalars(update.embedding, [0], lambda x: modulation.update(index, x))
        return update

    with hooked(block.norm_1.register_forward_hook(enter), block.ga.register_forward_hook(leave)):
        yield


class _Rotations:
    """The edge rotations of one pass, which the backbone keeps of its latest pass alone."""

    def __init__(self, modules: nn.ModuleList) -> None:
        self.modules = modules
        self.kept: list[tuple[Tensor, Tensor]] | None = None

    @contextmanager
    def restored(self) -> Iterator[None]:
        now = [(m.wigner, m.wigner_inv) for m in self.modules]
        if self.kept is None:  # the pass's first block: these are its own
            self.kept = now
        self._set(self.kept)
        try:
            yield
        finally:
            self._set(now)

    def _set(self, rotations: list[tuple[Tensor, Tensor]]) -> None:
        for module, (wigner, inverse) in zip(self.modules, rotations, strict=True):
            module.wigner, module.wigner_inv = wigner, inverse
