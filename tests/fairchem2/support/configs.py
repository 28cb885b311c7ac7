"""Configs of the host for small models and short runs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.fairchem2.support.data import database

UNIT = "fairchem.core.units.mlip_unit.mlip_unit"
UMA = "fairchem.core.models.uma"
OURS = "fairchem_scd.DenoisingTrainEvalUnit"


def task(name: str, *, prop: str | None = None, dataset: str = "mo", **changes: Any) -> dict[str, Any]:
    """A task of the host's, as its configs have it."""
    prop = prop or name
    per_atom = prop == "forces"
    loss = {"energy": "PerAtomMAELoss", "forces": "L2NormLoss", "stress": "MAELoss"}[prop]
    return {
        "_target_": f"{UNIT}.Task",
        "name": name,
        "level": "atom" if per_atom else "system",
        "property": prop,
        "loss_fn": {
            "_target_": "fairchem.core.modules.loss.DDPMTLoss",
            "loss_fn": {"_target_": f"fairchem.core.modules.loss.{loss}"},
            "reduction": "mean",
            "coefficient": {"energy": 20, "forces": 2, "stress": 1}[prop],
        },
        "out_spec": {"dim": {"energy": [1], "forces": [3], "stress": [1, 9]}[prop], "dtype": "float32"},
        "normalizer": {
            "_target_": "fairchem.core.modules.normalization.normalizer.Normalizer",
            "mean": 0.0,
            "rmsd": 0.729,
        },
        "datasets": [dataset],
        "metrics": ["mae"],
        **changes,
    }


def element_references() -> dict[str, Any]:
    values = [0.1 * (z % 7) for z in range(50)]
    module = "fairchem.core.modules.normalization.element_references.ElementReferences"
    return {"_target_": module, "element_references": {"_target_": "torch.DoubleTensor", "_args_": [values]}}


def model_config(
    *,
    direct: bool = True,
    stress: bool = False,
    experts: int = 0,
    heads: Mapping[str, Any] | None = None,
    datasets: Sequence[str] = ("mo",),
    **backbone: Any,
) -> dict[str, Any]:
    """A small eSCN-MD of the mixture-of-experts class, as UMA's configs have it."""
    if heads is None and direct:
        heads = {"energy": {"module": f"{UMA}.escn_md.MLP_Energy_Head"}}
        heads["forces"] = {"module": f"{UMA}.escn_md.Linear_Force_Head"}
        if stress:
            heads["stress"] = {"module": f"{UMA}.escn_md.MLP_Stress_Head"}
    elif heads is None:
        heads = {"efs": {"module": f"{UMA}.escn_md.MLP_EFS_Head"}}
    return {
        "_target_": "fairchem.core.models.base.HydraModel",
        "model_id": "tiny-0",
        **({} if direct else {"pass_through_head_outputs": True}),
        "backbone": {
            "model": f"{UMA}.escn_moe.eSCNMDMoeBackbone",
            "num_experts": experts,
            "sphere_channels": 8,
            "hidden_channels": 8,
            "edge_channels": 8,
            "num_distance_basis": 16,
            "lmax": 2,
            "mmax": 2,
            "num_layers": 2,
            "cutoff": 4.0,
            "max_neighbors": 20,
            "otf_graph": True,
            "always_use_pbc": False,
            "direct_forces": direct,
            "regress_forces": True,
            "regress_stress": stress,
            **({"direct_stress": True} if direct and stress else {}),
            "norm_type": "rms_norm_sh",
            "act_type": "gate",
            "ff_type": "spectral",
            "dataset_mapping": {name: name for name in datasets},
            **backbone,
        },
        "heads": dict(heads),
    }


