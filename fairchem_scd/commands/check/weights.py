"""What the noise weighs beside the forces, on the user's own data, and how many force labels a run sees."""

from __future__ import annotations

import time
from typing import Any

import torch
from fairchem.core.common.registry import registry
from fairchem.core.datasets import data_list_collater
from torch import Tensor

from fairchem_scd.commands.check.report import Report
from fairchem_scd.denoising import loss
from fairchem_scd.denoising.corruption import Corruption
from fairchem_scd.denoising.structures import structures_of
from fairchem_scd.denoising.tasks import DenoisingTask
from fairchem_scd.fairchem1.data.guarded import Guarded
from fairchem_scd.fairchem1.trainer.step_state import StepState

_ROWS, _SECONDS = 256, 15.0
"""How many rows are read, and for how long. Forces differ much from structure to structure, so they are many."""

_DRAWS = 16
"""How often they are corrupted."""

_PUBLISHED = 2.7
"""Loss of predicting zero, noise over forces, of DeNS's OC20 runs: coefficients 10 and 100, forces in 2.887 eV/Å."""

_FAR = 3.0
"""Where DeNS's ratio is this many times smaller or larger than the published one, a coefficient to try is said."""

_LITTLE = 0.1
"""The same for other tasks below this and above its inverse; no run says what their ratio should be."""


def describe_weights(trainer: Any, report: Report) -> None:
    """Report what a model that predicts zero would lose in forces and in noise, and the share of force labels seen.

    Says nothing where the config trains no forces, or sums their loss in the place of a mean.

    Args:
        trainer: of this package, with training data. Its weights stay as they are.
        report: gets the lines.
    """
    functions = [info["fn"] for output, info in trainer.loss_functions if output == "forces"]
    tasks = [task for task in trainer.tasks.values() if task.settings.prob]
    if not tasks or not functions or any(fn.reduction != "mean" for fn in functions):
        return
    batch = data_list_collater(_rows(trainer.train_loader.dataset), otf_graph=True)
    structures = structures_of(batch)
    forces, seen = forces_of_zero(trainer, batch), 1.0
    free_only = bool(trainer.output_targets["forces"]["train_on_free_atoms"])
    labelled = ~structures.fixed if free_only else torch.ones_like(structures.fixed)
    heading = "weights"
    for task in tasks:
        draws = [task.corrupt(structures, seed=trainer.draw_task.seed, step=k) for k in range(1, _DRAWS + 1)]
        if not any(bool(draw.mask.any()) for draw in draws):
            continue  # that is a problem of its own
        _say_weight(heading, task, noise_of_zero(trainer, task, draws), forces, report)
        heading = ""
        if _replaces_forces(task):
            hidden = [float((draw.mask & labelled).sum()) / max(int(labelled.sum()), 1) for draw in draws]
            seen -= task.settings.prob * sum(hidden) / len(hidden)
    if seen < 1:
        _say_labels(seen, trainer.config["optim"].get("max_epochs", 1), report)


def _rows(dataset: Guarded) -> list[Any]:
    """Good rows, evenly spaced over a dataset; fewer where reading them takes long."""
    last, parts = len(dataset) - 1, max(min(len(dataset), _ROWS) - 1, 1)
    start, rows = time.monotonic(), []
    for index in sorted({k * last // parts for k in range(parts + 1)}):
        row, error = dataset.read(index)
        rows += [row] if error is None else []
        if rows and time.monotonic() - start > _SECONDS:
            break
    return rows


def forces_of_zero(trainer: Any, batch: Any) -> float:
    """The force loss of an ordinary step in which the model predicts zero, as the config has it.

    It is the host's own, with the config's coefficient, normaliser and choice of atoms.

    Args:
        trainer: of this package.
        batch: collated, on the CPU.
    """
    batch = batch.clone().to(trainer.device)
    atoms, structures = len(batch.pos), len(batch.natoms)
    out = {
        name: torch.zeros_like(batch[name].view(atoms if output["level"] == "atom" else structures, -1))
        for name, output in trainer.output_targets.items()
        if name in batch
    }
    trainer.model.train()
    trainer._step = step = StepState()
    trainer._compute_loss(out, batch)
    trainer._step = None
    return float(step.terms["forces_loss"])


def noise_of_zero(trainer: Any, task: DenoisingTask, draws: list[Corruption]) -> float:
    """The noise's loss where the model predicts zero at the start of a run: λ times the mean over corrupted atoms.

    Args:
        trainer: of this package.
        task: one of its tasks.
        draws: corruptions of structures, at least one of which moved an atom.
    """
    objective = task.objective(0.0)
    scale = objective.scale if objective.scale is not None else float(trainer._running_scale(task).scale)
    if _replaces_forces(task):
        fn = next(info["fn"].loss_fn for output, info in trainer.loss_functions if output == "forces")
    else:
        fn = registry.get_loss_class(objective.loss)()
    rows = [draw.mask.nonzero()[:, 0] for draw in draws]
    pairs = zip(draws, rows, strict=True)
    target: Tensor = torch.cat([loss.noise_target(draw, of, scale, draw.noise.device) for draw, of in pairs])
    ranks = loss.Ranks(1, lambda count: count)
    return float(loss.noise_term(fn, torch.zeros_like(target), target, coefficient=objective.coefficient, ranks=ranks))


def _replaces_forces(task: DenoisingTask) -> bool:
    return task.objective(0.0).loss is None


def _say_weight(heading: str, task: DenoisingTask, noise: float, forces: float, report: Report) -> None:
    losses = f"noise of {task.name} {noise:.3g}, forces {forces:.3g}"
    if not forces:  # its coefficient is zero, or all forces are
        report.say(heading, f"loss of predicting zero: {losses}")
        return
    coefficient, ratio = task.objective(0.0).coefficient, noise / forces
    report.say(heading, f"loss of predicting zero: {losses}; ratio {ratio:.2g}")
    if not coefficient:
        return
    if _replaces_forces(task) and not 1 / _FAR < ratio / _PUBLISHED < _FAR:
        same = _short(coefficient * _PUBLISHED / ratio)
        report.say("", f"in the published run on OC20 2M the ratio is about {_PUBLISHED:g}; here coefficient: {same}")
        report.say("", "would make it that. A value to try in a long run, no rule: docs/adding-dens.md")
    elif not _replaces_forces(task) and not _LITTLE <= ratio <= 1 / _LITTLE:
        same = _short(coefficient / ratio)
        report.say("", f"coefficient: {same} would make both the same. A value to try, no rule")


def _say_labels(seen: float, epochs: float, report: Report) -> None:
    report.say("labels", f"{100 * seen:.0f} % of the force labels train; on the other atoms noise does in their place")
    see = "epoch sees" if epochs == 1 else "epochs see"
    if seen > 0.005:
        report.say(
            "",
            f"{epochs:g} {see} as many labels as {epochs * seen:.3g} of plain training. A short run loses by that "
            f"alone: give it {epochs / seen:.3g} epochs, or lower prob",
        )


def _short(value: float) -> str:
    """A number with two digits."""
    return f"{float(f'{value:.2g}'):g}"
