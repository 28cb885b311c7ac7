"""What claims and tests share: sample structures, configs, trainers, ranks, plans, gradients."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from ase import Atoms
from fairchem.core.common.registry import registry
from fairchem.core.datasets import data_list_collater
from fairchem.core.models.base import HydraModel
from fairchem.core.preprocessing import AtomsToGraphs
from torch import Tensor

import fairchem_scd.fairchem1.plugin  # noqa: F401  (registers everything with the host)
from fairchem_scd.denoising.corruption import Corruption
from fairchem_scd.denoising.plan import VALIDATION, Plan
from fairchem_scd.denoising.structures import structures_of
from fairchem_scd.denoising.tasks import build_tasks
from fairchem_scd.fairchem1.data.emt_slabs import emt_slabs
from fairchem_scd.fairchem1.hydra import DenoisingHydra

SCD = {"scd": {}}
BOTH = {"scd": {"prob": 0.5}, "noisy_nodes": {"prob": 0.5}}


def slabs(count: int, seed: int = 0, systems: int = 6) -> list[Any]:
    """Labelled sample structures, as rows of a dataset whose labels have their final names."""
    converter = AtomsToGraphs(r_energy=True, r_forces=True, r_edges=False, r_pbc=True)
    rows = []
    for atoms, sid, fid in emt_slabs(count, seed, systems):
        row = converter.convert(atoms)
        row.sid, row.fid, row.natoms = sid, fid, len(atoms)
        rows.append(row)
    return rows


def crystal(repeats: tuple[int, int, int] = (1, 1, 1)) -> Any:
    """A small cell of an ordered alloy, strained and rattled, as a row of a dataset."""
    rng = np.random.default_rng(0)
    scaled = np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]) + 0.03 * rng.standard_normal((4, 3))
    atoms = Atoms("Cu3Au", scaled_positions=scaled, cell=[[3.8, 0.1, 0], [0, 3.7, 0.2], [0.1, 0, 3.9]], pbc=True)
    row = AtomsToGraphs(r_energy=False, r_forces=False, r_edges=False, r_pbc=True).convert(atoms.repeat(repeats))
    row.sid, row.fid, row.natoms = 0, 0, 4 * int(np.prod(repeats))
    return row


def collate(rows: list[Any]) -> Any:
    """A batch of copies of rows, as the host's loader makes it."""
    return data_list_collater([copy.deepcopy(row) for row in rows], otf_graph=True)


def training_config(folder: Path, model: Mapping[str, Any], denoising: Mapping[str, Any]) -> dict[str, Any]:
    """A whole training config on sample data: two steps an epoch, one epoch.

    Args:
        folder: where sample data is kept.
        model: arguments of HydraModel.
        denoising: the `task.denoising` block.
    """
    return {
        "trainer": "fairchem_scd.EquiformerV2DenoisingTrainer",
        "task": {"denoising": copy.deepcopy(dict(denoising))},
        "dataset": {
            "train": {
                "format": "emt_slabs",
                "src": str(folder / "train"),
                "num_structures": 8,
                "num_systems": 6,
                "key_mapping": {"y": "energy", "force": "forces"},
                "transforms": {
                    "normalizer": {"energy": {"mean": 5.5, "stdev": 2.5}, "forces": {"mean": 0.0, "stdev": 1.5}}
                },
            },
            "val": {"src": str(folder / "val"), "num_structures": 4, "seed": 1},
        },
        "logger": "tensorboard",
        "outputs": {
            "energy": {"level": "system"},
            "forces": {"level": "atom", "train_on_free_atoms": True, "eval_on_free_atoms": True},
        },
        "loss_functions": [
            {"energy": {"fn": "mae", "coefficient": 2}},
            {"forces": {"fn": "l2mae", "coefficient": 100}},
        ],
        "evaluation_metrics": {
            "primary_metric": "forces_mae",
            "metrics": {"energy": ["mae"], "forces": ["mae"]},
        },
        "model": {"name": "hydra", "otf_graph": True, **model},
        "optim": {
            "batch_size": 4,
            "eval_batch_size": 4,
            "num_workers": 0,
            "lr_initial": 0.001,
            "optimizer": "AdamW",
            "optimizer_params": {"weight_decay": 0.001},
            "scheduler": "LambdaLR",
            "scheduler_params": {
                "lambda_type": "cosine",
                "warmup_factor": 0.2,
                "warmup_epochs": 0.5,
                "lr_min_factor": 0.01,
            },
            "max_epochs": 1,
            "clip_grad_norm": 100,
            "ema_decay": 0.9,
        },
    }