def mixture(datasets: Sequence[str], *, direct: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A model and tasks as UMA's configs have them: heads and tasks of each data set's own."""
    classes = {"energy": "MLP_Energy_Head", "forces": "Linear_Force_Head"} if direct else {"efs": "MLP_EFS_Head"}
    heads = {
        name: {
            "module": f"{UMA}.escn_moe.DatasetSpecificMoEWrapper",
            "head_cls": f"{UMA}.escn_md.{cls}",
            "dataset_mapping": {dataset: dataset for dataset in datasets},
            **({} if direct else {"head_kwargs": {"wrap_property": False}}),
        }
        for name, cls in classes.items()
    }
    model = model_config(direct=direct, experts=2, heads=heads, datasets=datasets, use_composition_embedding=True)
    model["pass_through_head_outputs"] = True
    tasks = [
        task(f"{dataset}_{prop}", prop=prop, dataset=dataset) for dataset in datasets for prop in ("energy", "forces")
    ]
    return model, tasks


def of_several_data_sets(config: Mapping[str, Any], folder: Path, datasets: Sequence[str]) -> dict[str, Any]:
    """A config of `run_config` with several data sets, each in a folder of its name and with names for its labels."""
    config = copy.deepcopy(dict(config))
    for phase, split in (("train", "train"), ("eval", "val")):
        configs = config["runner"][f"{phase}_dataloader"]["dataset"]["dataset_configs"]
        one = configs.pop("mo")
        for name in datasets:
            configs[name] = {
                **one,
                "splits": {split: {"src": [str(database(folder / name, split))]}},
                "transforms": {transform: {"dataset_name": name} for transform in one["transforms"]},
                "key_mapping": {prop: f"{name}_{prop}" for prop in ("energy", "forces")},
            }
    return config


def tasks_config(*, stress: bool = False, references: bool = True) -> list[dict[str, Any]]:
    energy = task("energy", **({"element_references": element_references()} if references else {}))
    return [energy, task("forces"), *([task("stress")] if stress else [])]


def run_config(
    folder: Path,
    *,
    model: Mapping[str, Any] | None = None,
    tasks: Sequence[Mapping[str, Any]] | None = None,
    denoising: Mapping[str, Any] | None = None,
    steps: int = 4,
    checkpoint_every: int | None = 2,
    evaluate_every: int | None = None,
    **unit: Any,
) -> dict[str, Any]:
    """A config of the host for a run over the sample data in a folder; our unit where `denoising` is given."""
    tasks = tasks_config() if tasks is None else list(tasks)
    collate = {"_target_": f"{UNIT}.mt_collater_adapter", "tasks": tasks}
    if not tasks:
        simple = "fairchem.core.datasets.collaters.simple_collater.data_list_collater"
        collate = {"_target_": simple, "_partial_": True, "otf_graph": True}
    return {
        "job": {
            "device_type": "CPU",
            "debug": True,
            "seed": 0,
            "run_dir": str(folder / "runs"),
            "run_name": "tiny",
            "scheduler": {"mode": "LOCAL", "ranks_per_node": 1, "distributed_init_method": "FILE"},
        },
        "runner": {
            "_target_": "fairchem.core.components.train.train_runner.TrainEvalRunner",
            "train_dataloader": _loader(database(folder, "train"), collate, shuffle=True),
            "eval_dataloader": _loader(database(folder, "val"), collate, shuffle=False),
            "train_eval_unit": {
                "_target_": f"{UNIT}.MLIPTrainEvalUnit" if denoising is None else OURS,
                **({} if denoising is None else {"denoising": dict(denoising)}),
                "job_config": "${job}",
                "tasks": tasks,
                "model": dict(model_config() if model is None else model),
                **optimisation(steps),
                **unit,
            },
            "max_epochs": None,
            "max_steps": steps,
            "evaluate_every_n_steps": evaluate_every,
            "callbacks": [
                {
                    "_target_": "fairchem.core.components.callbacks.TrainCheckpointCallback",
                    "checkpoint_every_n_steps": checkpoint_every,
                    "max_saved_checkpoints": 5,
                }
            ],
        },
    }


def optimisation(steps: int) -> dict[str, Any]:
    return {
        "optimizer_fn": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.01, "weight_decay": 0.001},
        "cosine_lr_scheduler_fn": {
            "_target_": f"{UNIT}._get_consine_lr_scheduler",
            "_partial_": True,
            "warmup_factor": 0.2,
            "warmup_epochs": 0.01,
            "lr_min_factor": 0.01,
            "epochs": None,
            "steps": steps,
        },
        "print_every": 1,
        "clip_grad_norm": 100,
    }


def _loader(path: Path, collate: Mapping[str, Any], *, shuffle: bool) -> dict[str, Any]:
    dataset = {
        "splits": {path.stem: {"src": [str(path)]}},
        "format": "ase_db",
        "transforms": {
            "common_transform": {"dataset_name": "mo"},
            "stress_reshape_transform": {"dataset_name": "mo"},
        },
    }
    return {
        "_target_": "fairchem.core.components.common.dataloader_builder.get_dataloader",
        "dataset": {
            "_target_": "fairchem.core.datasets.mt_concat_dataset.create_concat_dataset",
            "dataset_configs": {"mo": dataset},
            "combined_dataset_config": {"sampling": {"type": "temperature", "temperature": 1.0}},
        },
        "batch_sampler_fn": {
            "_target_": "fairchem.core.datasets.samplers.max_atom_distributed_sampler.MaxAtomDistributedBatchSampler",
            "_partial_": True,
            "max_atoms": 14,
            "shuffle": shuffle,
            "seed": 0,
        },
        "num_workers": 0,
        "collate_fn": dict(collate),
    }
