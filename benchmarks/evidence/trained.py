"""One training of a study: a model trained for so many steps, watched on held-out structures, timed."""

from __future__ import annotations

import functools
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from ase import Atoms
from torch.utils.data import Subset

from benchmarks.common import DENOISING, PLAIN, hydra, make_trainer, training
from benchmarks.evidence.databases import group_of
from benchmarks.evidence.forms import FORMS, Form
from benchmarks.evidence.neighbors import KeptNeighbors
from benchmarks.evidence.noise import judge
from benchmarks.evidence.results import Results, key_of
from benchmarks.evidence.structures import KeptAseDB, Splits, write
from fairchem_scd.denoising.quiet_heads import quieten as quieten_heads
from fairchem_scd.fairchem1.backbones import adapter_for
from fairchem_scd.fairchem1.hydra import DenoisingHydra

JUDGED = 96
"""At most so many held-out structures are denoised to judge a denoiser."""


@dataclass(frozen=True)
class Model:
    """Arguments of `common.hydra`: backbone, blocks, channels, highest degree, cutoff in Å, neighbours; radial basis.

    `lmax` counts for EquiformerV2 alone, `radial` for PaiNN alone.
    """

    backbone: str = "painn"
    layers: int = 3
    channels: int = 64
    lmax: int = 2
    radius: float = 4.2
    neighbors: int = 30
    radial: int = 32
    mixed_sizes: bool = True

    def block(self) -> dict[str, Any]:
        """The `model:` block."""
        sizes = asdict(self)
        name, radial = sizes.pop("backbone"), sizes.pop("radial")
        block = hydra(name, **sizes)
        if name == "painn":
            block["backbone"]["num_rbf"] = radial
        return block


