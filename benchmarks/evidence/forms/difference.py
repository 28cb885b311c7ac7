"""The difference form: blocks are told by how much the noisy structure differs from the clean one."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from fairchem_scd.denoising import passes
from fairchem_scd.denoising.condition_judge import ConditionJudge
from fairchem_scd.denoising.conditions import SelfCondition
from fairchem_scd.denoising.plan import Plan
from fairchem_scd.fairchem1.hydra import DenoisingHydra


class DifferenceHydra(DenoisingHydra):
    """SCD whose blocks are told by how much the noisy structure differs from the clean one, in place of c.

    Each block b is told d_b = (z_b(x) − z_b(x̃)) / rms_b, where z_b is the mean over a structure's atoms of the l = 0
    features that enter the block after its pre-norm, and rms_b a running root mean square per channel. To first order
    in the noise a model told invariants c_k of the clean structure gains by −Σ_k (c_k(x̃) − c_k(x)) ∇_i c_k, and
    c_k(x̃), a mean over all atoms, is what messages within a cutoff cannot form. The embedding [B, blocks · C] of a
    structure is its z_b(x), one block after the other.

    Use `told_differences` to make a model one.
    """

    def forward(self, data: Any, plan: Plan | None = None) -> dict[str, Any]:
        if plan is None:
            return super().forward(data)

        means = None

        def clean(model: DenoisingHydra, view: Any) -> _Means:
            nonlocal means
            means = _Means(view.batch, len(view.natoms))
            return means

        def embed(condition: SelfCondition, scalars: Tensor, batch: Tensor, size: int) -> Tensor:
            return torch.cat([means.of_block[block] for block in range(len(condition.modulation.blocks))], dim=1)

        def noisy(condition: SelfCondition, embedding: Tensor, conditioned: Tensor, batch: Tensor) -> _Difference:
            return _Difference(self, embedding, batch, conditioned, condition.modulation.blocks)

        # Where the engine asks for a pass's modulation, without a condition and with one, and for the embedding.
        with (
            mock.patch.object(passes, "_without_condition", clean),
            mock.patch.object(SelfCondition, "embed", embed),
            mock.patch.object(SelfCondition, "bind", noisy),
        ):
            return super().forward(data, plan)


def told_differences(model: DenoisingHydra) -> None:
    """Make a model one that is told differences, in place: its class changes, its modules stay."""
    model.__class__ = DifferenceHydra
    model.differences = None
    for block in range(model.adapter.num_modulated):
        model.register_buffer(_square(block), torch.zeros(model.adapter.scalar_channels), persistent=False)
        model.register_buffer(_count(block), torch.zeros(()), persistent=False)


def _square(block: int) -> str:
    return f"difference_square_{block}"


def _count(block: int) -> str:
    return f"difference_count_{block}"


class DifferenceJudge(ConditionJudge):
    """Judges a `DifferenceHydra`, whose blocks are told how far the noisy structure is from the embedding."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.differences: list[Tensor] = []

    def first(self, batch: Any) -> None:
        self.model.differences = self.differences
        try:
            super().first(batch)
        finally:
            self.model.differences = None

    def conditions(self) -> Tensor:
        return torch.cat(self.differences)


class _Means:
    """The z_b of a pass over a clean structure, which it leaves as it is."""

    def __init__(self, batch: Tensor, size: int) -> None:
        self.batch, self.size = batch, size
        self.of_block: dict[int, Tensor] = {}

    def scalars(self, block: int, scalars: Tensor) -> Tensor:
        self.of_block[block] = mean_of_structures(scalars, self.batch, self.size)
        return scalars

    def update(self, block: int, update: Tensor) -> Tensor:
        return update


class _Difference:
    """A modulation by differences, in the place of `conditions.BoundModulation`."""

    def __init__(
        self, model: DifferenceHydra, embedding: Tensor, batch: Tensor, conditioned: Tensor, blocks: nn.ModuleList
    ) -> None:
        self.model, self.batch, self.conditioned, self.blocks = model, batch, conditioned, blocks
        self.clean = embedding.chunk(len(blocks), dim=1)
        self.gates: dict[int, Tensor] = {}

    def scalars(self, block: int, scalars: Tensor) -> Tensor:
        model = self.model
        difference = self.clean[block] - mean_of_structures(scalars, self.batch, len(self.conditioned))
        square, count = getattr(model, _square(block)), getattr(model, _count(block))
        if model.training:
            with torch.no_grad():
                count += 1
                square.lerp_(difference.square().mean(dim=0), max(0.01, 1 / count.item()))
        condition = (difference / (square + 1e-12).sqrt()).clamp(-5, 5)
        if model.differences is not None and block == len(self.blocks) - 1:
            model.differences.append(condition)
        rows = self.batch
        out, self.gates[block] = self.blocks[block](scalars, condition[rows], self.conditioned[rows])
        return out

    def update(self, block: int, update: Tensor) -> Tensor:
        return update * self.gates.pop(block).to(update.dtype)


def mean_of_structures(values: Tensor, batch: Tensor, size: int) -> Tensor:
    """[B, C] means over the atoms of each of B = `size` structures, of [N, C]."""
    total = values.new_zeros(size, values.shape[1]).index_add(0, batch, values)
    return total / torch.bincount(batch, minlength=size).clamp(min=1)[:, None]
