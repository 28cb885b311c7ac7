"""What the benchmarks share: small models of some backbones, and trainers as the host would build them."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import setup_imports

import fairchem_scd.plugin  # noqa: F401  (registers everything with the host)

BACKBONES = ("equiformer_v2", "escn", "esen", "esen_conservative")
PLAIN = "equiformerv2_forces"
DENOISING = "fairchem_scd.EquiformerV2DenoisingTrainer"


def hydra(
    name: str, *, layers: int, channels: int, lmax: int, radius: float, neighbors: int, mixed_sizes: bool = False
) -> dict[str, Any]:
    """The `model:` block of a small model without dropout.

    Args:
        name: one of `BACKBONES`.
        radius: cutoff, Å.
        neighbors: most neighbours of an atom.
        mixed_sizes: build graphs one structure at a time, which is faster where large and tiny cells share a batch.
    """
    shared = {
        "use_pbc": True,
        "use_pbc_single": mixed_sizes,
        "otf_graph": True,
        "max_num_elements": 90,
        "max_neighbors": neighbors,
        "num_layers": layers,
        "sphere_channels": channels,
        "edge_channels": channels,
    }
    degrees = {"lmax_list": [lmax], "mmax_list": [min(2, lmax)]}
    if name == "equiformer_v2":
        backbone = {
            "model": "equiformer_v2_backbone",
            **shared,
            **degrees,
            "max_radius": radius,
            "attn_hidden_channels": channels // 2,
            "num_heads": 4,
            "attn_alpha_channels": channels // 2,
            "attn_value_channels": channels // 4,
            "ffn_hidden_channels": channels,
            "norm_type": "layer_norm_sh",
            "attn_activation": "silu",
            "ffn_activation": "silu",
            "use_grid_mlp": True,
            "alpha_drop": 0.0,
            "drop_path_rate": 0.0,
            "weight_init": "uniform",
        }
        heads = {"energy": {"module": "equiformerV2_scalar_head"}, "forces": {"module": "equiformerV2_vector_head"}}
    elif name == "escn":
        backbone = {
            "model": "escn_backbone",
            **shared,
            **degrees,
            "cutoff": radius,
            "hidden_channels": channels,
            "num_sphere_samples": 64,
            "distance_resolution": 0.05,
        }
        heads = {"energy": {"module": "escn_energy_head"}, "forces": {"module": "escn_force_head"}}
    elif name in ("esen", "esen_conservative"):
        backbone = {
            "model": "esen_backbone",
            **shared,
            "lmax": lmax,
            "mmax": min(2, lmax),
            "cutoff": radius,
            "hidden_channels": channels,
            "num_distance_basis": 64,
            "act_type": "gate",
            "mlp_type": "spectral",
            "use_envelope": True,
            "direct_forces": name == "esen",
        }
        heads = {"energy": {"module": "esen_mlp_energy_head"}, "forces": {"module": "esen_linear_force_head"}}
        if name == "esen_conservative":
            heads = {"energy_and_forces": {"module": "esen_mlp_efs_head"}}
    else:
        raise ValueError(f"unknown backbone {name!r}; known: {', '.join(BACKBONES)}")
    return {
        "name": "hydra",
        "otf_graph": True,
        "pass_through_head_outputs": True,
        "backbone": backbone,
        "heads": heads,
    }


def training(
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    ema: float | None,
    weight_decay: float = 0.001,
    clip: float = 100,
) -> dict[str, Any]:
    """The `optim:` block: AdamW and a cosine with warm-up, as the OC20 configs have it, and nothing between epochs."""
    return {
        "batch_size": batch_size,
        "eval_batch_size": batch_size,
        "num_workers": 0,
        "lr_initial": lr,
        "optimizer": "AdamW",
        "optimizer_params": {"weight_decay": weight_decay},
        "scheduler": "LambdaLR",
        "scheduler_params": {
            "lambda_type": "cosine",
            "warmup_factor": 0.2,
            "warmup_epochs": 1,
            "lr_min_factor": 0.01,
        },
        "max_epochs": epochs,
        "clip_grad_norm": clip,
        "ema_decay": ema,
        "eval_every": 10**12,
    }


def make_trainer(
    trainer: str,
    model: dict[str, Any],
    dataset: dict[str, Any],
    optim: dict[str, Any],
    *,
    seed: int,
    denoising: dict[str, Any] | None = None,
    supervised: bool = True,
    folder: Path | None = None,
    device: str = "cpu",
    amp: bool = False,
) -> Any:
    """A trainer as the host's command builds it, but without process groups.

    Args:
        trainer: a registered name or a dotted one.
        model, dataset, optim: blocks of a config.
        denoising: the `task.denoising` block.
        supervised: train energies and forces; else nothing but denoising, without heads.
        folder: for logs and checkpoints; None: nothing is written.
    """
    setup_imports()
    model = copy.deepcopy(model)
    outputs: dict[str, Any] = {}
    losses: list[dict[str, Any]] = []
    evaluation: dict[str, Any] = {}
    if supervised:
        outputs = {
            "energy": {"level": "system"},
            "forces": {"level": "atom", "train_on_free_atoms": True, "eval_on_free_atoms": True},
        }
        losses = [{"energy": {"fn": "mae", "coefficient": 2}}, {"forces": {"fn": "l2mae", "coefficient": 100}}]
        evaluation = {"primary_metric": "forces_mae", "metrics": {"energy": ["mae"], "forces": ["mae"]}}
    else:
        model.pop("heads", None)
    return registry.get_trainer_class(trainer)(
        task={"denoising": denoising} if denoising else {},
        model=model,
        outputs=outputs,
        dataset=copy.deepcopy(dataset),
        optimizer=copy.deepcopy(optim),
        loss_functions=losses,
        evaluation_metrics=evaluation,
        identifier="benchmark",
        local_rank=0,
        run_dir=str(folder) if folder else None,
        is_debug=folder is None,
        print_every=10**9,
        seed=seed,
        logger="tensorboard",
        amp=amp,
        cpu=device == "cpu",
        name="s2ef" if trainer == PLAIN else "ocp",
    )


def use_threads(count: int | None) -> None:
    """Let torch use so many threads; None: as the environment says."""
    if count is not None:
        torch.set_num_threads(count)


def existing_folder(text: str) -> Path:
    """For argparse: a folder that exists."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a folder")
    return path
