"""What the data holds, and how far a task moves its atoms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols
from fairchem.core.datasets import data_list_collater

from fairchem_scd.commands.check.report import Report
from fairchem_scd.commands.check.rounds import say_condition, say_corruption
from fairchem_scd.denoising.config_keys import key_of
from fairchem_scd.denoising.structures import structures_of
from fairchem_scd.denoising.tasks import DenoisingTask
from fairchem_scd.fairchem1.data.distances import neighbours
from fairchem_scd.fairchem1.data.guarded import Guarded
from fairchem_scd.fairchem1.data.sources import check_source

_CUTOFF = 6.0


def check_sources(config: Mapping[str, Any], report: Report) -> None:
    """Report a problem for each split whose data is not there."""
    blocks = config.get("dataset")
    if not isinstance(blocks, Mapping) or not blocks.get("train"):
        report.problem("dataset.train: missing; it names the data to train on")
        return
    for split, block in blocks.items():
        if isinstance(block, Mapping):
            with report.part(f"dataset.{split}"):
                check_source(f"dataset.{split}", block, blocks["train"])


def describe(split: str, dataset: Guarded, outputs: Sequence[str], *, skip: bool, report: Report) -> list[Any]:
    """Report what rows evenly spaced over a dataset hold, and return them.

    Args:
        split: its key in the config.
        dataset: of a trainer's loader.
        outputs: names of the config's outputs.
        skip: leave bad rows out.
        report: gets the lines.
    """
    rows = dataset.sample(skip=skip)
    counts = np.array([int(row.natoms) for row in rows])
    elements = torch.cat([row.atomic_numbers.view(-1) for row in rows]).long().unique().tolist()
    report.say(
        split,
        f"{len(dataset)} structures; in {len(rows)} looked at: {_range(counts)}, "
        f"elements {' '.join(chemical_symbols[z] for z in elements)}",
    )
    free = [1 - float((row.fixed.view(-1) != 0).float().mean()) for row in rows if "fixed" in row]
    tags = torch.cat([row.tags.view(-1) for row in rows if "tags" in row] or [torch.tensor([])]).unique().tolist()
    marks = [f"{100 * float(np.mean(free)):.0f} % of the atoms are free"] if free else []
    marks += [f"tags {', '.join(f'{tag:g}' for tag in tags)}" if tags else "no tags"]
    report.say("", "; ".join(marks))
    labels = [_label(name, rows) for name in outputs]
    report.say("", "labels: " + (", ".join(labels) if labels else "none are used"))
    return rows


def _label(name: str, rows: list[Any]) -> str:
    values = [torch.as_tensor(row[name]).float() for row in rows if name in row]
    if not values:
        return f"{name} (absent)"
    if name == "forces":
        return f"forces (|F| up to {max(float(v.norm(dim=-1).max()) for v in values):.3g} eV/Å)"
    flat = torch.cat([v.reshape(-1) for v in values])
    return f"{name} ({float(flat.min()):.4g} to {float(flat.max()):.4g})"


def _range(counts: np.ndarray) -> str:
    low, high = int(counts.min()), int(counts.max())
    return f"{low} atoms" if low == high else f"{low} to {high} atoms (median {np.median(counts):g})"


def describe_corruption(task: DenoisingTask, rows: list[Any], seed: int, report: Report) -> None:
    """Report which atoms a task moves, and how far compared with the distance to their nearest neighbours."""
    batch = data_list_collater(rows, otf_graph=True)
    corruption = task.corrupt(structures_of(batch), seed=seed, step=1)
    key = key_of(task.name)
    if not bool(corruption.mask.any()):
        report.problem(f"{key} moves no atom of the {len(rows)} structures looked at")
        return
    nearest = np.concatenate([nearest_neighbours(row) for row in rows[:8]])
    say_corruption(task.name, key, corruption, nearest, report)
    say_condition(task, key, corruption, report)


def nearest_neighbours(row: Any) -> np.ndarray:
    """[N] distance of each atom of a row to its nearest neighbour, Å; infinite where there is none within 6 Å."""
    index, distance = neighbours(row, _CUTOFF)
    nearest = np.full(len(row.pos), np.inf)
    np.minimum.at(nearest, index, distance)
    return nearest
