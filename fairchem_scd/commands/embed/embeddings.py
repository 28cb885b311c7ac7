"""Embeddings of structures by a trained model: its last l = 0 features, and SCD's c."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from ase.data import chemical_symbols
from ase.symbols import Symbols
from fairchem.core.common.utils import setup_imports
from fairchem.core.datasets import data_list_collater
from torch import Tensor, nn
from torch_geometric.data import Data
from tqdm import tqdm

from fairchem_scd.commands.embed.table import Embeddings
from fairchem_scd.denoising.hooks import hooked
from fairchem_scd.denoising.passes import embedding_task
from fairchem_scd.denoising.structures import identities
from fairchem_scd.errors import ConfigError, DataError
from fairchem_scd.fairchem1.backbones import Adapter, adapter_for
from fairchem_scd.fairchem1.checkpoint import build, inference_weights, read
from fairchem_scd.fairchem1.data.rows import check_batch, neighbours_needed
from fairchem_scd.fairchem1.data.split import read_row
from fairchem_scd.fairchem1.hydra import DenoisingHydra

Kind = Literal["auto", "features", "condition", "both"]

_INPUT = ("pos", "cell", "pbc", "natoms", "atomic_numbers", "tags", "fixed")
_ENERGY = ("energy", "y")  # the second is its name in OC20's own files


def embed(
    checkpoint: str | Path | Mapping[str, Any],
    dataset: Any,
    *,
    kind: Kind = "auto",
    pool: Literal["mean", "sum"] = "mean",
    per_atom: bool = False,
    batch_size: int = 16,
    weights: Literal["ema", "raw"] | None = None,
    device: str | torch.device | None = None,
    limit: int | None = None,
    progress: bool = False,
    about: Mapping[str, Any] | None = None,
) -> Embeddings:
    """Embed structures as they are: no noise, no condition, no labels needed.

    The model runs in eval mode and float32. What differs from one run to the next in the host, the random frames about
    edges, is drawn alike in each.

    Args:
        checkpoint: of this package, pre-trained or supervised, or of the plain host with a backbone this package knows.
        dataset: rows of a host dataset, in the order wanted; `load_split` makes one of a config.
        kind: "features", the l = 0 features [B, C] that the model's heads read, pooled over atoms; "condition", SCD's
            c [B, C]; "both"; "auto": the features, and c where the model makes one.
        pool: the features' mean or their sum over a structure's atoms.
        per_atom: the atoms' own features [N, C] too.
        batch_size: structures at a time, which changes nothing but time and memory. One by one where c is of a part.
        weights: "ema", the moving average; "raw"; None: the average where the checkpoint has one.
        device: where to run; None: the first GPU if there is one.
        limit: the first so many structures only.
        progress: show it on stderr.
        about: what to note with the embeddings besides.

    Raises:
        ConfigError: the checkpoint does not have what was asked for, or its backbone no adapter.
        DataError: a structure cannot be read, is broken, or has elements beyond the model's table.
    """
    if per_atom and kind == "condition":
        raise ConfigError("c belongs to a structure, not to its atoms: per-atom needs the features or both")
    source = read(checkpoint) if isinstance(checkpoint, (str, Path)) else checkpoint
    model = load_model(source, weights)
    device = _device(device)
    task = embedding_task(model)
    has_condition = task is not None
    if kind in ("condition", "both") and not has_condition:
        raise ConfigError(
            "the checkpoint makes no condition c: it was not trained with task.denoising.scd; its features are there"
        )
    conditioned = kind in ("condition", "both") or (kind == "auto" and has_condition)
    of_subset = conditioned and task.embeds_subset
    run = _Run(model.to(device), device, condition=conditioned, of_subset=of_subset)
    size = len(dataset) if limit is None else min(limit, len(dataset))
    if size == 0:
        raise ConfigError("there are no structures to embed")

    records = []
    with tqdm(total=size, desc="embedding", unit=" structures", disable=not progress) as bar:
        for rows in _batches(dataset, size, 1 if of_subset else batch_size):
            for row, scalars, c in run(rows):
                made = {} if c is None else {"condition": c}
                if kind != "condition":
                    made["features"] = scalars.mean(dim=0) if pool == "mean" else scalars.sum(dim=0)
                if per_atom:
                    made["atom_features"] = scalars
                described = {"sid": len(records), **_described(row, per_atom)}
                records.append({**described, **{key: value.numpy() for key, value in made.items()}})
            bar.update(len(rows))
    used = weights or ("ema" if source.get("ema") is not None else "as stored")
    return Embeddings.of(records, {**(about or {}), "weights": used, "pool": pool})


def load_model(checkpoint: Mapping[str, Any], weights: Literal["ema", "raw"] | None = None) -> DenoisingHydra:
    """The model of a checkpoint, without its heads, in eval mode and without gradients.

    Raises:
        ConfigError: its backbone has no adapter, its weights are not those of its config, or the checkpoint that it
            was fine-tuned from, which alone says what its backbone is, is not there.
    """
    setup_imports()  # backbones and heads by name
    checkpoint = _with_model_block(checkpoint)
    if any(".force_embedding." in key for key in checkpoint["state_dict"]):
        raise ConfigError(
            "the checkpoint is of another DeNS code: `fairchem-scd import` makes it one of this package's first"
        )
    model = build(checkpoint)
    chosen = inference_weights(checkpoint, weights, model=model)
    model.load_state_dict(chosen)
    model.output_heads = nn.ModuleDict()  # only after the average, a list by position over all parameters, was read
    return model.requires_grad_(False).eval()


def _with_model_block(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    config = checkpoint["config"]
    if not isinstance(config.get("model"), str):
        return checkpoint
    # Before fairchem 1.0: the name alone, and its arguments beside it.
    block = {"name": config["model"], **(config.get("model_attributes") or {})}
    return {**checkpoint, "config": {**config, "model": block}}


def _device(name: str | torch.device | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


# --- a batch ----------------------------------------------------------------------------------------------------------


def _batches(dataset: Any, size: int, batch_size: int) -> Iterator[list[Any]]:
    for start in range(0, size, batch_size):
        yield [read_row(dataset, i) for i in range(start, min(start + batch_size, size))]


class _Run:
    """The model over one batch of rows after the other."""

    def __init__(self, model: DenoisingHydra, device: torch.device, *, condition: bool, of_subset: bool) -> None:
        self.model, self.device, self.condition = model, device, condition
        self.adapter: Adapter = adapter_for(model.backbone)
        self.elements = self.adapter.max_num_elements
        # A graph for each structure by itself: in one of several, max_neighbors chooses otherwise among neighbours at
        # equal distances. What the host takes structures out of for that is not a batch of parts.
        model.backbone.use_pbc_single = not of_subset

    def __call__(self, rows: Sequence[Any]) -> Iterator[tuple[Any, Tensor, Tensor | None]]:
        """Each row with the features [n, C] of its n atoms and its c [C]; float32, on the CPU."""
        for row in rows:
            _check_row(row, self.elements)
        batch = _collated(rows).to(self.device)
        seen = [([_named(row) for row in rows], batch)]
        try:
            with neighbours_needed(self.model.backbone, lambda: seen, "--batch-size"):
                scalars, condition = self._forward(batch)
        except torch.cuda.OutOfMemoryError as error:
            raise ConfigError(f"out of memory with {len(rows)} structures at a time; lower --batch-size") from error
        for i, (row, own) in enumerate(zip(rows, scalars.split([len(row.pos) for row in rows]), strict=True)):
            if not bool(own.isfinite().all()):
                raise DataError(f"{_named(row)}: its features are not finite")
            yield row, own, None if condition is None else condition[i]

    def _forward(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        returned: list[Any] = []
        note = self.model.backbone.register_forward_hook(lambda module, args, out: returned.append(out))
        devices = [self.device] if self.device.type == "cuda" else []
        condition = None
        with torch.no_grad(), torch.random.fork_rng(devices), hooked(note):
            torch.manual_seed(0)
            if self.condition:
                condition = self.model.embed(batch).float().cpu()
            # c of all atoms comes from the pass that the features come from; c of a part does not.
            if not returned or len(self.adapter.scalars(returned[-1])) != len(batch.pos):
                self.model.features(batch)
        # The host switches gradients on inside some backbones.
        return self.adapter.scalars(returned[-1]).detach().float().cpu(), condition


def _collated(rows: Sequence[Any]) -> Any:
    keys = [key for key in _INPUT if all(_has(row, key) for row in rows)]
    inputs = [Data(**{key: row[key] for key in keys}) for row in rows]
    for data in inputs:
        if "fixed" not in data:  # embeddings do not depend on it
            data.fixed = torch.zeros(len(data.pos))
    return data_list_collater(inputs, otf_graph=True)


def _check_row(row: Any, elements: int | None) -> None:
    check_batch(row, (), None)
    numbers = row.atomic_numbers.long()
    if elements is not None and int(numbers.max()) >= elements:
        highest = int(numbers.max())
        raise DataError(
            f"{_named(row)}: element {chemical_symbols[highest]} ({highest}) is beyond what the checkpoint knows "
            f"(up to {chemical_symbols[elements - 1]}, {elements - 1}): it was trained on other data"
        )


def _named(row: Any) -> str:
    names = identities(row)
    return f"structure sid/fid {names[0]}" if names else "a structure without sid"


def _described(row: Any, per_atom: bool) -> dict[str, Any]:
    """What the data says of a structure; None where it does not."""
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
