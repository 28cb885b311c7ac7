"""What the condition of a trained model is worth on rows of data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from fairchem.core.datasets import data_list_collater
from torch_geometric.data import Data

from fairchem_scd.commands.embed.asked import device_of
from fairchem_scd.commands.embed.embedding_run import INPUT
from fairchem_scd.commands.embed.embeddings import Weights, batches_of, load_model
from fairchem_scd.commands.embed.sweeps import judged
from fairchem_scd.denoising.condition_judge import ConditionJudge
from fairchem_scd.denoising.condition_report import ConditionReport
from fairchem_scd.denoising.passes import embedding_task
from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1.backbones import adapter_for
from fairchem_scd.fairchem1.data.numbered import Numbered, repeated_name, told_apart
from fairchem_scd.fairchem1.data.rows import check_batch, check_elements, names_of, neighbours_needed

_NAMES = ("sid", "fid", "row_number")


def judge(
    checkpoint: Mapping[str, Any],
    dataset: Any,
    *,
    batch_size: int = 16,
    weights: Weights | None = None,
    device: str | torch.device | None = None,
    limit: int | None = None,
    progress: bool = False,
) -> tuple[ConditionReport, bool]:
    """Judge the condition of a checkpoint as the validation of its run would, on any data.

    The noise is that of validation: that of a structure follows from its name (sid and fid), joined by its row's number
    where rows may share names. The model runs in eval mode and float32.

    Args:
        checkpoint: of this package, with SCD.
        dataset: rows of a host dataset, from `load_split`.
        batch_size, weights, device, limit, progress: as for `embed`.

    Returns:
        What was found, and whether outputs were trained beside SCD.

    Raises:
        ConfigError: the checkpoint makes no condition, the data has not what its task asks for, or there are no two
            structures that can be told from each other.
        DataError: a structure is broken, or has elements beyond the model's table.
    """
    model = load_model(checkpoint, weights)
    task = embedding_task(model)
    if task is None:
        raise ConfigError("--judge: the checkpoint makes no condition c: it was not trained with task.denoising.scd")
    device = device_of(device)
    model.to(device)
    # As in `EmbeddingRun`: neighbours at equal distances are then chosen structure by structure.
    model.backbone.use_pbc_single = not task.subset_settings
    keys = (*INPUT, *_NAMES, *sorted(task.labels - {"tags"}))
    found = ConditionJudge(model, task, model, structures=model.structures_of)
    if not isinstance(dataset, Numbered):
        dataset = told_apart(dataset, repeated_name(dataset))
    size = len(dataset) if limit is None else min(limit, len(dataset))

    def run(sweep: Callable[[Any], None], rows: Sequence[Any], first: int) -> None:
        _run(sweep, rows, keys, task.labels, model, device)

    with torch.no_grad():
        report = judged(found, partial(batches_of, dataset, size, batch_size), run, size=size, progress=progress)
    return report, not model.self_supervised


def _run(
    run: Any, rows: Sequence[Any], keys: Sequence[str], labels: frozenset[str], model: Any, device: torch.device
) -> None:
    limit = adapter_for(model.backbone).max_num_elements
    for row in rows:
        check_batch(row, labels & set(row.keys()), None)
        check_elements(row, limit, "the checkpoint was trained on other data")
    batch = _collated(rows, keys)
    names = names_of(batch)
    batch = batch.to(device)
    with neighbours_needed(model.backbone, lambda: [(names, batch)], "--batch-size"):
        run(batch)


def _collated(rows: Sequence[Any], keys: Sequence[str]) -> Any:
    """Rows as the host's loader makes a batch of them, with no other labels than those that are needed."""
    kept = [key for key in keys if all(key in row and row[key] is not None for row in rows)]
    inputs = [Data(**{key: row[key] for key in kept}) for row in rows]
    for data in inputs:
        if "fixed" not in data:
            data.fixed = torch.zeros(len(data.pos))
    return data_list_collater(inputs, otf_graph=True)
