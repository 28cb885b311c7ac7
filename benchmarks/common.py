"""What the benchmarks share: small models of some backbones, and trainers as the host would build them."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import setup_imports

import fairchem_scd.fairchem1.plugin  # noqa: F401  (registers everything with the host)

# Those whose atoms have no vector features cannot be told forces.
SCALAR_BACKBONES = ("gemnet_t", "gemnet_t_conservative", "gemnet_oc", "dimenetplusplus")
BACKBONES = ("equiformer_v2", "escn", "esen", "esen_conservative", "painn", *SCALAR_BACKBONES)
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
    elif name == "painn":
        names = ("use_pbc", "use_pbc_single", "otf_graph", "max_neighbors", "num_layers")
        backbone = {"model": "painn_backbone", **{key: shared[key] for key in names}}
        backbone |= {"hidden_channels": channels, "num_rbf": 128, "cutoff": radius}
        heads = {"energy": {"module": "painn_energy_head"}, "forces": {"module": "painn_force_head"}}
    elif name in SCALAR_BACKBONES:
        kind = name.removesuffix("_conservative")
        backbone, heads = _without_vectors(kind, layers, channels, neighbors, direct=kind == name)
        backbone |= {"model": f"{kind}_backbone", "cutoff": radius, "use_pbc_single": mixed_sizes, "otf_graph": True}
    else:
        raise ValueError(f"unknown backbone {name!r}; known: {', '.join(BACKBONES)}")
    return {
        "name": "hydra",
        "otf_graph": True,
        "pass_through_head_outputs": True,
        "backbone": backbone,
        "heads": heads,
    }


def _without_vectors(
    kind: str, layers: int, channels: int, neighbors: int, *, direct: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Backbone and heads of one of `SCALAR_BACKBONES`, in the proportions of the host's OC20 configs."""
    if kind == "dimenetplusplus":
        backbone = {"num_blocks": layers, "hidden_channels": channels, "out_emb_channels": channels}
        backbone |= {"int_emb_size": channels // 3, "basis_emb_size": 8, "num_spherical": 7, "num_radial": 6}
        return backbone, {"energy_and_forces": {"module": "dimenetplusplus_energy_and_force_head"}}
    small = max(channels // 8, 4)
    backbone = {"num_blocks": layers, "direct_forces": direct, "max_neighbors": neighbors, "num_spherical": 7}
    backbone |= {"num_radial": 128, "num_before_skip": 1, "num_after_skip": 2, "num_concat": 1, "num_atom": 3}
    backbone |= {"emb_size_atom": channels, "emb_size_edge": channels, "emb_size_rbf": 16, "emb_size_cbf": 16}
    heads: dict[str, Any] = {"energy": {"module": f"{kind}_energy_and_grad_force_head"}}
    if direct:
        heads["forces"] = {"module": f"{kind}_force_head"}
    if kind == "gemnet_t":
        return backbone | {"emb_size_trip": small, "emb_size_bil_trip": small}, heads
    sizes = {"edge": 2 * channels, "sbf": 32}
    sizes |= {f"{part}_{way}": 2 * small for part in ("trip", "aint") for way in ("in", "out")}
    sizes |= {"quad_in": small, "quad_out": small}
    backbone |= {f"emb_size_{part}": size for part, size in sizes.items()} | {"num_before_skip": 2}
    backbone |= {"max_neighbors_qint": min(8, neighbors), "max_neighbors_aeaint": min(20, neighbors)}
    backbone |= {"max_neighbors_aint": 1000, "num_output_afteratom": 3}
    parts = ("quad_interaction", "atom_edge_interaction", "edge_atom_interaction", "atom_interaction")
    backbone |= dict.fromkeys(parts, True)
    return backbone, {head: {**said, "num_global_out_layers": 2} for head, said in heads.items()}


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
    forces: bool = True,
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
        forces: train forces too, not energies alone.
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
        if not forces:
            outputs, losses = {"energy": outputs["energy"]}, losses[:1]
            evaluation = {"primary_metric": "energy_mae", "metrics": {"energy": ["mae"]}}
            model["heads"] = {"energy": model["heads"]["energy"]}
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
