"""The files in configs/: what is in them, and a run of each that is small enough to train here."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch

from fairchem_scd.denoising.tasks import build_tasks
from fairchem_scd.fairchem1.dens_aliases import denoising_block
from fairchem_scd.fairchem1.legacy import to_hydra
from fairchem_scd.testing import make_trainer
from tests.support.configs import CONFIGS, host_config
from tests.support.models import BACKBONES, ESEN


def load(name: str) -> dict[str, Any]:
    """A file by its name without the ending."""
    return host_config(CONFIGS / f"{name}.yml")


def settings_of(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of each task of a config, as the trainer parses them."""
    _, dens = to_hydra(config["model"])
    tasks, _ = build_tasks(denoising_block(config.get("task", {}), config["optim"], dens))
    return {name: task.settings.model_dump() for name, task in tasks.items()}


def count(parameters: Iterable[torch.Tensor]) -> int:
    """How many numbers they hold."""
    return sum(p.numel() for p in parameters)


def lmdb_of(folder: Path, rows: list[Any], **labels: Any) -> str:
    """An LMDB as the host's own OC20 and OC22 data are: labels `y` and `force`, sizes in `metadata.npz`."""
    folder.mkdir(parents=True)
    with lmdb.open(str(folder / "data.0000.lmdb"), map_size=2**24, subdir=False) as db, db.begin(write=True) as writer:
        for index, row in enumerate(rows):
            row = copy.deepcopy(row)
            row.y, row.force = row.energy, row.forces
            del row.energy, row.forces
            for key, value in labels.items():
                row[key] = value
            writer.put(f"{index}".encode("ascii"), pickle.dumps(row))
    np.savez(folder / "metadata.npz", natoms=np.array([row.natoms for row in rows]))
    return str(folder)


def small(config: dict[str, Any], train: dict[str, Any], val: dict[str, Any]) -> dict[str, Any]:
    """The config with one block's worth of a model, on eight structures of sample data, for two steps that denoise."""
    config = copy.deepcopy(config)
    model = config["model"]
    if "finetune_config" not in model:  # whose model comes with the checkpoint
        backbone = model.get("backbone", model)
        name = backbone.get("model") or backbone["name"]
        sizes = ESEN if "esen" in name else BACKBONES["escn" if "escn" in name else "equiformer_v2"]
        keys = ("num_heads", "lmax", "mmax", "lmax_list", "mmax_list", "num_layers")
        backbone.update({k: size for k, size in sizes.items() if k.endswith("channels") or k in keys})
    dataset = config["dataset"]
    dataset["train"].update(train)
    dataset["val"].update(val)
    dataset["val"].pop("sample_n", None)
    config["optim"].update(batch_size=4, eval_batch_size=4, num_workers=0, max_epochs=1, eval_every=2)
    if list(config["task"].get("denoising", {})) == ["dens"]:
        config["task"]["denoising"]["dens"]["prob"] = 1.0
    return config


def sample_data(data: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train and val blocks that stand in for OC20's."""
    return (
        {"format": "emt_slabs", "src": str(data / "configs/train"), "num_structures": 8, "num_systems": 6},
        {"format": "emt_slabs", "src": str(data / "configs/val"), "num_structures": 4, "num_systems": 3, "seed": 1},
    )


def train(config: dict[str, Any], run_dir: Path, **arguments: Any) -> tuple[Any, list[tuple[Any, Any, float]]]:
    """Train by a trainer with these arguments; return the trainer, and of each step its batch, corruption and loss."""
    trainer = make_trainer(config, run_dir, **arguments)
    steps, host_loss = [], trainer._compute_loss

    def noted(out: Any, batch: Any) -> torch.Tensor:
        loss = host_loss(out, batch)
        if trainer.model.training:
            steps.append((batch, getattr(trainer._step, "corruption", None), float(loss)))
        return loss

    trainer._compute_loss = noted
    trainer.train()
    assert len(steps) == 2
    assert all(math.isfinite(loss) for _, _, loss in steps)
    for name in ("checkpoint.pt", "best_checkpoint.pt"):
        assert (run_dir / "checkpoints" / trainer.timestamp_id / name).is_file()
    return trainer, steps


def oc22_data(folder: Path, rows: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train and val blocks of OC22's own format, with a file of linear references."""
    np.savez(folder / "references.npz", coeff=np.linspace(-1, 1, 119))
    train = {"src": lmdb_of(folder / "train", rows, nads=1, oc22=1)}
    return train, {"src": lmdb_of(folder / "val", rows[:4], nads=1, oc22=1)}