def self_supervised(config: Mapping[str, Any]) -> dict[str, Any]:
    """A training config without labels, outputs and heads."""
    config = copy.deepcopy(dict(config))
    config.update(outputs={}, loss_functions=[], evaluation_metrics={})
    config["model"].pop("heads", None)
    return config


def make_trainer(config: dict[str, Any], run_dir: Path, **arguments: Any) -> Any:
    """A trainer as the host's command line would make it, without process groups; by default on the CPU."""
    config = copy.deepcopy(config)
    trainer = registry.get_trainer_class(config["trainer"])
    legacy_names = {"forces": "s2ef", "equiformerv2_forces": "s2ef", "energy": "is2re"}
    return trainer(
        task=config.get("task", {}),
        model=config["model"],
        outputs=config.get("outputs", {}),
        dataset=config["dataset"],
        optimizer=config["optim"],
        loss_functions=config.get("loss_functions", {}),
        evaluation_metrics=config.get("evaluation_metrics", {}),
        identifier=arguments.pop("identifier", "test"),
        local_rank=0,
        run_dir=str(run_dir),
        logger=config.get("logger", "tensorboard"),
        cpu=arguments.pop("cpu", True),
        name=legacy_names.get(config["trainer"], "ocp"),
        seed=arguments.pop("seed", 0),
        **arguments,
    )


def on_ranks(count: int, folder: Path, action: Callable[[int], Any]) -> list[Any]:
    """What an action returns on each of several gloo ranks, which are forked from this process.

    Args:
        count: number of ranks.
        folder: an empty folder, in which the ranks meet and leave their results.
        action: called with the rank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mp.start_processes(_rank_main, (count, folder, action), nprocs=count, start_method="fork")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(count)]


def _rank_main(rank: int, count: int, folder: Path, action: Callable[[int], Any]) -> None:
    gc.freeze()  # collecting the parent's garbage may wait for threads that do not exist in a fork
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    torch.save(action(rank), folder / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def plan_of(
    batch: Any, block: Mapping[str, Any], supervised: bool = True, *, task: str = "", step: int = VALIDATION
) -> tuple[Plan, Corruption]:
    """The plan of a step on a batch, and its corruption. In validation every structure is conditioned on its embedding.

    Args:
        batch: from `collate`.
        block: the `task.denoising` block.
        supervised: whether outputs are trained.
        task: name of a task of the block; by default its first.
        step: number of the step.
    """
    task = task or next(iter(block))
    drawn, structures = build_tasks(block, supervised)[0][task], structures_of(batch)
    corruption = drawn.corrupt(structures, seed=0, step=step)
    return Plan(task, drawn.passes(structures, corruption, seed=0, step=step)), corruption


def with_conditioned(plan: Plan, value: bool | None) -> Plan:
    """The plan, with every structure of its last pass conditioned or none; None: a pass that has no condition."""
    last = plan.passes[-1]
    changed = replace(last, conditioned=None if value is None else torch.full_like(last.conditioned, value))
    return replace(plan, passes=(*plan.passes[:-1], changed))


def stirred(model: DenoisingHydra, scale: float = 1.0, seed: int = 1) -> DenoisingHydra:
    """The model, with the weights of its conditions moved away from their initial values, as training would do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.denoising.named_parameters():
            if "noise_head" not in name:
                p += scale * torch.randn(p.shape, generator=generator) / max(p.shape[-1] if p.dim() else 1, 1) ** 0.5
    return model


def run(model: HydraModel, batch: Any, *plan: Plan) -> dict[str, Tensor]:
    """Outputs of one call on a copy of the batch, under a fixed random state."""
    torch.manual_seed(7)
    return model(copy.deepcopy(batch), *plan)


def gradients(model: HydraModel, batch: Any, *plan: Plan) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Outputs of one call, and each parameter's gradient of the sum of their squares."""
    model.zero_grad()
    out = run(model, batch, *plan)
    sum(value.square().sum() for value in out.values()).backward()
    return out, {name: p.grad for name, p in model.named_parameters()}


def rotation() -> Tensor:
    """[3, 3], the same at every call."""
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))
    return turn * torch.det(turn).sign()
