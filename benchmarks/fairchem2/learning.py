"""What the denoising tasks buy on fairchem 2.x: equal models, batches, steps and seeds, with and without them.

Arms of training × data × labels × seeds, on a small eSCN-MD with direct forces or with the energy's gradient. Every run
is a run of the host's own command; its inference checkpoint is judged by the host's calculator on structures that no
run has seen. Runs end with one line each in the results file; a run that is in there is not run again.

    python -m benchmarks.fairchem2.learning --data FOLDER --seeds 0 1 2

FOLDER has the ASE databases `mlearn_Mo_train.db` and `mlearn_Mo_test.db`, the same for Li, and `oxides.db`, of which a
fifth is set apart. The oxides are relaxed, so they have energies alone.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import ase.db
import numpy as np
import torch
import yaml
from ase import Atoms
from fairchem.core import FAIRChemCalculator
from fairchem.core._cli import main as fairchem
from fairchem.core.common import distutils

from benchmarks.evidence import databases
from benchmarks.evidence.results import Results, environment, key_of

RESULTS = Path(__file__).parents[1] / "results" / "fairchem2.jsonl"
DATA = ("Mo", "Li", "oxides")
FORCES = ("direct", "conservative")
NO_FORCES = "none"
_UNIT = "fairchem.core.units.mlip_unit.mlip_unit"
_UMA = "fairchem.core.models.uma"
_OURS = "fairchem_scd.DenoisingTrainEvalUnit"

BESIDE: dict[str, dict[str, Any]] = {
    "plain": {},
    "DeNS": {"dens": {"prob": 0.5, "std": 0.1, "corrupt_ratio": 0.5, "coefficient": 2.0}},
    "SCD beside labels": {"scd": {"prob": 0.5, "std": 0.04, "coefficient": 0.2}},
}
"""The denoising block of the arms that denoise beside the labels. Coefficients are for a force coefficient of 2."""

BEFORE: dict[str, dict[str, Any]] = {
    "SCD, then plain": {"scd": {"std": 0.04}},
    "plain denoising, then plain": {"scd": {"condition": [], "std": 0.04}},
    "SCD, then plain, quiet heads": {"scd": {"std": 0.04}},
}
"""The denoising block of the pre-training of the arms that have one."""

AFTER: dict[str, dict[str, Any]] = {"SCD, then plain, quiet heads": {"quiet_heads": True}}
"""The denoising block of the fine-tuning of the arms that have one."""


@dataclass(frozen=True)
class Size:
    """Of the model and of the training; `atoms` is the most that a batch has."""

    layers: int = 2
    channels: int = 32
    lmax: int = 2
    cutoff: float = 4.2
    neighbors: int = 60
    atoms: int = 220
    lr: float = 2e-3
    steps: int = 300
    before: int = 400


SIZES = {"oxides": Size(cutoff=3.5, atoms=110)}  # denser, and smaller
"""Of the data that have another one."""


@dataclass(frozen=True)
class Run:
    """All that decides a run's result.

    Attributes:
        forces: "direct", "conservative", or "none": energies alone.
        labels: how many structures have labels; None: all.
    """

    data: str
    forces: str
    arm: str
    labels: int | None
    seed: int
    size: Size = field(default_factory=Size)


def train(run: Run, data: Path, folder: Path, results: Results, here: Mapping[str, str]) -> dict[str, Any]:
    """Train as the run says, in a folder of its own.

    Returns:
        Mean absolute errors of energies [eV per atom] and, where they are trained, of force components [eV/Å] on the
        test structures; and the processor time of training in seconds.
    """
    structures, test = databases.read(run.data, data)
    order = np.random.default_rng([run.seed, 1]).permutation(len(structures))
    labelled = [structures[i] for i in order[: run.labels]]
    _write(folder / "few/few.aselmdb", labelled)
    start = pretrained(run, structures, folder, results, here) if run.arm in BEFORE else None
    tasks, block = _tasks(labelled, run.forces), BESIDE.get(run.arm) or AFTER.get(run.arm, {})
    checkpoint, seconds = _fit(folder / "run", run, folder / "few/few.aselmdb", block, tasks, start)
    return {"test": judge(checkpoint, run.data, test, forces=run.forces != NO_FORCES), "seconds": seconds}


def pretrained(run: Run, structures: Sequence[Atoms], folder: Path, results: Results, here: Mapping[str, str]) -> Path:
    """The inference checkpoint that a run starts from, pre-trained now if it is not there yet.

    It is the same for direct and conservative forces and for any number of labels. Checkpoints are kept beside the
    results; each pre-training has a line of its own in them.
    """
    settings = {"data": run.data, "before": BEFORE[run.arm], "seed": run.seed, "size": asdict(run.size)}
    kept = results.path.with_suffix(".checkpoints") / f"{key_of(settings)}.pt"
    with results.claimed(settings, wait=True) as mine:
        if mine or not kept.exists():
            _write(folder / "all/all.aselmdb", structures)
            block = {"scd": dict(BEFORE[run.arm]["scd"])}
            if block["scd"].get("condition") != []:
                block["scd"]["judge_condition"] = False  # nobody reads it here
            checkpoint, seconds = _fit(folder / "before", run, folder / "all/all.aselmdb", block, tasks=[], start=None)
            kept.parent.mkdir(parents=True, exist_ok=True)
            part = kept.with_suffix(".part")
            shutil.copyfile(checkpoint, part)
            part.replace(kept)
            if mine:
                results.append({"run": settings, "scores": {"seconds": seconds}, **here})
    return kept


def judge(checkpoint: Path, data: str, structures: Sequence[Atoms], *, forces: bool) -> dict[str, float]:
    """Errors of an inference checkpoint, by the host's own calculator."""
    calculator = FAIRChemCalculator.from_model_checkpoint(
        str(checkpoint), task_name=data, inference_settings="batch", device="cpu"
    )
    energy_errors, force_errors = [], []
    for atoms in structures:
        judged = atoms.copy()
        judged.calc = calculator
        energy_errors.append(abs(judged.get_potential_energy() - atoms.get_potential_energy()) / len(atoms))
        if forces:
            force_errors.append(np.abs(judged.get_forces() - atoms.get_forces()).ravel())
    found = {"energy_mae": np.mean(energy_errors)}
    if forces:
        found["force_mae"] = np.concatenate(force_errors).mean()
    return {name: round(float(value), 6) for name, value in found.items()}


