"""What the data of a fairchem 2.x config holds, and how far a task moves its atoms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols
from ase.neighborlist import primitive_neighbor_list
from fairchem.core.datasets.atomic_data import AtomicData
from fairchem.core.units.mlip_unit.mlip_unit import Task

from fairchem_scd.commands.check.report import Report
from fairchem_scd.commands.check.rounds import say_condition, say_corruption
from fairchem_scd.commands.fairchem2.embeddings import collated
from fairchem_scd.denoising.config_keys import key_of
from fairchem_scd.denoising.data_faults import with_advice
from fairchem_scd.denoising.tasks import DenoisingTask
from fairchem_scd.errors import DataError
from fairchem_scd.fairchem2.batch import structures_of
from fairchem_scd.fairchem2.rows import guard, row_check
from fairchem_scd.fairchem2.unit import DenoisingTrainEvalUnit

_ROWS = 32
"""Of each split so many are looked at."""

_CUTOFF = 6.0


def describe(split: str, loader: Any, unit: DenoisingTrainEvalUnit, report: Report) -> list[AtomicData]:
    """Report what rows evenly spaced over the data hold, and return them.

    Args:
        split: "train" or "val".
        loader: of the host; its datasets get the guards that they have in training.
        unit: of the run.
        report: gets the lines.

    Raises:
        DataError: a row cannot be trained on, and the run would end there; names it.
    """
    guard(loader, row_check(unit.tasks, unit.model.module.adapter))
    dataset, tasks = loader.dataset, unit.tasks
    indices = np.unique(np.linspace(0, len(dataset) - 1, min(_ROWS, len(dataset))).round().astype(int))
    rows = [dataset[int(index)] for index in indices]
    _say_left_out(split, rows, skip=unit.setup.settings.on_bad_data == "skip", report=report)
    counts = np.array([len(row.pos) for row in rows])
    elements = torch.cat([row.atomic_numbers.view(-1) for row in rows]).long().unique().tolist()
    low, high = int(counts.min()), int(counts.max())
    atoms = f"{low} atoms" if low == high else f"{low} to {high} atoms (median {np.median(counts):g})"
    symbols = " ".join(chemical_symbols[z] for z in elements)
    report.say(split, f"{len(dataset)} structures; in {len(rows)} looked at: {atoms}, elements {symbols}")
    free = 1 - float(torch.cat([row.fixed.view(-1) != 0 for row in rows]).float().mean())
    names = ", ".join(sorted({row.dataset_name for row in rows}))
    report.say("", f"{100 * free:.0f} % of the atoms are free; data sets: {names}")
    labels = [_label(task, rows) for task in tasks]
    report.say("", "labels: " + (", ".join(labels) if labels else "none are used"))
    return rows


def _say_left_out(split: str, rows: Sequence[AtomicData], *, skip: bool, report: Report) -> None:
    found = list(dict.fromkeys(line for row in rows for line in row.get("bad_data", "").splitlines()))
    if found and not skip:
        raise DataError(with_advice(found[0]))
    if found:
        report.caution(f"{split}: {len(found)} of the rows looked at will be left out; the first: {found[0]}")


def _label(task: Task, rows: Sequence[AtomicData]) -> str:
    """The label of a task, which is kept under the task's name: each data set may have names of its own."""
    values = [row[task.name].float() for row in rows if task.name in row]
    if not values:
        return f"{task.name} (absent)"
    flat = torch.cat([v.reshape(-1) for v in values])
    if not bool(flat.isfinite().all()):
        return f"{task.name} (some are not finite: they are left out)"
    if task.property == "forces":
        return f"{task.name} (|F| up to {max(float(v.norm(dim=-1).max()) for v in values):.3g} eV/Å)"
    return f"{task.name} ({float(flat.min()):.4g} to {float(flat.max()):.4g})"


def describe_corruption(
    task: DenoisingTask, rows: Sequence[AtomicData], unit: DenoisingTrainEvalUnit, report: Report
) -> None:
    """Report which atoms a task moves, and how far compared with the distance to their nearest neighbours."""
    batch = collated(rows, without=())
    adapter = unit.model.module.adapter
    structures = structures_of(batch, adapter.periodic(batch.pbc), unit.tasks)
    corruption = task.corrupt(structures, seed=unit.draw_task.seed, step=1)
    key = key_of(task.name)
    if not bool(corruption.mask.any()):
        report.problem(f"{key} moves no atom of the {len(rows)} structures looked at")
        return
    nearest = np.concatenate([nearest_neighbours(row) for row in rows[:8]])
    say_corruption(task.name, key, corruption, nearest, report)
    say_condition(task, key, corruption, report)


def nearest_neighbours(row: AtomicData) -> np.ndarray:
    """[N] distance of each atom of a row to its nearest neighbour, Å; infinite where there is none within 6 Å."""
    cell, pbc = row.cell.view(3, 3).double().numpy(), row.pbc.view(-1).numpy()
    index, distance = primitive_neighbor_list("id", pbc, cell, row.pos.double().numpy(), _CUTOFF)
    nearest = np.full(len(row.pos), np.inf)
    np.minimum.at(nearest, index, distance)
    return nearest
