"""What the noise weighs beside the forces, and how many force labels a run sees: what is alike on both hosts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fairchem_scd.commands.check.report import Report
from fairchem_scd.denoising import loss
from fairchem_scd.denoising.corruption import Corruption
from fairchem_scd.denoising.structures import Structures
from fairchem_scd.denoising.tasks import DenoisingTask

_ROWS, _SECONDS = 256, 15.0
"""How many rows are read, and for how long. Forces differ much from structure to structure, so they are many."""

_DRAWS = 16
"""How often they are corrupted."""

_PUBLISHED = 2.7
"""Loss of predicting zero, noise over forces, of DeNS's OC20 runs: coefficients 10 and 100, forces in 2.887 eV/Å."""

_FAR = 3.0
"""Where DeNS's ratio is this many times smaller or larger than the published one, a coefficient to try is said."""

Row = TypeVar("Row")


def spaced_rows(count: int, read: Callable[[int], Row | None]) -> list[Row]:
    """Good rows, evenly spaced over a dataset; fewer where reading them takes long.

    Args:
        count: rows of the dataset.
        read: gives a row by its index; None where it cannot be trained on.
    """
    last, parts = count - 1, max(min(count, _ROWS) - 1, 1)
    start, rows = time.monotonic(), []
    for index in sorted({k * last // parts for k in range(parts + 1)}):
        row = read(index)
        rows += [] if row is None else [row]
        if rows and time.monotonic() - start > _SECONDS:
            break
    return rows


def replaces_forces(task: DenoisingTask) -> bool:
    """Whether the noise takes the place of the forces on corrupted atoms; otherwise it is a term of its own."""
    return task.objective(0.0).loss is None


def noise_of_zero(fn: loss.LossFunction, draws: Sequence[Corruption], *, scale: float, coefficient: float) -> float:
    """The noise's loss where the model predicts zero: λ times the mean over corrupted atoms.

    Args:
        fn: the loss function, which does not reduce.
        draws: corruptions of structures, at least one of which moved an atom.
        scale: unit of the noise, Å.
        coefficient: λ.
    """
    rows = [draw.mask.nonzero()[:, 0] for draw in draws]
    pairs = zip(draws, rows, strict=True)
    target = torch.cat([loss.noise_target(draw, of, scale, draw.noise.device) for draw, of in pairs])
    ranks = loss.Ranks(1, lambda count: count)
    return float(loss.noise_term(fn, torch.zeros_like(target), target, coefficient=coefficient, ranks=ranks))


def say_weights(
    tasks: Iterable[DenoisingTask],
    structures: Structures,
    *,
    labelled: Tensor,
    forces: float,
    noise: Callable[[DenoisingTask, Sequence[Corruption]], float],
    seed: int,
    length: float,
    counted: str,
    report: Report,
) -> None:
    """Report what a model that predicts zero would lose in forces and in noise, and the share of force labels seen.

    Args:
        tasks: of the run, those that have steps.
        structures: N atoms of the training data.
        labelled: [N] bool, the atoms whose forces train in an ordinary step.
        forces: the force loss of an ordinary step in which the model predicts zero.
        noise: gives a task's noise loss at the start of a run, of corruptions, where the model predicts zero.
        seed: of the run.
        length: of the run.
        counted: what `length` counts: "epoch" or "step".
        report: gets the lines.
    """
    heading, seen = "weights", 1.0
    for task in tasks:
        draws = [task.corrupt(structures, seed=seed, step=k) for k in range(1, _DRAWS + 1)]
        if not any(bool(draw.mask.any()) for draw in draws):
            continue  # that is a problem of its own
        _say_weight(heading, task, noise(task, draws), forces, report)
        heading = ""
        if replaces_forces(task):
            hidden = [float((draw.mask & labelled).sum()) / max(int(labelled.sum()), 1) for draw in draws]
            seen -= task.settings.prob * sum(hidden) / len(hidden)
    if seen < 1:
        _say_labels(seen, length, counted, report)


def _say_weight(heading: str, task: DenoisingTask, noise: float, forces: float, report: Report) -> None:
    losses = f"noise of {task.name} {noise:.3g}, forces {forces:.3g}"
    if not forces:  # its coefficient is zero, or all forces are
        report.say(heading, f"loss of predicting zero: {losses}")
        return
    coefficient, ratio = task.objective(0.0).coefficient, noise / forces
    report.say(heading, f"loss of predicting zero: {losses}; ratio {ratio:.2g}")
    if not coefficient:
        return
    if replaces_forces(task) and not 1 / _FAR < ratio / _PUBLISHED < _FAR:
        same = _short(coefficient * _PUBLISHED / ratio)
        report.say("", f"in the published run on OC20 2M the ratio is about {_PUBLISHED:g}; here coefficient: {same}")
        report.say("", "would make it that. A value to try in a long run, no rule: docs/adding-dens.md")


def _say_labels(seen: float, length: float, counted: str, report: Report) -> None:
    report.say("labels", f"{100 * seen:.0f} % of the force labels train; on the other atoms noise does in their place")
    see = f"{counted} sees" if length == 1 else f"{counted}s see"
    if seen > 0.005:
        report.say(
            "",
            f"{length:g} {see} as many labels as {_count(length * seen, counted)} of plain training. A short run loses "
            f"by that alone: give it {_count(length / seen, counted)} {counted}s, or lower prob",
        )


def _short(value: float) -> str:
    """A number with two digits."""
    return f"{float(f'{value:.2g}'):g}"


def _count(value: float, counted: str) -> str:
    """A number of epochs, with three digits or more before the point, or of whole steps."""
    return f"{value:.3g}" if counted == "epoch" and value < 1000 else f"{value:.0f}"