# --- one run of the host ----------------------------------------------------------------------------------------------


def _fit(
    folder: Path, run: Run, data: Path, denoising: Mapping[str, Any], tasks: list[dict[str, Any]], start: Path | None
) -> tuple[Path, float]:
    """Run the host's command; returns the inference checkpoint and the processor time, s."""
    folder.mkdir()
    steps = run.size.steps if tasks else run.size.before
    config = _config(folder, run, data, denoising, tasks, _model(run, supervised=bool(tasks), start=start), steps)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    begun = time.process_time()
    try:
        fairchem(Namespace(config=str(path)), ["+job.timestamp_id=run"])
    finally:
        distutils.cleanup()
    seconds = round(time.process_time() - begun, 2)
    return next(folder.glob("runs/run/checkpoints/final/inference_ckpt.pt")), seconds


def _model(run: Run, *, supervised: bool, start: Path | None) -> dict[str, Any]:
    direct = run.forces != "conservative"
    heads: dict[str, Any] = {}
    if supervised and direct:
        heads = {"energy": {"module": f"{_UMA}.escn_md.MLP_Energy_Head"}}
        if run.forces == "direct":
            heads["forces"] = {"module": f"{_UMA}.escn_md.Linear_Force_Head"}
    elif supervised:
        heads = {"efs": {"module": f"{_UMA}.escn_md.MLP_EFS_Head"}}
    through = {} if direct or not supervised else {"pass_through_head_outputs": True}
    if start is not None:
        return {
            "_target_": f"{_UNIT}.initialize_finetuning_model",
            "checkpoint_location": str(start),
            "overrides": {"backbone": {"direct_forces": direct}, **through},
            "heads": heads,
        }
    size = run.size
    return {
        "_target_": "fairchem.core.models.base.HydraModel",
        "model_id": "study",
        **through,
        "backbone": {
            "model": f"{_UMA}.escn_moe.eSCNMDMoeBackbone",
            "num_experts": 0,
            "sphere_channels": size.channels,
            "hidden_channels": size.channels,
            "edge_channels": size.channels,
            "num_distance_basis": 32,
            "lmax": size.lmax,
            "mmax": min(size.lmax, 2),
            "num_layers": size.layers,
            "cutoff": size.cutoff,
            "max_neighbors": size.neighbors,
            "otf_graph": True,
            "always_use_pbc": False,
            "direct_forces": direct or not supervised,
            "regress_forces": True,
            "regress_stress": False,
            "norm_type": "rms_norm_sh",
            "act_type": "gate",
            "ff_type": "spectral",
            "dataset_mapping": {run.data: run.data},
        },
        "heads": heads,
    }


