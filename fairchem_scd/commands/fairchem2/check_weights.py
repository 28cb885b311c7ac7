"""What the noise weighs beside the forces on the data of a fairchem 2.x config, and how many force labels train."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from fairchem.core.common.registry import registry
from fairchem.core.datasets.atomic_data import AtomicData
from fairchem.core.units.mlip_unit.mlip_unit import Task, compute_loss, get_output_masks
from torch import Tensor

from fairchem_scd.commands.check import weighing
from fairchem_scd.commands.check.report import Report
from fairchem_scd.commands.check.weighing import say_weights, spaced_rows
from fairchem_scd.denoising.corruption import Corruption
from fairchem_scd.denoising.tasks import DenoisingTask
from fairchem_scd.fairchem2 import rows
from fairchem_scd.fairchem2.batch import structures_of
from fairchem_scd.fairchem2.unit import DenoisingTrainEvalUnit


def describe_weights(runner: Any, report: Report) -> None:
    """Report what a model that predicts zero would lose in forces and in noise, and the share of force labels seen.

    Says nothing where the config trains no forces, or sums a loss of theirs in the place of a mean.

    Args:
        runner: of the host, with a unit of this package. Its weights stay as they are.
        report: gets the lines.
    """
    unit: DenoisingTrainEvalUnit = runner.train_eval_unit
    tasks = [task for task in unit.setup.tasks.values() if task.settings.prob]
    of_forces = force_tasks(unit)
    if not tasks or not of_forces or any(task.loss_fn.reduction == "sum" for task in of_forces):
        return
    loader, adapter = runner.train_dataloader, unit.model.module.adapter
    check = rows.row_check(unit.tasks, adapter)
    batch = loader.collate_fn(spaced_rows(len(loader.dataset), partial(_row, loader.dataset, check)))
    length, counted = _length(runner)
    say_weights(
        tasks,
        structures_of(batch, adapter.periodic(batch.pbc), unit.tasks),
        labelled=torch.stack([labelled(task, batch) for task in of_forces]).any(dim=0),
        forces=forces_of_zero(unit, batch),
        noise=partial(noise_of_zero, unit, batch),
        seed=unit.draw_task.seed,
        length=length,
        counted=counted,
        report=report,
    )


def force_tasks(unit: DenoisingTrainEvalUnit) -> list[Task]:
    """The host's tasks that train forces: one, or one for each data set."""
    return [task for task in unit.tasks if task.property == "forces"]


def labelled(task: Task, batch: AtomicData) -> Tensor:
    """[N] bool: the atoms whose forces a task of the host's trains."""
    known = get_output_masks(batch, [task])[task.name]
    return known & (batch.fixed == 0) if task.train_on_free_atoms else known


def forces_of_zero(unit: DenoisingTrainEvalUnit, batch: AtomicData) -> float:
    """The force loss of an ordinary step in which the model predicts zero, as the config has it.

    It is the host's own, with the config's coefficient, normaliser and choice of atoms; the sum over the data sets
    where each has a task of its own.

    Args:
        unit: of this package.
        batch: collated, on the CPU.
    """
    tasks, batch = force_tasks(unit), copy.deepcopy(batch).to(_device(unit))
    zeros = {task.name: {task.property: torch.zeros_like(batch.pos)} for task in tasks}
    return float(sum(compute_loss(tasks, zeros, batch).values()))


def noise_of_zero(
    unit: DenoisingTrainEvalUnit, batch: AtomicData, task: DenoisingTask, draws: Sequence[Corruption]
) -> float:
    """The noise's loss where the model predicts zero at the start of a run.

    It is λ times the mean over corrupted atoms, as the loss takes it: where the noise takes the place of forces, as the
    config's force loss does, for each of its tasks over the atoms with a label of it.

    Args:
        unit: of this package.
        batch: the structures, on the CPU.
        task: one of the unit's denoising tasks.
        draws: corruptions of the structures, at least one of which moved an atom.
    """
    objective = task.objective(0.0)
    scale = objective.scale
    if scale is None:
        scale = float(unit.model.module.denoising[task.name].running_scale.scale)
    if not weighing.replaces_forces(task):
        fn = registry.get_loss_class(objective.loss)()
        return weighing.noise_of_zero(fn, draws, scale=scale, coefficient=objective.coefficient)
    target = torch.cat([draw.noise / scale for draw in draws]).to(_device(unit))
    moved, natoms = torch.cat([draw.mask for draw in draws]), batch.natoms.repeat(len(draws)).to(target.device)
    whole = 0.0
    for each in force_tasks(unit):
        fn = copy.copy(each.loss_fn)
        fn.coefficient = objective.coefficient
        known = get_output_masks(batch, [each])[each.name].repeat(len(draws))
        mask = (moved & known).to(target.device)
        whole += float(fn(torch.zeros_like(target), target, mult_mask=mask, natoms=natoms))
    return whole


def _row(dataset: Any, check: Any, index: int) -> AtomicData | None:
    """A row of a loader's dataset; None where it cannot be trained on, also where a guard put another in its place."""
    try:
        row = dataset[index]
        if "bad_data" not in row:  # a guard has checked it already
            check(row)
    except Exception:  # of lmdb, zlib, ase …; whether it ends the run is said elsewhere
        return None
    return None if row.get("bad_data", "") else row


def _length(runner: Any) -> tuple[float, str]:
    """How long the run is, and in what that is counted."""
    steps, epochs = runner.max_steps, runner.max_epochs
    if epochs is not None and (steps is None or epochs * len(runner.train_dataloader) <= steps):
        return epochs, "epoch"
    return steps, "step"


def _device(unit: DenoisingTrainEvalUnit) -> torch.device:
    return next(unit.model.parameters()).device
