"""Small models, batches and configs that the tests share."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import setup_imports
from fairchem.core.datasets import data_list_collater
from fairchem.core.models.base import HydraModel
from fairchem.core.models.equiformer_v2.equiformer_v2 import EquiformerV2Backbone
from fairchem.core.models.equiformer_v2.equiformer_v2_deprecated import EquiformerV2
from fairchem.core.models.escn.escn import eSCN

import fairchem_scd.plugin  # noqa: F401  (registers everything with the host)
from fairchem_scd.data.emt_slabs import emt_slabs
from fairchem_scd.model import DenoisingHydra

setup_imports()  # the host's whole registry, as at the start of any mode

CONFIGS = Path(__file__).parent.parent / "configs"

EQUIFORMER_V2 = {
    "model": "equiformer_v2_backbone",
    "use_pbc": True,
    "otf_graph": True,
    "max_neighbors": 300,  # a number that cuts breaks ties between equal distances by batch composition
    "max_radius": 4.5,
    "max_num_elements": 90,
    "num_layers": 2,
    "sphere_channels": 8,
    "attn_hidden_channels": 8,
    "num_heads": 2,
    "attn_alpha_channels": 8,
    "attn_value_channels": 4,
    "ffn_hidden_channels": 8,
    "norm_type": "layer_norm_sh",
    "lmax_list": [2],
    "mmax_list": [2],
    "edge_channels": 8,
    "attn_activation": "silu",
    "ffn_activation": "silu",
    "use_grid_mlp": True,
    "alpha_drop": 0.0,
    "drop_path_rate": 0.0,
    "weight_init": "uniform",
}
ESCN = {
    "model": "escn_backbone",
    "use_pbc": True,
    "otf_graph": True,
    "max_neighbors": 300,
    "cutoff": 4.5,
    "max_num_elements": 90,
    "num_layers": 2,
    "lmax_list": [2],
    "mmax_list": [2],
    "sphere_channels": 8,
    "hidden_channels": 8,
    "edge_channels": 8,
    "num_sphere_samples": 32,
    "distance_resolution": 0.1,
}
BACKBONES = {"equiformer_v2": EQUIFORMER_V2, "escn": ESCN}
HEADS = {
    "equiformer_v2": {
        "energy": {"module": "equiformerV2_scalar_head"},
        "forces": {"module": "equiformerV2_vector_head"},
    },
    "escn": {"energy": {"module": "escn_energy_head"}, "forces": {"module": "escn_force_head"}},
}


def hydra_arguments(name: str, **backbone: Any) -> dict[str, Any]:
    """Arguments of a tiny HydraModel on a backbone of `BACKBONES`."""
    return {
        "backbone": {**copy.deepcopy(BACKBONES[name]), **backbone},
        "heads": copy.deepcopy(HEADS[name]),
        "pass_through_head_outputs": True,
    }


def plain_and_denoising(name: str, block: dict[str, Any], **backbone: Any) -> tuple[HydraModel, DenoisingHydra]:
    """The host's plain model and this package's, with equal host weights."""
    torch.manual_seed(0)
    plain = HydraModel(**hydra_arguments(name, **backbone))
    torch.manual_seed(0)
    denoising = DenoisingHydra(denoising=block, **hydra_arguments(name, **backbone))
    state = denoising.state_dict()
    for key, value in plain.state_dict().items():
        assert torch.equal(state[key], value), f"{key}: construction changed the host's initial weights"
    return plain, denoising


def slabs(count: int, seed: int = 0, systems: int = 6) -> list[Any]:
    """Labelled sample structures, as rows of a dataset whose keys are already mapped."""
    from fairchem.core.preprocessing import AtomsToGraphs

    converter = AtomsToGraphs(r_energy=True, r_forces=True, r_edges=False, r_pbc=True)
    rows = []
    for atoms, sid, fid in emt_slabs(count, seed, systems):
        row = converter.convert(atoms)
        row.sid, row.fid, row.natoms = sid, fid, len(atoms)
        rows.append(row)
    return rows


def collate(rows: list[Any]) -> Any:
    """A batch of copies of rows, as the host's loader makes it."""
    return data_list_collater([copy.deepcopy(row) for row in rows], otf_graph=True)


def tiny_config(folder: Path, name: str = "equiformer_v2", denoising: Any = None, **changes: Any) -> dict[str, Any]:
    """A whole training config on sample data: EquiformerV2's trainer, two steps an epoch, one epoch.

    Args:
        folder: where sample data is kept.
        name: a backbone of `BACKBONES`.
        denoising: the `task.denoising` block; default DeNS on every step.
        changes: blocks to update, such as optim={"max_epochs": 2}.
    """
    config = {
        "trainer": "fairchem_scd.EquiformerV2DenoisingTrainer",
        "task": {"denoising": {"dens": {"prob": 1.0}} if denoising is None else denoising},
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
        "model": {"name": "hydra", "otf_graph": True, **hydra_arguments(name)},
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
    for block, update in changes.items():
        config[block] = {**config[block], **update} if isinstance(update, dict) else update
    return config


def make_trainer(config: dict[str, Any], run_dir: Path, **arguments: Any) -> Any:
    """A trainer as the host's command line would construct it, without process groups."""
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
        cpu=True,
        name=legacy_names.get(config["trainer"], "ocp"),
        seed=arguments.pop("seed", 0),
        **arguments,
    )


def host_config(path: Path, *overrides: str) -> dict[str, Any]:
    """A config file as the host's own build_config reads it."""
    from fairchem.core.common.utils import build_config

    arguments = Namespace(
        config_yml=path, mode="train", identifier="", timestamp_id=None, seed=0, debug=False, run_dir="./",
        print_every=10, amp=False, checkpoint=None, cpu=True, submit=False, summit=False, num_nodes=1, num_gpus=1,
        gp_gpus=None,
    )  # fmt: skip
    return build_config(arguments, list(overrides))


def fixed_edge_frames(backbone: Any, data: Any, edge_index: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Stands in for a backbone's `_init_edge_rot_mat`, whose frames are random about the edge."""
    y = vectors / vectors.norm(dim=1, keepdim=True)
    axis = torch.nn.functional.one_hot(y.abs().argmin(dim=1), 3).to(y)
    z = torch.linalg.cross(y, axis)
    z = z / z.norm(dim=1, keepdim=True)
    return torch.stack([torch.linalg.cross(y, z), y, z], dim=1).detach()


@contextmanager
def edge_frames_without_chance() -> Iterator[None]:
    """While entered, every backbone has `fixed_edge_frames`."""
    with ExitStack() as stack:
        for model in (EquiformerV2Backbone, EquiformerV2, eSCN):
            stack.enter_context(mock.patch.object(model, "_init_edge_rot_mat", fixed_edge_frames))
        yield
