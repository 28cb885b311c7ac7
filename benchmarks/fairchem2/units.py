"""Units for measurements on fairchem 2.x: eSCN-MD, dense or with experts, with direct or conservative forces."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import hydra
import torch
from fairchem.core.units.mlip_unit.mlip_unit import MLIPTrainEvalUnit, _get_consine_lr_scheduler
from omegaconf import OmegaConf

from fairchem_scd import DenoisingTrainEvalUnit

_UMA = "fairchem.core.models.uma"
_UNIT = "fairchem.core.units.mlip_unit.mlip_unit"


def unit_of(
    kind: str, experts: int, options: argparse.Namespace, denoising: dict[str, Any] | None, supervised: bool = True
) -> MLIPTrainEvalUnit:
    """The host's unit, or ours, with fresh weights.

    Args:
        kind: of the forces, "direct" or "conservative".
        experts: 0: a dense model.
        options: seed and sizes, by the names of the command line.
        denoising: the denoising block; None: the host's own unit.
        supervised: with energy and forces; otherwise pre-training.
    """
    job = OmegaConf.create({"seed": options.seed, "debug": True, "logger": None, "graph_parallel": {"group_size": 1}})
    torch.manual_seed(options.seed)
    heads = _heads(kind) if supervised else {}
    model = hydra.utils.instantiate(_model(kind, experts, heads, options))
    tasks = [hydra.utils.instantiate(_task(prop)) for prop in ("energy", "forces")] if supervised else []
    scheduler = {"warmup_factor": 0.2, "warmup_epochs": 0.01, "lr_min_factor": 0.01, "steps": 10**6}
    own = {} if denoising is None else {"denoising": denoising}
    return (MLIPTrainEvalUnit if denoising is None else DenoisingTrainEvalUnit)(
        job,
        model,
        partial(torch.optim.AdamW, lr=1e-5, weight_decay=1e-3),
        partial(_get_consine_lr_scheduler, **scheduler),
        tasks,
        print_every=10**9,
        clip_grad_norm=100,
        **own,
    )


def _model(kind: str, experts: int, heads: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    channels = options.channels
    return {
        "_target_": "fairchem.core.models.base.HydraModel",
        "model_id": "benchmark-0",
        "pass_through_head_outputs": kind == "conservative",
        "backbone": {
            "model": f"{_UMA}.escn_moe.eSCNMDMoeBackbone",
            "num_experts": experts,
            "sphere_channels": channels,
            "hidden_channels": channels,
            "edge_channels": channels,
            "num_distance_basis": 64,
            "lmax": options.lmax,
            "mmax": options.lmax,
            "num_layers": options.layers,
            "cutoff": options.radius,
            "max_neighbors": options.neighbors,
            "otf_graph": True,
            "direct_forces": kind == "direct",
            "regress_forces": True,
            "norm_type": "rms_norm_sh",
            "act_type": "gate",
            "ff_type": "spectral",
            "dataset_mapping": {"emt": "emt"},
        },
        "heads": heads,
    }


def _heads(kind: str) -> dict[str, Any]:
    if kind == "conservative":
        return {"efs": {"module": f"{_UMA}.escn_md.MLP_EFS_Head"}}
    names = {"energy": "MLP_Energy_Head", "forces": "Linear_Force_Head"}
    return {name: {"module": f"{_UMA}.escn_md.{head}"} for name, head in names.items()}


def _task(prop: str) -> dict[str, Any]:
    """A task as the host's fine-tuning template has it."""
    loss = {"energy": "PerAtomMAELoss", "forces": "L2NormLoss"}[prop]
    return {
        "_target_": f"{_UNIT}.Task",
        "name": prop,
        "level": "atom" if prop == "forces" else "system",
        "property": prop,
        "loss_fn": {
            "_target_": "fairchem.core.modules.loss.DDPMTLoss",
            "loss_fn": {"_target_": f"fairchem.core.modules.loss.{loss}"},
            "coefficient": {"energy": 20, "forces": 2}[prop],
        },
        "out_spec": {"dim": {"energy": [1], "forces": [3]}[prop], "dtype": "float32"},
        "normalizer": {
            "_target_": "fairchem.core.modules.normalization.normalizer.Normalizer",
            "mean": 0.0,
            "rmsd": 1.5,
        },
        "datasets": ["emt"],
        "metrics": ["mae"],
    }