@dataclass(frozen=True)
class Length:
    """How a training goes: AdamW, a linear warm-up of a twentieth of the steps, then a cosine."""

    steps: int
    batch_size: int
    lr: float
    ema: float | None = 0.99
    weight_decay: float = 0.001
    clip: float = 100.0

    def optim(self, structures: int) -> dict[str, Any]:
        """The `optim:` block; epochs are whole, so the number of steps is nearly the one asked for."""
        epoch = math.ceil(structures / self.batch_size)
        how = {"ema": self.ema, "weight_decay": self.weight_decay, "clip": self.clip}
        block = training(epochs=max(1, round(self.steps / epoch)), batch_size=self.batch_size, lr=self.lr, **how)
        # The host makes whole steps of it, rounding down.
        warmup = max(1, self.steps // 20)
        block["scheduler_params"]["warmup_epochs"] = (warmup + 0.5) / epoch
        return block


@dataclass(frozen=True)
class Pretraining:
    """Denoising of structures alone.

    Attributes:
        form: of the condition, one of `forms.FORMS`.
        std: σ, Å.
    """

    form: str
    std: float
    length: Length
    seed: int


class Watch:
    """Judges a trainer at so many points of its training, in place of the host's validation, and times the steps.

    Attributes:
        curve: what `judge` said, with the step.
        seconds: processor time of the judging, to be left out of the training's.
    """

    def __init__(self, trainer: Any, judge: Callable[[Any], dict[str, Any]], at: int, metric: str) -> None:
        self.curve: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.steps = trainer.config["optim"]["max_epochs"] * len(trainer.train_loader)
        trainer.config["optim"]["eval_every"] = max(1, self.steps // at)
        trainer.config["optim"]["checkpoint_every"] = 10**12

        def validate(*args: Any, **kwargs: Any) -> dict[str, Any]:
            start = time.process_time()
            with averaged(trainer):
                self.curve.append({"step": trainer.step, **judge(trainer)})
            self.seconds += time.process_time() - start
            return {metric: {"metric": math.inf}}  # the host is to keep no best checkpoint

        trainer.validate = validate

    def train(self, trainer: Any) -> dict[str, Any]:
        """Train to the end.

        Returns:
            Number of steps, processor time of one in seconds, and the curve.
        """
        start = time.process_time()
        trainer.train(disable_eval_tqdm=True)
        seconds = time.process_time() - start - self.seconds
        return {"steps": trainer.step, "seconds_per_step": round(seconds / trainer.step, 5), "curve": self.curve}


@contextmanager
def averaged(trainer: Any) -> Iterator[None]:
    """While entered, the model is in eval mode and has the moving average of its weights, if the trainer keeps one."""
    training = trainer.model.training
    trainer.model.eval()
    if trainer.ema:
        trainer.ema.store()
        trainer.ema.copy_to()
    try:
        yield
    finally:
        if trainer.ema:
            trainer.ema.restore()
        trainer.model.train(training)


# --- energies and forces ----------------------------------------------------------------------------------------------


def train_labels(
    model: Model,
    length: Length,
    splits: Splits,
    labelled: Sequence[Atoms],
    *,
    seed: int,
    denoising: Mapping[str, Any],
    start: Path | None,
    start_form: Form = FORMS["embedding"],
    quiet_heads: bool,
    forces: bool = True,
    points: int = 5,
    keep: Path | None = None,
) -> dict[str, Any]:
    """Train energies and forces, and score them.

    Args:
        labelled: what to train on.
        denoising: the `task.denoising` block; empty: the host's own trainer.
        start: checkpoint whose backbone to start from.
        start_form: the form of the condition that it was trained with, see `form_of`.
        quiet_heads: let the last layer of the energy head start at zero.
        forces: train forces too, not energies alone.
        points: how often to look at the held-out structures.
        keep: where to write the averaged weights at the end, as a checkpoint.

    Returns:
        What `Watch.train` returns; `held_out` and `test`, errors in eV per atom and eV/Å of the averaged weights at the
        end; `zero_test`, those of outputs that are zero; `test_groups`, those of `test` by `databases.group_of`, with
        the number of structures, where the data has groups.
    """
    block = model.block()
    if start is not None:
        del block["backbone"]
        block["finetune_config"] = {"starting_checkpoint": str(start)}
    with tempfile.TemporaryDirectory() as folder:
        rows = {
            name: {"format": "kept_ase_db", "src": write(part, Path(folder) / f"{name}.db"), "a2g_args": dict(_LABELS)}
            for name, part in (("train", labelled), ("val", splits.held_out), ("test", splits.test))
        }
        test = KeptAseDB(rows.pop("test"))
        rows["train"]["transforms"] = _fitted(forces)
        with in_form(start_form):
            trainer = make_trainer(
                DENOISING if denoising else PLAIN,
                block,
                rows,
                length.optim(len(labelled)),
                seed=seed,
                denoising=dict(denoising),
                forces=forces,
            )
        KeptNeighbors(trainer._unwrapped_model.backbone)
        if quiet_heads:
            quieten(trainer)
        watch = Watch(trainer, lambda t: errors(t, t.val_dataset), points, "forces_mae" if forces else "energy_mae")
        scores = watch.train(trainer)
        with averaged(trainer):
            scores |= {"held_out": errors(trainer, trainer.val_dataset), "test": errors(trainer, test)}
            scores["zero_test"] = errors(trainer, test, zero=True)
            if groups := errors_by_group(trainer, test, [group_of(atoms) for atoms in splits.test]):
                scores["test_groups"] = groups
            if keep is not None:
                torch.save({"state_dict": trainer.model.state_dict(), "config": trainer.config, "ema": None}, keep)
    return scores


_LABELS = {"r_energy": True, "r_forces": True}


def _fitted(forces: bool) -> dict[str, Any]:
    """Sizes vary: energies relative to the best energy per atom. All fitted by the host, to the labels trained on."""
    targets = {"energy": {"mean": 0.0}, **({"forces": {"mean": 0.0}} if forces else {})}
    return {
        "element_references": {"fit": {"targets": ["energy"], "batch_size": 32}},
        "normalizer": {"fit": {"targets": targets, "batch_size": 32}},
    }


def quieten(trainer: Any) -> None:
    """Let the energy head of a host trainer start as with `task.denoising.quiet_heads`, which it does not have."""
    model = trainer._unwrapped_model
    quieten_heads(model.output_heads, adapter_for(model.backbone), readout=True)
    if trainer.ema:
        with torch.no_grad():
            for shadow, parameter in zip(trainer.ema.shadow_params, trainer.ema._get_parameters(None), strict=True):
                shadow.copy_(parameter)


@torch.no_grad()
def errors(trainer: Any, rows: Any, *, zero: bool = False, batch_size: int = 32) -> dict[str, float]:
    """Errors of a trainer's present weights on a dataset.

    Args:
        zero: of outputs that are zero instead.

    Returns:
        `energy_mae`, eV per atom; where forces are an output, `force_mae` and `force_rmse` of components, eV/Å.
    """
    energies, forces = [], []
    for start in range(0, len(rows), batch_size):
        batch = trainer.collater([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        out = trainer._forward(batch)
        out = {name: torch.zeros_like(value) if zero else value for name, value in out.items()}
        energy = trainer._denorm_preds("energy", out["energy"], batch).view(-1)
        energies.append((energy - batch.energy) / batch.natoms)
        if "forces" in out:
            forces.append(trainer._denorm_preds("forces", out["forces"], batch) - batch.forces)
    found = {"energy_mae": torch.cat(energies).abs().mean()}
    if forces:
        force = torch.cat(forces)
        found |= {"force_mae": force.abs().mean(), "force_rmse": force.square().mean().sqrt()}
    return {name: round(value.item(), 6) for name, value in found.items()}


def errors_by_group(trainer: Any, rows: Any, groups: Sequence[str | None]) -> dict[str, dict[str, float]]:
    """What `errors` returns for each group of a dataset's rows, with the number of its `structures`."""
    found = {}
    for group in sorted({group for group in groups if group is not None}):
        chosen = [i for i, name in enumerate(groups) if name == group]
        found[group] = {"structures": len(chosen), **errors(trainer, Subset(rows, chosen))}
    return found


# --- structures alone -------------------------------------------------------------------------------------------------


def denoiser(
    model: Model,
    length: Length,
    structures: Sequence[Atoms],
    held_out: Sequence[Atoms],
    folder: Path,
    *,
    form: Form,
    std: float,
    seed: int,
) -> Any:
    """A trainer of denoising alone, which reads no labels.

    Args:
        form: of the condition; a model is changed before the host makes an optimiser for its weights.
        std: σ, Å.
    """
    with in_form(form):
        trainer = make_trainer(
            DENOISING,
            model.block(),
            {
                "train": {
                    "format": "kept_ase_db",
                    "src": write(structures, folder / "train.db"),
                    "a2g_args": {"r_energy": False, "r_forces": False},
                },
                "val": {"src": write(held_out, folder / "held_out.db")},
            },
            length.optim(len(structures)),
            seed=seed,
            denoising={"scd": {"std": std, **form.scd}},
            supervised=False,
            folder=folder,
        )
    KeptNeighbors(trainer._unwrapped_model.backbone)
    if form.change_task is not None:
        form.change_task(trainer.tasks["scd"])
    return trainer


@contextmanager
def in_form(form: Form) -> Iterator[None]:
    """While entered, models of the package have a form of the condition; what follows has equal random numbers.

    So do the models that the package makes of checkpoints, whose weights fit no other form.
    """
    initialise = DenoisingHydra.__init__

    @functools.wraps(initialise)
    def initialise_and_change(model: DenoisingHydra, *args: Any, **kwargs: Any) -> None:
        initialise(model, *args, **kwargs)
        if form.change is not None:
            with torch.random.fork_rng(devices=[]):
                form.change(model)

    with mock.patch.object(DenoisingHydra, "__init__", initialise_and_change):
        yield


def watch_denoising(trainer: Any, points: int) -> dict[str, Any]:
    """Train a denoiser, judging its averaged weights at so many points.

    Returns:
        What `Watch.train` returns, with what `noise.judge` finds in its curve; `structures`: each structure's noise
        errors at the end, by what it is told.
    """

    def means(trainer: Any) -> dict[str, Any]:
        return {name: value for name, value in judge(trainer).items() if name != "structures"}

    scores = Watch(trainer, means, points, "denoising_pos_mae").train(trainer)
    with averaged(trainer):
        scores["structures"] = judge(trainer)["structures"]
    return scores


def pretrain(model: Model, how: Pretraining, splits: Splits, checkpoint: Path) -> dict[str, Any]:
    """Denoise the training structures, and keep the averaged weights as a checkpoint.

    Returns:
        What `watch_denoising` returns.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = denoiser(
            model,
            how.length,
            splits.train,
            splits.held_out[:JUDGED],
            Path(folder),
            form=FORMS[how.form],
            std=how.std,
            seed=how.seed,
        )
        batch = next(iter(trainer.train_loader))
        assert not {"energy", "forces"} & set(batch.keys()), "labels were read in pre-training"
        scores = watch_denoising(trainer, 4)
        saved = trainer.save(checkpoint_file="pretrained.pt", training_state=False)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        part = checkpoint.with_suffix(".part")
        shutil.copyfile(saved, part)
        part.replace(checkpoint)
    return scores


def form_of(run: Any) -> Form:
    """The form of the condition in the pre-training that a run starts from; the package's, where there was none."""
    return FORMS["embedding" if run.pretraining is None else run.pretraining.form]


def start_of(run: Any, splits: Splits, results: Results, here: Mapping[str, str], **before: str) -> Path | None:
    """The checkpoint that a run starts from, pre-trained now if it is not there yet; None: random weights.

    Checkpoints are kept beside the results; each pre-training has a line of its own in them.

    Args:
        run: with `data`, `model` and `pretraining`.
        splits: of its data.
        results: of the study.
        here: what ends a line.
        before: what begins it.
    """
    if run.pretraining is None:
        return None
    settings, checkpoint = kept_pretraining(run, results)
    with results.claimed(settings, wait=True) as mine:
        if mine or not checkpoint.exists():
            scores = pretrain(run.model, run.pretraining, splits, checkpoint)
            if mine:
                results.append({**before, "run": settings, "scores": scores, **here})
    return checkpoint


def kept_pretraining(run: Any, results: Results) -> tuple[dict[str, Any], Path]:
    """What tells a run's pre-training from others, and where its checkpoint is, once it is there.

    Args:
        run: with `data`, `model` and `pretraining`.
        results: of the study that pre-trains.
    """
    settings = {"data": run.data, "model": asdict(run.model), "pretraining": asdict(run.pretraining)}
    return settings, results.path.with_suffix(".checkpoints") / f"{key_of(settings)}.pt"
