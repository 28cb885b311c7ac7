"""Forms in which blocks are told by how much the noisy structure differs from the clean one.

To first order in the noise a model told invariants c_k of the clean structure gains by −Σ_k (c_k(x̃) − c_k(x)) ∇_i c_k,
and c_k(x̃), a mean over all atoms, is what messages within a cutoff cannot form.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from fairchem_scd.denoising import passes
from fairchem_scd.denoising.condition_judge import ConditionJudge
from fairchem_scd.denoising.conditions import BoundModulation, SelfCondition
from fairchem_scd.denoising.plan import EMBEDDING, Plan
from fairchem_scd.fairchem1.hydra import DenoisingHydra


class _Told(DenoisingHydra):
    """SCD whose blocks are told differences.

    Attributes:
        scales: of the differences that are told, one for each kind of them.
        mixes: make what is told of the condition c and a difference, one for each kind; None: the difference alone.
    """

    scales: nn.ModuleList
    mixes: nn.ModuleList | None

    def become(self, kinds: int, *, beside: bool) -> None:
        """Get so many kinds of differences, told beside c or alone."""
        channels = self.adapter.scalar_channels
        self.scales = nn.ModuleList(_Scale(channels) for _ in range(kinds))
        self.mixes = nn.ModuleList(nn.Linear(2 * channels, channels) for _ in range(kinds)) if beside else None

    def told(self, kind: int, difference: Tensor, condition: Tensor | None) -> Tensor:
        """[B, C] what the structures are told, of a difference [B, C] and, where it is told too, the condition."""
        scaled = self.scales[kind](difference)
        return scaled if condition is None else self.mixes[kind](torch.cat([condition, scaled], dim=1))


class _Scale(nn.Module):
    """Divides differences [B, C] by a running root mean square of each channel; at most 5 in size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("square", torch.zeros(channels), persistent=False)
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def forward(self, difference: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.count += 1
                self.square.lerp_(difference.square().mean(dim=0), max(0.01, 1 / self.count.item()))
        return (difference / (self.square + 1e-12).sqrt()).clamp(-5, 5)


class DifferenceJudge(ConditionJudge):
    """Judges a model whose blocks are told differences; its dimensions and spread are those of the last kind."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.differences: list[Tensor] = []

    def first(self, batch: Any) -> None:
        hook = self.model.scales[-1].register_forward_hook(lambda _, inputs, scaled: self.differences.append(scaled))
        try:
            super().first(batch)
        finally:
            hook.remove()

    def conditions(self) -> Tensor:
        return torch.cat(self.differences)


def judge_for(model: Any) -> type[ConditionJudge]:
    """What judges a model of any form."""
    return DifferenceJudge if isinstance(model, _Told) else ConditionJudge


# --- of the means in each block ---------------------------------------------------------------------------------------


def told_differences(model: DenoisingHydra) -> None:
    """Make a model one of the difference form, in place: its class changes, its modules stay.

    Each block b is told d_b = (z_b(x) − z_b(x̃)) / rms_b, where z_b is the mean over a structure's atoms of the l = 0
    features that enter the block after its pre-norm, and rms_b a running root mean square per channel. The embedding
    [B, blocks · C] of a structure is its z_b(x), one block after the other.
    """
    model.__class__ = _OfMeans
    model.become(model.adapter.num_modulated, beside=False)


def told_differences_and_embedding(model: DenoisingHydra) -> None:
    """As `told_differences`, with SCD's condition c told beside each d_b, by a linear function of both.

    The embedding of a structure ends with that of SCD: [B, (blocks + 1) · C].
    """
    model.__class__ = _OfMeans
    model.become(model.adapter.num_modulated, beside=True)


class _OfMeans(_Told):
    def forward(self, data: Any, plan: Plan | None = None) -> dict[str, Any]:
        if plan is None:
            return super().forward(data)

        means = None

        def clean(model: DenoisingHydra, view: Any) -> _Means:
            nonlocal means
            means = _Means(view.batch, len(view.natoms))
            return means

        def embed(condition: SelfCondition, scalars: Tensor, batch: Tensor, size: int) -> Tensor:
            made = [means.of_block[block] for block in range(len(condition.modulation.blocks))]
            return torch.cat(made if self.mixes is None else [*made, condition.head(scalars, batch, size)], dim=1)

        def noisy(condition: SelfCondition, embedding: Tensor, conditioned: Tensor, batch: Tensor) -> _Difference:
            blocks = condition.modulation.blocks
            parts = embedding.split(self.adapter.scalar_channels, dim=1)
            beside = None if self.mixes is None else condition.head.condition(parts[-1], conditioned)
            return _Difference(self, parts, beside, batch, conditioned, blocks)

        # Where the engine asks for a pass's modulation, without a condition and with one, and for the embedding.
        with (
            mock.patch.object(passes, "_without_condition", clean),
            mock.patch.object(SelfCondition, "embed", embed),
            mock.patch.object(SelfCondition, "bind", noisy),
        ):
            return super().forward(data, plan)


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
    """A modulation by differences, in the place of `conditions.BoundModulation`.

    Args:
        clean: z_b(x) [B, C] by block.
        beside: the condition [B, C] that is told too; None: there is none.
    """

    def __init__(
        self,
        model: _Told,
        clean: tuple[Tensor, ...],
        beside: Tensor | None,
        batch: Tensor,
        conditioned: Tensor,
        blocks: nn.ModuleList,
    ) -> None:
        self.model, self.clean, self.beside = model, clean, beside
        self.batch, self.conditioned, self.blocks = batch, conditioned, blocks
        self.gates: dict[int, Tensor] = {}

    def scalars(self, block: int, scalars: Tensor) -> Tensor:
        difference = self.clean[block] - mean_of_structures(scalars, self.batch, len(self.conditioned))
        told = self.model.told(block, difference, self.beside)
        rows = self.batch
        out, self.gates[block] = self.blocks[block](scalars, told[rows], self.conditioned[rows])
        return out

    def update(self, block: int, update: Tensor) -> Tensor:
        return update * self.gates.pop(block).to(update.dtype)


def mean_of_structures(values: Tensor, batch: Tensor, size: int) -> Tensor:
    """[B, C] means over the atoms of each of B = `size` structures, of [N, C]."""
    total = values.new_zeros(size, values.shape[1]).index_add(0, batch, values)
    return total / torch.bincount(batch, minlength=size).clamp(min=1)[:, None]


# --- of the embeddings ------------------------------------------------------------------------------------------------


def told_difference_of_embeddings(model: DenoisingHydra) -> None:
    """All blocks are told (c(x) − c(x̃)) / rms in the place of c(x): a third pass embeds the noisy structure."""
    model.__class__ = _OfEmbeddings
    model.become(1, beside=False)


def told_difference_of_embeddings_and_embedding(model: DenoisingHydra) -> None:
    """As `told_difference_of_embeddings`, with c(x) told beside it, by a linear function of both."""
    model.__class__ = _OfEmbeddings
    model.become(1, beside=True)


class _OfEmbeddings(_Told):
    def forward(self, data: Any, plan: Plan | None = None) -> dict[str, Any]:
        noisy = None if plan is None else next((run for run in plan.passes if run.conditioned is not None), None)
        if noisy is None:
            return super().forward(data, plan)
        embedding = replace(noisy, conditioned=None, given=None, outputs=False, noise=False, embed=True)
        of_noisy = super().forward(data, Plan(plan.task, (embedding,), returns_embedding=True))[EMBEDDING]

        def bind(condition: SelfCondition, clean: Tensor, conditioned: Tensor, batch: Tensor) -> BoundModulation:
            beside = None if self.mixes is None else condition.head.condition(clean, conditioned)
            told = self.told(0, clean - of_noisy, beside)
            return condition.modulation.bind(told[batch], conditioned[batch])

        with mock.patch.object(SelfCondition, "bind", bind):
            return super().forward(data, plan)
