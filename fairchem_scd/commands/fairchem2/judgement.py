"""What the condition of a trained model of fairchem 2.x is worth on rows of data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from fairchem.core.datasets.atomic_data import AtomicData
from torch import nn

from fairchem_scd.commands.embed.asked import device_of
from fairchem_scd.commands.embed.sweeps import judged
from fairchem_scd.commands.fairchem2 import checkpoints
from fairchem_scd.commands.fairchem2.embeddings import LABELS, batches_of, collated
from fairchem_scd.denoising.condition_report import ConditionReport
from fairchem_scd.denoising.config_keys import block_called
from fairchem_scd.denoising.passes import embedding_task
from fairchem_scd.errors import ConfigError, DataError
from fairchem_scd.fairchem2.judging import judge_of
from fairchem_scd.fairchem2.rows import check_row
from fairchem_scd.fairchem2.setup import KEY


@block_called(KEY)
def judge(
    stored: checkpoints.Stored,
    dataset: Any,
    *,
    batch_size: int = 16,
    weights: checkpoints.Weights | None = None,
    device: str | torch.device | None = None,
    limit: int | None = None,
    progress: bool = False,
) -> tuple[ConditionReport, bool]:
    """Judge the condition of a checkpoint as the validation of its run would, on any data.

    The noise is that of validation: that of a structure follows from its elements, positions and cell. The model runs
    in eval mode and float32.

    Args:
        stored: a training checkpoint of a run with SCD, from `checkpoints.read`.
        dataset: rows of the host, from `load_split`.
        batch_size, weights, device, limit, progress: as for `embed`.

    Returns:
        What was found, and whether outputs were trained beside SCD.

    Raises:
        ConfigError: the checkpoint makes no condition, the data has not what its task asks for, or there are no two
            structures that can be told from each other.
        DataError: a structure cannot be read, is broken, or has elements beyond the model's table.
    """
    model = checkpoints.build(stored, weights)
    task = embedding_task(model)
    if task is None:
        why = "name the folder that the inference checkpoint lies in" if stored.plain else "its run had no scd"
        raise ConfigError(f"--judge: the checkpoint makes no condition c: {why}")
    model.output_heads = nn.ModuleDict()
    device = device_of(device)
    model.to(device)
    found = judge_of(model, task, ())  # `_batch` calls forces by that name
    size = len(dataset) if limit is None else min(limit, len(dataset))

    def run(sweep: Callable[[AtomicData], None], rows: Sequence[AtomicData], first: int) -> None:
        sweep(_batch(rows, first, stored, task.labels, model.backbone.max_num_elements).to(device))

    report = judged(found, partial(batches_of, dataset, size, batch_size), run, size=size, progress=progress)
    return report, stored.supervised


def _batch(
    rows: Sequence[AtomicData], first: int, stored: checkpoints.Stored, labels: frozenset[str], max_num_elements: int
) -> AtomicData:
    """Rows as a batch, with forces under that name where the task asks for them; the number of the first is given."""
    names = [task.name for task in stored.tasks if task.property == "forces"]
    for number, row in enumerate(rows, first):
        try:
            check_row(row, (), max_num_elements)
        except DataError as error:
            raise DataError(f"structure {number}: {error}") from error
        own = next((name for name in names if name in row), None)
        if own is not None:
            row.forces = row[own].clone()
    return collated(rows, [label for label in LABELS if label not in labels])
