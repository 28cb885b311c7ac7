"""Embeddings of structures by a trained model: its last l = 0 features, and SCD's c."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from ase.symbols import Symbols
from fairchem.core.common.utils import setup_imports
from torch import nn
from tqdm import tqdm

from fairchem_scd.commands.embed.asked import Kind, Pool, check_kind, device_of, vectors
from fairchem_scd.commands.embed.embedding_run import EmbeddingRun
from fairchem_scd.commands.embed.table import Embeddings
from fairchem_scd.denoising.passes import embedding_task
from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1.checkpoint import StoredRun, read
from fairchem_scd.fairchem1.data.split import read_row
from fairchem_scd.fairchem1.hydra import DenoisingHydra

Weights = Literal["ema", "raw"]

_ENERGY = ("energy", "y")  # the second is its name in OC20's own files


def embed(
    checkpoint: str | Path | Mapping[str, Any],
    dataset: Any,
    *,
    kind: Kind = "auto",
    pool: Pool = "mean",
    per_atom: bool = False,
    batch_size: int = 16,
    weights: Weights | None = None,
    device: str | torch.device | None = None,
    limit: int | None = None,
    progress: bool = False,
    about: Mapping[str, Any] | None = None,
) -> Embeddings:
    """Embed structures as they are, without noise and condition. They need no labels.

    The model runs in eval mode and float32. The host's frames about edges are random; they are drawn from the same
    seed at every call.

    Args:
        checkpoint: of this package, pre-trained or supervised, or of the plain host with a backbone this package knows.
        dataset: rows of a host dataset, in the order wanted; `load_split` makes one of a config.
        kind: "features", the l = 0 features [B, C] that the model's heads read, pooled over atoms; "condition", SCD's
            c [B, C]; "both"; "auto": the features, and c where the model makes one.
        pool: the features' mean or their sum over a structure's atoms.
        per_atom: add the features [N, C] of each atom.
        batch_size: structures at a time: a matter of time and memory alone. It is 1 where c is of some atoms only.
        weights: "ema", the moving average; "raw"; None: the average where the checkpoint has one.
        device: where to run; None: the first GPU if there is one.
        limit: embed only so many structures, the first ones.
        progress: show a progress bar on stderr.
        about: further entries for the embeddings' `about`.

    Raises:
        ConfigError: the checkpoint does not have what was asked for, or its backbone no adapter.
        DataError: a structure cannot be read, is broken, or has elements beyond the model's table.
    """
    check_kind(kind, per_atom)
    run = StoredRun(read(checkpoint) if isinstance(checkpoint, (str, Path)) else checkpoint)
    model = _loaded(run, weights)
    conditioned, of_subset = _condition(model, kind)
    size = len(dataset) if limit is None else min(limit, len(dataset))
    if size == 0:
        raise ConfigError("there are no structures to embed")
    embedding_run = EmbeddingRun(model, device_of(device), condition=conditioned, of_subset=of_subset)

    records: list[dict[str, Any]] = []
    with tqdm(total=size, desc="embedding", unit=" structures", disable=not progress) as bar:
        for rows in batches_of(dataset, size, 1 if of_subset else batch_size):
            for row, scalars, c in embedding_run(rows):
                made = vectors(scalars, c, kind, pool, per_atom)
                records.append({"sid": len(records), **_described(row, per_atom), **made})
            bar.update(len(rows))
    used = weights or ("ema" if run.checkpoint.get("ema") is not None else "as stored")
    return Embeddings.of(records, {**(about or {}), "weights": used, "pool": pool})


def load_model(checkpoint: Mapping[str, Any], weights: Weights | None = None) -> DenoisingHydra:
    """The model of a checkpoint, without its heads, in eval mode and without gradients.

    Raises:
        ConfigError: its backbone has no adapter, its weights are not those of its config, or the checkpoint that it
            was fine-tuned from, which alone says what its backbone is, is not there.
    """
    return _loaded(StoredRun(checkpoint), weights)


def _loaded(run: StoredRun, weights: Weights | None) -> DenoisingHydra:
    setup_imports()  # backbones and heads by name
    if any(".force_embedding." in key for key in run.checkpoint["state_dict"]):
        raise ConfigError(
            "the checkpoint is of another DeNS code: `fairchem-scd import` makes it one of this package's first"
        )
    model = run.build()
    model.load_state_dict(run.inference_weights(weights, model))
    # Not before: the average is a list by position over the parameters of the whole model.
    model.output_heads = nn.ModuleDict()
    return model.requires_grad_(False).eval()


def _condition(model: DenoisingHydra, kind: Kind) -> tuple[bool, bool]:
    """Whether to make c, and whether it is then of some of a structure's atoms only."""
    task = embedding_task(model)
    if kind in ("condition", "both") and task is None:
        raise ConfigError(
            "the checkpoint makes no condition c: it was not trained with task.denoising.scd; its features are there"
        )
    conditioned = task is not None and kind != "features"
    return conditioned, conditioned and task.embeds_subset


def batches_of(dataset: Any, size: int, batch_size: int) -> Iterator[list[Any]]:
    """The first `size` rows of a host dataset, so many at a time."""
    for start in range(0, size, batch_size):
        yield [read_row(dataset, i) for i in range(start, min(start + batch_size, size))]


def _described(row: Any, per_atom: bool) -> dict[str, Any]:
    """What the data says of a structure, by the names of `Embeddings`; None where it says nothing."""
    numbers = row.atomic_numbers.long().numpy()
    tags = row.tags.view(-1).long().numpy() if _has(row, "tags") else None
    energies = [_value(row, key) for key in _ENERGY]
    described = {
        **({"sid": _value(row, "sid")} if _has(row, "sid") else {}),
        "fid": _value(row, "fid"),
        "natoms": len(numbers),
        "formula": Symbols(numbers).get_chemical_formula(),
        "adsorbate": None if tags is None else Symbols(numbers[tags == 2]).get_chemical_formula(),
        "energy": next((value for value in energies if value is not None), None),
    }
    return {**described, "atomic_numbers": numbers, "tags": tags} if per_atom else described


def _has(row: Any, key: str) -> bool:
    return key in row and row[key] is not None


def _value(row: Any, key: str) -> int | float | str | None:
    value = row[key] if _has(row, key) else None
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    return value.item() if hasattr(value, "item") else value