def _tasks(labelled: Sequence[Atoms], forces: str) -> list[dict[str, Any]]:
    """Energy relative to reference energies of the elements, fitted to the labels' energies per atom, and forces.

    Both are normalised by the forces' root mean square; energies alone by their own, per structure.
    """
    atoms_each = np.array([len(atoms) for atoms in labelled])
    shares = databases.shares_of_elements(labelled)
    per_atom = np.array([atoms.get_potential_energy() for atoms in labelled]) / atoms_each
    of_elements = databases.reference_energies(shares, per_atom)
    sizes = (per_atom - shares @ of_elements) * atoms_each
    if forces != NO_FORCES:
        sizes = np.concatenate([atoms.get_forces().ravel() for atoms in labelled])
    rmsd = float(np.sqrt(np.mean(sizes**2)))
    module = "fairchem.core.modules"
    references = {
        "_target_": f"{module}.normalization.element_references.ElementReferences",
        "element_references": {"_target_": "torch.DoubleTensor", "_args_": [of_elements.tolist()]},
    }
    normalizer = {"_target_": f"{module}.normalization.normalizer.Normalizer", "mean": 0.0, "rmsd": rmsd}

    def task(name: str, level: str, loss: str, dim: int, **others: Any) -> dict[str, Any]:
        fn = {"_target_": f"{module}.loss.DDPMTLoss", "loss_fn": {"_target_": f"{module}.loss.{loss}"}}
        return {
            "_target_": f"{_UNIT}.Task",
            "name": name,
            "level": level,
            "property": name,
            "loss_fn": {**fn, "reduction": "mean", "coefficient": 20 if name == "energy" else 2},
            "out_spec": {"dim": [dim], "dtype": "float32"},
            "normalizer": normalizer,
            "datasets": ["DATA"],
            "metrics": ["mae"],
            **others,
        }

    energy = task("energy", "system", "PerAtomMAELoss", 1, element_references=references)
    return [energy] if forces == NO_FORCES else [energy, task("forces", "atom", "L2NormLoss", 3)]


