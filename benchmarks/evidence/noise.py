"""How well a model denoises held-out structures, judged as the package judges; and another form of the condition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from fairchem_scd.denoising import passes
from fairchem_scd.denoising.condition_judge import ConditionJudge, structure_errors
from fairchem_scd.denoising.conditions import SelfCondition
from fairchem_scd.denoising.corruption import Corruption
from fairchem_scd.denoising.plan import NOISE, VALIDATION, Plan
from fairchem_scd.denoising.structures import Structures
from fairchem_scd.fairchem1.hydra import DenoisingHydra

_AT_ONCE = 16


@torch.no_grad()
def noise_errors(trainer: Any) -> Tensor:
    """Noise errors of a trainer's present weights, in eval mode, on its held-out structures.

    The noise is that of validation, the same for every run. Where SCD has a condition, structures are told their own
    embedding.

    Returns:
        [B] mean square of the noise's error over σ², of each structure. Predicting zero has about 1 − 1/N for N atoms.
    """
    model, task, errors = trainer._unwrapped_model, trainer.tasks["scd"], []
    for batch, structures, corruption in _corrupted(trainer):
        planned = task.passes(structures, corruption, seed=0, step=VALIDATION)
        noise = model(batch, plan=Plan(task.name, planned))[NOISE]
        errors.append(structure_errors(noise, corruption, task.settings.std).mse)
    return torch.cat(errors)


@torch.no_grad()
def shrinkage_errors(trainer: Any, displacements: Sequence[Tensor], size: float) -> Tensor:
    """Noise errors of the best prediction that is told no condition, on `noise_errors`' structures and noise.

    A structure x = r + u whose sites r are known and whose displacements u are normal with standard deviation s is best
    denoised by ε̂ = (x̃ − r) σ² / (σ² + s²), each without its mean over the atoms. Its expected error is
    s² / (s² + σ²) of that of predicting zero.

    Args:
        displacements: x − r of each held-out structure [N, 3] without their mean, Å.
        size: s, Å.

    Returns:
        [B] as `noise_errors`.
    """
    std, errors, left = trainer.tasks["scd"].settings.std, [], list(displacements)
    for _, structures, corruption in _corrupted(trainer):
        count = len(structures.natoms)
        known, left = torch.cat(left[:count]), left[count:]
        noise = (known + corruption.noise) * std**2 / (std**2 + size**2)
        errors.append(structure_errors(noise / std, corruption, std).mse)
    return torch.cat(errors)


@torch.no_grad()
def judged(trainer: Any) -> ConditionJudge:
    """A judge of a trainer's condition that has seen its held-out structures, with its present weights in eval mode."""
    model, task = trainer._unwrapped_model, trainer.tasks["scd"]
    kind = DifferenceJudge if isinstance(model, DifferenceHydra) else ConditionJudge
    judge = kind(model, task, model, structures=model.structures_of)
    for batch in _batches(trainer):
        judge.first(batch)
    judge.pair()
    for batch in _batches(trainer):
        judge.second(batch)
    return judge


_TOLD = ("right", "other", "none")


def judge(trainer: Any) -> dict[str, Any]:
    """Noise errors as the trainer's weights are.

    Returns:
        By what structures are told, the mean and its standard error; of the differences too. "structures": the errors
        of each, and their numbers of "atoms". "dimensions" and "spread" of what structures are told, see
        `ConditionReport`.
        Without a condition "none" alone.
    """
    atoms = [int(row.natoms) for row in trainer.val_dataset]
    if not trainer.tasks["scd"].settings.condition:
        return summary({"none": noise_errors(trainer)}, atoms)
    found = judged(trainer)
    errors, report = {told: of_structures(found, told) for told in _TOLD}, found.report()
    return {
        **summary(errors, atoms),
        "other_minus_right": _mean(errors["other"] - errors["right"]),
        "none_minus_right": _mean(errors["none"] - errors["right"]),
        "dimensions": round(report.dimensions, 3),
        "spread": round(report.spread, 4),
    }


def summary(errors: dict[str, Tensor], atoms: list[int]) -> dict[str, Any]:
    """By what structures are told, the mean error and its standard error; "structures": each one's errors and atoms."""
    structures = {told: [round(error, 5) for error in of.tolist()] for told, of in errors.items()}
    return {**{told: _mean(of) for told, of in errors.items()}, "structures": {**structures, "atoms": atoms}}


def of_structures(found: ConditionJudge, told: str) -> torch.Tensor:
    """[B] noise errors of the held-out structures, in their order."""
    return torch.tensor([score.mse[told] for score in found.scores.values()], dtype=torch.float64)


def _mean(values: Any) -> list[float]:
    """Mean, and its standard error."""
    return [round(values.mean().item(), 6), round(values.std().item() / len(values) ** 0.5, 6)]


def _corrupted(trainer: Any) -> Iterator[tuple[Any, Structures, Corruption]]:
    """Batches of the held-out structures, as tasks see them, and with the noise of validation."""
    for batch in _batches(trainer):
        structures = trainer._unwrapped_model.structures_of(batch)
        yield batch, structures, trainer.tasks["scd"].corrupt(structures, seed=0, step=VALIDATION)


def _batches(trainer: Any) -> Iterator[Any]:
    rows = trainer.val_dataset
    for start in range(0, len(rows), _AT_ONCE):
        yield trainer.collater([rows[i] for i in range(start, min(start + _AT_ONCE, len(rows)))])


# --- the difference form ----------------------------------------------------------------------------------------------


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
