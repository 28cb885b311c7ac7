"""EquiformerV2 (`equiformer_v2_backbone`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from fairchem.core.models.equiformer_v2.drop import GraphDropPath, drop_path
from fairchem.core.models.equiformer_v2.equiformer_v2 import EquiformerV2Backbone
from fairchem.core.models.equiformer_v2.equiformer_v2_dens import DeNSScalarHead
from fairchem.core.models.equiformer_v2.heads import EqV2ScalarHead, EqV2VectorHead
from fairchem.core.models.equiformer_v2.transformer_block import SO2EquivariantGraphAttention
from torch import Tensor, nn

from fairchem_scd.denoising.adapter import register_adapter
from fairchem_scd.denoising.conditions import BoundModulation
from fairchem_scd.denoising.hooks import StateOfPass, changed_output, with_scalars
from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1.backbones.base import Fairchem1Adapter

Rotations = list[tuple[Tensor, Tensor]]


class AtomDropPath(GraphDropPath):
    """Stands for the host's drop path, which draws for each structure, and draws for each atom on its own.

    As there, all degrees and channels of an update are dropped together, and what is kept grows by 1 / (1 - rate).
    """

    def forward(self, x: Tensor, batch: Tensor) -> Tensor:
        return drop_path(x, self.drop_prob, self.training)


@register_adapter
class EquiformerV2Adapter(Fairchem1Adapter):
    """Atoms have spherical-harmonic coefficients [N, (lmax + 1)², C], whose row 0 is l = 0."""

    host_class = EquiformerV2Backbone
    names = ("equiformer_v2_backbone",)
    scalar_heads = {EqV2ScalarHead: "energy_block.so3_linear_2", DeNSScalarHead: "scalar_block.so3_linear_2"}

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        super().check(config)
        if len(config.get("lmax_list") or [6]) > 1:
            raise ConfigError("model.backbone.lmax_list: the host's EquiformerV2 runs with one resolution only")

    def set_drop_path(self, rate: float) -> None:
        for block in self.backbone.blocks:
            if block.drop_path is None:  # a block without one adds one, which has no weights
                block.drop_path = GraphDropPath(rate)
            block.drop_path.drop_prob = rate

    def set_drop_path_per(self, per: str) -> bool:
        cls = {"structure": GraphDropPath, "atom": AtomDropPath}[per]
        blocks = [block for block in self.backbone.blocks if block.drop_path is not None]
        for block in blocks:
            block.drop_path = cls(block.drop_path.drop_prob)
        return bool(blocks)

    def vector_head(self) -> nn.Module:
        return EqV2VectorHead(self.backbone)

    @property
    def scalar_channels(self) -> int:
        return self.backbone.sphere_channels

    def scalars(self, embedding: Any) -> Tensor:
        return embedding["node_embedding"].embedding[:, 0]

    def element_embeddings(self) -> Iterable[nn.Module]:
        return (self.backbone.sphere_embedding,)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.backbone.blocks

    @contextmanager
    def modulated(self, block: nn.Module, index: int, modulation: BoundModulation) -> Iterator[None]:
        def enter(normed: Tensor) -> Tensor:
            return with_scalars(normed, [0], partial(modulation.scalars, index))

        def leave(update: Any) -> Any:
            update.embedding = with_scalars(update.embedding, [0], partial(modulation.update, index))
            return update

        with changed_output(block.norm_1, enter), changed_output(block.ga, leave):  # ga: graph attention
            yield

    @property
    def encoding_spec(self) -> dict[str, Any]:
        # The host initialises its linear maps, of which this would be one from a single channel, by `weight_init`.
        backbone = self.backbone
        bound = None if backbone.weight_init == "normal" else 1.0
        return {"lmax_list": backbone.lmax_list, "channels": backbone.sphere_channels, "bound": bound}

    def encoded(self, encoding: Tensor) -> AbstractContextManager[None]:
        # The edge-degree embedding is added last before the first block, and activation checkpointing does not run it
        # again.
        def add(degree: Any) -> Any:
            degree.embedding = degree.embedding + encoding
            return degree

        return changed_output(self.backbone.edge_degree_embedding, add)

    def recomputed(self, heads: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str]]:
        if self.backbone.activation_checkpoint:
            yield self.backbone, "blocks"
            for head in heads:
                for name, child in head.named_children():
                    if isinstance(child, SO2EquivariantGraphAttention):
                        yield head, name

    def state_of_pass(self) -> StateOfPass[Rotations]:
        """The rotations of the edges."""
        modules = self.backbone.SO3_rotation

        def read() -> Rotations:
            return [(module.wigner, module.wigner_inv) for module in modules]

        def write(rotations: Rotations) -> None:
            for module, (wigner, inverse) in zip(modules, rotations, strict=True):
                module.wigner, module.wigner_inv = wigner, inverse

        return StateOfPass(read, write)
