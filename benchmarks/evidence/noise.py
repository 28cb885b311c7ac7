"""How well a model denoises held-out structures, judged as the package judges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence.forms.difference import judge_for
from fairchem_scd.denoising.condition_judge import ConditionJudge, structure_errors
from fairchem_scd.denoising.corruption import Corruption
from fairchem_scd.denoising.plan import NOISE, VALIDATION, Plan
from fairchem_scd.denoising.structures import Structures

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
    judge = judge_for(model)(model, task, model, structures=model.structures_of)
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
