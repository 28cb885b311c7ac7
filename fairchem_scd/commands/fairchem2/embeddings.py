"""Embeddings of structures by a model of fairchem 2.x: its last l = 0 features, and SCD's c."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import torch
from ase.symbols import Symbols
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from fairchem_scd.commands.embed.asked import Kind, Pool, check_kind, device_of, vectors
from fairchem_scd.commands.embed.table import Embeddings
from fairchem_scd.commands.fairchem2 import checkpoints
from fairchem_scd.commands.fairchem2.config_file import read_config
from fairchem_scd.denoising.passes import atom_features, embedding_task
from fairchem_scd.denoising.passes import embed as condition_of
from fairchem_scd.errors import ConfigError, DataError, first_line
from fairchem_scd.fairchem2.batch import structures_of
from fairchem_scd.fairchem2.model import DenoisingHydra

LOADERS = {"train": "train_dataloader", "val": "eval_dataloader"}
"""Where the data of a split stands below `runner` in a config."""

LABELS = ("energy", "forces", "stress", "energy_relaxed")


def load_split(config: str | Path | DictConfig, split: str) -> Any:
    """The data of one loader of a config, each structure once and in the data's order.

    Args:
        config: a training config.
        split: a key of `LOADERS`.

    Raises:
        ConfigError: the config has no such data, or it cannot be opened.
    """
    if split not in LOADERS:
        raise ConfigError(f"--split {split}: a config of fairchem 2.x has {' and '.join(LOADERS)}")
    config = config if isinstance(config, DictConfig) else read_config(config)
    key = f"runner.{LOADERS[split]}.dataset"
    dataset = OmegaConf.select(config, key)
    if not isinstance(dataset, DictConfig):
        raise ConfigError(f"{key} is missing, so there are no structures for --split {split}")
    dataset = OmegaConf.to_container(dataset, resolve=True)
    names = []
    for name, described in sorted((dataset.get("dataset_configs") or {}).items()):
        if not {"first_n", "sample_n"} & set(described):
            described["no_shuffle"] = True
        names += [f"{name}.{part}" for part in described.get("splits", ())]
    if names:  # otherwise the host repeats small data sets beside large ones
        dataset["combined_dataset_config"] = {"sampling": {"type": "explicit", "ratios": dict.fromkeys(names, 1.0)}}
    try:
        return hydra.utils.instantiate(OmegaConf.create(dataset))
    except Exception as error:
        raise ConfigError(f"{key}: cannot be opened ({first_line(_cause(error))})") from error


def embed(
    checkpoint: str | Path | checkpoints.Stored,
    dataset: Any,
    *,
    kind: Kind = "auto",
    pool: Pool = "mean",
    per_atom: bool = False,
    batch_size: int = 16,
    weights: checkpoints.Weights | None = None,
    device: str | torch.device | None = None,
    limit: int | None = None,
    progress: bool = False,
    about: Mapping[str, Any] | None = None,
) -> Embeddings:
    """Embed structures as they are, without noise and condition. They need no labels.

    The model runs in eval mode and float32. The host's frames about edges are random; they are drawn from the same
    seed at every call.

    Args:
        checkpoint: a training checkpoint (a folder) or an inference checkpoint, of this package or of the plain host;
            or what `checkpoints.read` made of it.
        dataset: rows of the host, in the order wanted; `load_split` makes one of a config.
        kind: "features", the l = 0 features [B, C] that the model's heads read, pooled over atoms; "condition", SCD's
            c [B, C], of which only a training checkpoint has the weights; "both"; "auto": the features, and c where
            the checkpoint has it.
        pool: the features' mean or their sum over a structure's atoms.
        per_atom: keep the features of each atom too.
        batch_size: structures at a time.
        weights: "ema", the moving average; "raw"; None: the average where there is one.
        device: where to run; None: a GPU if there is one.
        limit: embed the first so many structures only.
        progress: show a progress bar on stderr.
        about: further entries for the embeddings' `about`.

    Raises:
        ConfigError: the checkpoint does not have what was asked for, or its backbone no adapter.
        DataError: a structure cannot be read or has features that are not finite.
    """
    check_kind(kind, per_atom)
    stored = checkpoint if isinstance(checkpoint, checkpoints.Stored) else checkpoints.read(checkpoint)
    model = checkpoints.build(stored, weights)
    conditioned = _conditioned(model, kind, stored)
    model.output_heads = nn.ModuleDict()
    model.to(device_of(device))
    size = len(dataset) if limit is None else min(limit, len(dataset))
    if size == 0:
        raise ConfigError("there are no structures to embed")

    records: list[dict[str, Any]] = []
    with tqdm(total=size, desc="embedding", unit=" structures", disable=not progress) as bar:
        for rows in batches_of(dataset, size, batch_size):
            for row, scalars, c in _embedded(model, rows, conditioned, len(records)):
                made = vectors(scalars, c, kind, pool, per_atom)
                records.append({"sid": len(records), **_described(row, per_atom), **made})
            bar.update(len(rows))
    used = weights or ("ema" if stored.average is not None else "raw")
    return Embeddings.of(records, {**(about or {}), "weights": used, "pool": pool})


def _conditioned(model: DenoisingHydra, kind: Kind, stored: checkpoints.Stored) -> bool:
    """Whether to make c."""
    has = embedding_task(model) is not None
    if kind in ("condition", "both") and not has:
        raise ConfigError(
            "the checkpoint makes no condition c: "
            + (
                "an inference checkpoint is without the weights for it; name the folder that the file lies in"
                if stored.plain
                else "its run had no scd; its features are there"
            )
        )
    return has and kind != "features"


def batches_of(dataset: Any, size: int, batch_size: int) -> Iterator[list[AtomicData]]:
    """The first `size` rows of a dataset of the host, so many at a time. DataError: one cannot be read."""
    for start in range(0, size, batch_size):
        yield [_row(dataset, index) for index in range(start, min(start + batch_size, size))]


def _row(dataset: Any, index: int) -> AtomicData:
    try:
        return dataset[index]
    except Exception as error:
        raise DataError(f"structure {index}: cannot be read ({first_line(error)})") from error


def _embedded(
    model: DenoisingHydra, rows: Sequence[AtomicData], conditioned: bool, first: int
) -> Iterator[tuple[AtomicData, Tensor, Tensor | None]]:
    """Each row with the features [n, C] of its n atoms and its c [C] or None; float32, on the CPU."""
    device = next(model.parameters()).device
    condition = None
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            if conditioned:
                torch.manual_seed(0)
                batch = collated(rows).to(device)
                structures = structures_of(batch, model.adapter.periodic(batch.pbc), ())
                condition = condition_of(model, batch, structures).float().cpu()
            # The backbone writes into its batch: each call gets its own.
            torch.manual_seed(0)
            scalars = atom_features(model, collated(rows).to(device), model.adapter).detach().float().cpu()
    except torch.cuda.OutOfMemoryError as error:
        raise ConfigError(f"out of memory with {len(rows)} structures at a time; lower --batch-size") from error
    for i, (row, own) in enumerate(zip(rows, scalars.split([len(row.pos) for row in rows]), strict=True)):
        if not bool(own.isfinite().all()):
            raise DataError(f"structure {first + i}: its features are not finite")
        yield row, own, None if condition is None else condition[i]


def collated(rows: Sequence[AtomicData], without: Sequence[str] = LABELS) -> AtomicData:
    """Some rows as a batch, without labels and without what only some of them have."""
    common = set.intersection(*(set(row.keys()) for row in rows)) - set(without)
    inputs = []
    for row in rows:
        own = copy.deepcopy(row)
        for key in set(own.keys()) - common:
            del own[key]
        inputs.append(own)
    return atomicdata_list_to_batch(inputs)


def _described(row: AtomicData, per_atom: bool) -> dict[str, Any]:
    """What the data says of a structure, by the names of `Embeddings`; None where it says nothing."""
    numbers, tags = row.atomic_numbers.long().numpy(), row.tags.view(-1).long().numpy()
    sid = row.sid[0] if row.sid else ""
    energy = float(row.energy.view(-1)[0]) if "energy" in row else None
    described = {
        **({"sid": sid} if sid else {}),
        "natoms": len(numbers),
        "formula": Symbols(numbers).get_chemical_formula(),
        "adsorbate": Symbols(numbers[tags == 2]).get_chemical_formula(),
        "energy": energy,
    }
    return {**described, "atomic_numbers": numbers, "tags": tags} if per_atom else described


def _cause(error: BaseException) -> BaseException:
    """What Hydra's error about an object was raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
