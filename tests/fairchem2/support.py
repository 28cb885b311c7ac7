"""Sample data, configs, runs and units that tests of the second host share."""

from __future__ import annotations

import copy
import logging
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ase.db
import fairchem.core.launchers.slurm_launch as launch
import hydra
import numpy as np
import torch
import torch.distributed as dist
import yaml
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from fairchem.core._cli import main
from fairchem.core.common import distutils
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from fairchem.core.units.mlip_unit.mlip_unit import UNIT_INFERENCE_CHECKPOINT, MLIPTrainEvalUnit
from omegaconf import OmegaConf
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torchtnt.framework import train

from fairchem_scd.denoising.corruption import Corruption
from fairchem_scd.denoising.plan import Plan
from fairchem_scd.denoising.tasks import build_tasks
from fairchem_scd.fairchem2.batch import structures_of
from fairchem_scd.fairchem2.model import convert
from fairchem_scd.fairchem2.unit import DenoisingTrainEvalUnit

UNIT = "fairchem.core.units.mlip_unit.mlip_unit"
UMA = "fairchem.core.models.uma"
OURS = "fairchem_scd.fairchem2.unit.DenoisingTrainEvalUnit"


# --- data -------------------------------------------------------------------------------------------------------------


def crystal(seed: int, repeat: tuple[int, int, int] = (1, 1, 1)) -> Atoms:
    """A small cell of an alloy, strained and rattled, with the labels of a classical potential; one atom is fixed."""
    rng = np.random.default_rng(seed)
    atoms = bulk("Cu", cubic=True, a=3.7 + 0.2 * rng.random()).repeat(repeat)
    atoms.set_atomic_numbers(rng.choice([13, 29, 47], len(atoms)))
    atoms.set_cell(atoms.cell @ (np.eye(3) + 0.02 * rng.standard_normal((3, 3))), scale_atoms=True)
    atoms.positions += 0.06 * rng.standard_normal((len(atoms), 3))
    return labelled(atoms, fixed=[0])


def cluster(seed: int) -> Atoms:
    """A molecule without a cell, with the labels of a classical potential."""
    rng = np.random.default_rng(seed)
    atoms = molecule(["H2O", "NH3", "CH4", "CH3OH"][seed % 4])
    atoms.positions += 0.05 * rng.standard_normal((len(atoms), 3))
    return labelled(atoms)


def labelled(atoms: Atoms, fixed: Sequence[int] = ()) -> Atoms:
    """The structure with its energy, forces and, in a cell, stress."""
    atoms.calc = EMT()
    energy, forces = atoms.get_potential_energy(), atoms.get_forces(apply_constraint=False)
    stress = atoms.get_stress(apply_constraint=False) if atoms.pbc.all() else None
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces, stress=stress)
    if fixed:
        atoms.set_constraint(FixAtoms(fixed))
    return atoms


def crystals(count: int, seed: int = 0) -> list[Atoms]:
    return [crystal(seed + i, (1, 1, 1 + i % 2)) for i in range(count)]