def _config(
    folder: Path,
    run: Run,
    data: Path,
    denoising: Mapping[str, Any],
    tasks: list[dict[str, Any]],
    model: dict[str, Any],
    steps: int,
) -> dict[str, Any]:
    tasks = [{**task, "datasets": [run.data]} for task in tasks]
    collate: dict[str, Any] = {"_target_": f"{_UNIT}.mt_collater_adapter", "tasks": tasks}
    if not tasks:
        simple = "fairchem.core.datasets.collaters.simple_collater.data_list_collater"
        collate = {"_target_": simple, "_partial_": True, "otf_graph": True}
    dataset = {"splits": {"train": {"src": [str(data)]}}, "format": "ase_db"}
    dataset["transforms"] = {"common_transform": {"dataset_name": run.data}}
    samplers = "fairchem.core.datasets.samplers.max_atom_distributed_sampler"
    loader = {
        "_target_": "fairchem.core.components.common.dataloader_builder.get_dataloader",
        "dataset": {
            "_target_": "fairchem.core.datasets.mt_concat_dataset.create_concat_dataset",
            "dataset_configs": {run.data: dataset},
            "combined_dataset_config": {"sampling": {"type": "temperature", "temperature": 1.0}},
        },
        "batch_sampler_fn": {
            "_target_": f"{samplers}.MaxAtomDistributedBatchSampler",
            "_partial_": True,
            "max_atoms": run.size.atoms,
            "shuffle": True,
            "seed": run.seed,
        },
        "num_workers": 0,
        "collate_fn": collate,
    }
    unit = (
        {"_target_": _OURS, "denoising": dict(denoising)} if denoising else {"_target_": f"{_UNIT}.MLIPTrainEvalUnit"}
    )
    return {
        "job": {
            "device_type": "CPU",
            "debug": True,
            "seed": run.seed,
            "run_dir": str(folder / "runs"),
            "run_name": "study",
            "scheduler": {"mode": "LOCAL", "ranks_per_node": 1, "distributed_init_method": "FILE"},
        },
        "runner": {
            "_target_": "fairchem.core.components.train.train_runner.TrainEvalRunner",
            "train_dataloader": loader,
            "eval_dataloader": loader,
            "train_eval_unit": {
                **unit,
                "job_config": "${job}",
                "tasks": tasks,
                "model": model,
                "optimizer_fn": {
                    "_target_": "torch.optim.AdamW",
                    "_partial_": True,
                    "lr": run.size.lr,
                    "weight_decay": 0.001,
                },
                "cosine_lr_scheduler_fn": {
                    "_target_": f"{_UNIT}._get_consine_lr_scheduler",
                    "_partial_": True,
                    "warmup_factor": 0.2,
                    "warmup_epochs": 0.5,
                    "lr_min_factor": 0.01,
                    "epochs": None,
                    "steps": steps,
                },
                "print_every": 10**9,
                "clip_grad_norm": 100,
                "ema_decay": 0.99,
            },
            "max_epochs": None,
            "max_steps": steps,
            "evaluate_every_n_steps": None,
            "callbacks": [
                {
                    "_target_": "fairchem.core.components.callbacks.TrainCheckpointCallback",
                    "checkpoint_every_n_steps": 10**9,
                    "max_saved_checkpoints": 1,
                }
            ],
        },
    }


# --- data -------------------------------------------------------------------------------------------------------------


def _write(path: Path, structures: Sequence[Atoms]) -> None:
    path.parent.mkdir()
    with ase.db.connect(str(path)) as rows:
        for atoms in structures:
            rows.write(atoms)
    np.savez(path.with_name("metadata.npz"), natoms=np.array([len(atoms) for atoms in structures]))


# --- the command ------------------------------------------------------------------------------------------------------


def chosen(options: argparse.Namespace) -> Iterator[Run]:
    """The runs that the options ask for, in an order that gives whole comparisons early."""
    for data, kind, seed in product(options.only, options.forces, options.seeds):
        forces = NO_FORCES if data in databases.ENERGIES_ALONE else kind
        if forces == NO_FORCES and kind != options.forces[0]:
            continue
        for arm in options.arms:
            if forces == NO_FORCES and "dens" in BESIDE.get(arm, {}):
                continue  # it takes forces
            yield Run(data, forces, arm, options.labels, seed, SIZES.get(data, Size()))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fairchem2.learning", description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FOLDER", help="folder of the ASE databases")
    add("--only", nargs="+", choices=DATA, default=list(DATA), metavar="DATA", help="these data alone")
    add("--forces", nargs="+", choices=FORCES, default=list(FORCES), metavar="KIND", help="direct, conservative")
    add("--arms", nargs="+", choices=(*BESIDE, *BEFORE), default=[*BESIDE, *BEFORE], metavar="ARM", help="these alone")
    add("--labels", type=int, default=24, metavar="N", help="structures with labels (default: 24)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    add("--results", type=Path, default=RESULTS, metavar="FILE", help="JSON lines, one a finished run; appended to")
    options = parser.parse_args(arguments)
    options.data, options.results = options.data.resolve(), options.results.resolve()
    results, here = Results(options.results), environment()
    for run in chosen(options):
        with results.claimed(asdict(run)) as mine, tempfile.TemporaryDirectory() as folder:
            if not mine:
                continue
            before = Path.cwd()
            os.chdir(folder)  # the host writes where it is
            try:
                scores = train(run, options.data, Path(folder), results, here)
            finally:
                os.chdir(before)
            results.append({"run": asdict(run), "scores": scores, **here})
            errors = scores["test"]
            found = ", ".join(f"{name} {1000 * error:.1f}" for name, error in errors.items())
            print(f"{run.data}, {run.forces}, {run.arm}, seed {run.seed}: {found} (meV/atom, meV/Å)", flush=True)


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # radial bases make many numbers too small to count, and slow
    logging.disable(logging.INFO)
    main()