def write(folder: Path, split: str, structures: Sequence[Atoms]) -> None:
    """A database as the host reads it, where `run_config` looks for it."""
    path = database(folder, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    with ase.db.connect(str(path)) as rows:
        for atoms in structures:
            rows.write(atoms)
    np.savez(path.parent / "metadata.npz", natoms=np.array([len(atoms) for atoms in structures]))


def database(folder: Path, split: str) -> Path:
    """Where the database of a split is."""
    return folder / split / f"{split}.aselmdb"


def sample_data(folder: Path) -> Path:
    """The folder, with data for runs."""
    write(folder, "train", crystals(8))
    write(folder, "val", crystals(4, 100))
    return folder


def row(atoms: Atoms, dataset: str = "mo", **labels: str) -> AtomicData:
    """One structure as the host's dataset gives it; `labels` are further names for its labels."""
    data = AtomicData.from_ase(atoms, task_name=dataset, r_data_keys=["charge", "spin"])
    data.dataset_name = f"{dataset}.train"
    if "stress" in data:
        data.stress = data.stress.reshape(1, 9)  # as configs have the host transform it
    for name, label in labels.items():
        data[name] = data[label].clone()
    return data


def batch_of(structures: Sequence[Atoms], **how: Any) -> AtomicData:
    """Structures as a batch of the host, with the labels that all of them have."""
    rows = [row(atoms, **how) for atoms in structures]
    for key in ("stress", "forces", "energy"):
        if not all(key in each for each in rows):
            for each in rows:
                each.__keys__.discard(key)
    return atomicdata_list_to_batch(rows)


# --- configs ----------------------------------------------------------------------------------------------------------


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
                **_optimisation(steps),
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


def _optimisation(steps: int) -> dict[str, Any]:
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


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A finished run.

    Attributes:
        folder: where the host put it.
        lines: what was logged: the host's dictionaries as such, all else as text.
        unit: that trained.
    """

    folder: Path
    lines: list[Any] = field(default_factory=list)
    unit: MLIPTrainEvalUnit | None = None

    def logged(self, name: str) -> list[float]:
        """All values of a metric, in order."""
        return [line[name] for line in self.lines if isinstance(line, dict) and name in line]

    def checkpoint(self, name: str = "final") -> Path:
        return self.folder / "checkpoints" / name

    def inference(self, name: str = "final") -> Any:
        return torch.load(self.checkpoint(name) / UNIT_INFERENCE_CHECKPOINT, weights_only=False)

    def state(self, name: str = "final") -> dict[str, Any]:
        """The state of the unit in a training checkpoint."""
        with tempfile.TemporaryDirectory() as folder:
            dcp_to_torch_save(self.checkpoint(name), f"{folder}/state.pt")
            return torch.load(f"{folder}/state.pt", weights_only=False)["unit_state"]


def run(config: Mapping[str, Any] | Path, name: str, *overrides: str) -> Run:
    """Run the host's command in this process.

    Args:
        config: a config, or the path of one, such as a checkpoint's resume.yaml.
        name: of the run's folder.
        overrides: of Hydra.
    """
    if isinstance(config, Path):
        path, made = config, OmegaConf.to_container(OmegaConf.load(config))
    else:
        made = copy.deepcopy(dict(config))
        path = Path(made["job"]["run_dir"]) / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(made))
    new = "" if "timestamp_id" in made["job"] else "+"
    finished = Run(Path(made["job"]["run_dir"]) / name)
    with _watched(finished):
        hydra.core.global_hydra.GlobalHydra.instance().clear()
        try:
            main(Namespace(config=str(path)), [f"{new}job.timestamp_id={name}", *overrides])
        finally:
            if distutils.initialized():  # a run that raised leaves its process group, and the next could not begin
                distutils.cleanup()
    return finished


class _watched(logging.Handler):
    """While entered, what the host logs goes to a run, and so does its unit."""

    _LEFT_OUT = ("setup_logging", "write_environment_report")  # the latter takes longer than the run

    def __init__(self, finished: Run) -> None:
        super().__init__(logging.INFO)
        self.finished = finished

    def emit(self, record: logging.LogRecord) -> None:
        value = record.args if isinstance(record.args, dict) else record.msg
        self.finished.lines.append(value if isinstance(value, dict) else record.getMessage())

    def __enter__(self) -> None:
        root, finished = logging.getLogger(), self.finished
        self.before = root.handlers[:], root.level, {name: getattr(launch, name) for name in self._LEFT_OUT}
        self.instantiate = hydra.utils.instantiate
        root.handlers = [self]
        root.setLevel(logging.INFO)

        def instantiate(*args: Any, **kwargs: Any) -> Any:
            runner = self.instantiate(*args, **kwargs)
            finished.unit = getattr(runner, "train_eval_unit", finished.unit)
            return runner

        for name in self._LEFT_OUT:
            setattr(launch, name, lambda *_, **__: None)
        hydra.utils.instantiate = instantiate

    def __exit__(self, *_: Any) -> None:
        root = logging.getLogger()
        root.handlers, level, left_out = self.before
        root.setLevel(level)
        for name, function in left_out.items():
            setattr(launch, name, function)
        hydra.utils.instantiate = self.instantiate


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested states differ, to the bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        missing = [f"{path}/{key}: missing" for key in set(a) ^ set(b)]
        return missing + [line for key in set(a) & set(b) for line in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [f"{path}: {(a.double() - b.double()).abs().max():.3g}"]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        return [line for i, (x, y) in enumerate(zip(a, b, strict=True)) for line in differences(x, y, f"{path}/{i}")]
    return [] if a == b else [f"{path}: {a} and {b}"]


# --- units without a command ------------------------------------------------------------------------------------------


def one_rank() -> None:
    """A process group of one rank, which the host's unit cannot do without."""
    if not dist.is_initialized():
        distutils.assign_device_for_local_rank(cpu=True, local_rank=0)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def unit_of(
    denoising: Mapping[str, Any] | None = None,
    *,
    model: Mapping[str, Any] | None = None,
    tasks: Sequence[Mapping[str, Any]] | None = None,
    job: Mapping[str, Any] | None = None,
    cls: type[MLIPTrainEvalUnit] | None = None,
    **arguments: Any,
) -> MLIPTrainEvalUnit:
    """A unit as a run would have it, with the same fresh weights for equal models."""
    one_rank()
    torch.manual_seed(1)
    config = {"seed": 0, "debug": True, "logger": None, "graph_parallel": {"group_size": 1}, **(job or {})}
    built = hydra.utils.instantiate(dict(model_config() if model is None else model))
    made = [hydra.utils.instantiate(each) for each in (tasks_config() if tasks is None else tasks)]
    optimisation = {
        name: hydra.utils.instantiate(value) if isinstance(value, dict) else value
        for name, value in _optimisation(10).items()
    }
    cls = cls or (MLIPTrainEvalUnit if denoising is None else DenoisingTrainEvalUnit)
    block = {} if denoising is None else {"denoising": OmegaConf.create(dict(denoising))}
    return cls(OmegaConf.create(config), built, tasks=made, **block, **{**optimisation, **arguments})


def train_on(unit: MLIPTrainEvalUnit, batches: Iterable[AtomicData]) -> None:
    """Train a unit on batches, a step each, as one epoch more."""
    epochs = unit.train_progress.num_epochs_completed + 1
    train(unit, [copy.deepcopy(batch) for batch in batches], max_epochs=epochs)


def plain_state(unit: MLIPTrainEvalUnit) -> dict[str, Any]:
    """The state of a unit that has trained, without what denoising adds to it."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(item) for key, item in value.items() if "denoising" not in str(key).split(".")}
        if isinstance(value, list):
            return [without(item) for item in value if "denoising" not in str(item).split(".")]
        return value.clone() if isinstance(value, torch.Tensor) else value

    return without(unit.state_dict())


def inner(unit: MLIPTrainEvalUnit) -> torch.nn.Module:
    """The model within the host's wrapper."""
    return unit.model.module


# --- models without a unit --------------------------------------------------------------------------------------------


def converted(
    denoising: Mapping[str, Any] | None, model: Mapping[str, Any] | None = None, *, supervised: bool = True
) -> torch.nn.Module:
    """A model with the tasks of a block; the host's own where there is no block. Equal weights for equal models."""
    torch.manual_seed(1)
    made = hydra.utils.instantiate(dict(model_config() if model is None else model))
    if denoising is not None:
        convert(made, build_tasks(denoising, supervised)[0])
    return made.train()


def stirred(model: torch.nn.Module) -> torch.nn.Module:
    """The model with other weights wherever they are zero at the start, as after some training."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


def plan_of(
    model: torch.nn.Module,
    batch: AtomicData,
    task: str | None = None,
    *,
    step: int = 1,
    conditioned: Sequence[bool] | None = None,
) -> tuple[Plan, Corruption]:
    """The plan of a step of one of a model's tasks.

    Args:
        conditioned: for each structure, whether the noisy pass is conditioned on its embedding; None: as drawn.
    """
    tasks = model.denoising_tasks
    drawn = tasks[task or next(iter(tasks))]
    structures = structures_of(batch, model.adapter.periodic(batch.pbc), _LABELLED)
    corruption = drawn.corrupt(structures, seed=0, step=step)
    passes = drawn.passes(structures, corruption, seed=0, step=step)
    if conditioned is not None:
        passes = tuple(
            replace(run, conditioned=torch.tensor(conditioned)) if run.conditioned is not None else run
            for run in passes
        )
    return Plan(drawn.name, passes), corruption


_LABELLED = [Namespace(name=name, property=name) for name in ("energy", "forces", "stress")]


def gradients(
    model: torch.nn.Module, batch: AtomicData, plan: Plan | None = None, *, value: bool = False
) -> dict[str, torch.Tensor] | float:
    """The gradient of every trained parameter, for a loss of all that the model returns; or the loss itself."""
    model.zero_grad()
    torch.manual_seed(5)
    out = model(copy.deepcopy(batch), *(() if plan is None else (plan,)))
    generator = torch.Generator().manual_seed(6)
    loss = 0.0
    for name in sorted(_flat(out)):
        weights = torch.randn(_flat(out)[name].shape, generator=generator, dtype=torch.float64)
        loss = loss + (_flat(out)[name] * weights).sum() + (_flat(out)[name] ** 2).sum()
    if value:
        return loss.item()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def _flat(out: Any, name: str = "") -> dict[str, torch.Tensor]:
    """What a model returned, by name; embeddings are not for a loss."""
    if isinstance(out, torch.Tensor):
        return {name: out}
    found = {}
    for key, each in out.items():
        if "embeddings" not in key:
            found.update(_flat(each, f"{name}.{key}"))
    return found


@contextmanager
def with_rotations_fixed() -> Iterator[None]:
    """While entered, the host's random frames of edges are the same in every pass over as many edges."""
    drawn = torch.rand, torch.rand_like

    def same(like: torch.Tensor) -> torch.Tensor:
        return torch.full_like(like, 0.3)

    torch.rand_like = same
    torch.rand = lambda *size, **how: torch.full(size if isinstance(size[0], int) else size[0], 0.3, **how)
    try:
        yield
    finally:
        torch.rand, torch.rand_like = drawn
