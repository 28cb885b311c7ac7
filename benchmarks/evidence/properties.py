"""What pre-training buys for a scalar property: HOMO-LUMO gaps of molecules, with and without it.

PaiNN or EquiformerV2 learns the gap of frames of molecular dynamics, or of relaxed molecules, from few labels: from
random weights, and from weights pre-trained on the structures of all training data; with noisy nodes beside the
property, as SCD's paper fine-tunes, and without. The data are made by `python -m benchmarks.evidence.molecules FOLDER`
and `… .relaxed_molecules FOLDER`. Pre-trainings are as in the suites `molecules` and `equiformer_molecules` of
`benchmarks.evidence.learning`, and shared with them.

    python -m benchmarks.evidence.properties --data FOLDER --learning RESULTS --seeds 0 1 2

Runs end with one line each in the results file; a run that is in there is not run again.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from torch import Tensor

from benchmarks.common import DENOISING, PLAIN, existing_folder, make_trainer
from benchmarks.evidence import databases, learning, structures
from benchmarks.evidence.neighbors import KeptNeighbors
from benchmarks.evidence.results import Results, environment
from benchmarks.evidence.structures import KeptAseDB, Splits, write
from benchmarks.evidence.study import add_options, begin
from benchmarks.evidence.trained import Length, Model, Pretraining, Watch, averaged, form_of, in_form, quieten, start_of

RESULTS = Path(__file__).parents[1] / "results" / "properties.jsonl"
NOISY_NODES = {"noisy_nodes": {"std": 0.005}}
"""σ in Å, that of SCD's paper for molecules."""
BACKBONES = {
    "painn": learning.SUITES["molecules"],
    "equiformer_v2": learning.SUITES["equiformer_molecules"],
}
"""Model and pre-training."""
LENGTH = Length(1000, 8, 2e-3)
DATA = {"gaps": "molecules", "relaxed_gaps": "relaxed_molecules"}
"""The structures whose gaps are learned, by the name of `structures.load`."""


@dataclass(frozen=True)
class Run:
    """All that decides a run's result.

    Attributes:
        data: one of `DATA`.
        arm: what the run is called in tables.
        labels: how many structures have labels.
        noisy_nodes: train noisy nodes beside the property.
        pretraining: before that; None: random weights.
        readout: of the atoms' contributions; a gap does not grow with the molecule, so their mean.
    """

    arm: str
    labels: int
    seed: int
    model: Model
    length: Length
    noisy_nodes: bool
    pretraining: Pretraining | None = None
    data: str = "gaps"
    readout: str = "mean"


def runs(
    data: str, backbone: str, budgets: Sequence[int], seeds: Sequence[int], lengths: Sequence[Length]
) -> Iterator[Run]:
    """All runs, in an order that gives whole comparisons early."""
    suite = BACKBONES[backbone]
    for labels, seed, length in product(budgets, seeds, lengths):
        for noisy, start in product((False, True), (None, *learning.STARTS)):
            arm = ("scratch" if start is None else start) + (", noisy nodes" if noisy else "")
            before = suite.pretraining(seed, start) if start else None
            yield Run(arm, labels, seed, suite.model, length, noisy, before, data)


@cache
def load(data: str, folder: Path) -> Splits:
    """The splits of `structures.load(DATA[data], folder)`, with the gap [eV] in the place of the energy."""
    return structures.split(*(_of_gaps(part) for part in databases.read(DATA[data], folder)))


def _of_gaps(molecules: list[Atoms]) -> list[Atoms]:
    found = []
    for molecule in molecules:
        atoms = molecule.copy()
        atoms.calc = SinglePointCalculator(atoms, energy=databases.gap_of(molecule))
        found.append(atoms)
    return found


def train(run: Run, splits: Splits, start: Path | None) -> dict[str, Any]:
    """Train the gap and score it.

    Returns:
        What `Watch.train` returns, and the mean absolute error in eV on the held-out and on the test frames.
    """
    labelled = splits.labelled(run.labels, run.seed)
    block = run.model.block()
    head = block["heads"]["energy"]
    if run.model.backbone == "equiformer_v2":
        head["reduce"] = "mean"
    if start is not None:
        del block["backbone"]
        block["finetune_config"] = {"starting_checkpoint": str(start)}
    with tempfile.TemporaryDirectory() as folder:
        rows = {
            name: {
                "format": "kept_ase_db",
                "src": write(part, Path(folder) / f"{name}.db"),
                "a2g_args": {"r_energy": True, "r_forces": False},
            }
            for name, part in (("train", labelled), ("val", splits.held_out), ("test", splits.test))
        }
        test = KeptAseDB(rows.pop("test"))
        gaps = np.array([atoms.get_potential_energy() for atoms in labelled])
        scale = {"mean": float(gaps.mean()), "stdev": float(gaps.std())}
        rows["train"]["transforms"] = {"normalizer": {"energy": scale}}
        with in_form(form_of(run)):
            trainer = make_trainer(
                DENOISING if run.noisy_nodes else PLAIN,
                block,
                rows,
                run.length.optim(len(labelled)),
                seed=run.seed,
                denoising=NOISY_NODES if run.noisy_nodes else {},
                forces=False,
            )
        KeptNeighbors(trainer._unwrapped_model.backbone)
        if run.model.backbone == "painn":
            trainer._unwrapped_model.output_heads["energy"].register_forward_hook(mean_of_atoms)
        quieten(trainer)
        watch = Watch(trainer, lambda t: {"mae": error(t, t.val_dataset)}, 5, "energy_mae")
        scores = watch.train(trainer)
        with averaged(trainer):
            scores |= {"held_out": error(trainer, trainer.val_dataset), "test": error(trainer, test)}
    return scores


def mean_of_atoms(head: Any, inputs: tuple[Any, ...], out: dict[str, Tensor]) -> dict[str, Tensor]:
    """A forward hook for heads that add up what the atoms give: the mean in place of the sum."""
    data = inputs[0]
    return {"energy": out["energy"] / data.natoms.view_as(out["energy"])}


@torch.no_grad()
def error(trainer: Any, rows: Any, batch_size: int = 64) -> float:
    """Mean absolute error of a trainer's present weights on a dataset, eV."""
    found = []
    for start in range(0, len(rows), batch_size):
        batch = trainer.collater([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        predicted = trainer._denorm_preds("energy", trainer._forward(batch)["energy"], batch).view(-1)
        found.append((predicted - batch.energy).abs())
    return round(torch.cat(found).mean().item(), 5)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence.properties", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--data", type=existing_folder, required=True, metavar="FOLDER", help="folder of the ASE databases")
    add("--only", choices=DATA, default="gaps", help="which gaps; default: gaps")
    add("--backbone", choices=BACKBONES, default="painn", help="default: painn")
    add("--labels", nargs="+", type=int, default=[64, 256], metavar="N", help="default: 64 256")
    add("--steps", type=int, default=LENGTH.steps, metavar="N", help=f"default: {LENGTH.steps}")
    add("--lr", nargs="+", type=float, default=[LENGTH.lr], metavar="RATE", help="learning rates")
    add("--arms", nargs="+", metavar="ARM", help="these arms alone, by their names")
    add("--learning", type=Path, default=learning.RESULTS, metavar="FILE", help="results with checkpoints beside them")
    add_options(parser, seeds=(0, 1, 2), results=RESULTS)
    options = parser.parse_args(arguments)
    begin(options)
    results, learned, here = Results(options.results), Results(options.learning), environment()
    splits = load(options.only, options.data)
    lengths = [replace(LENGTH, steps=options.steps, lr=lr) for lr in options.lr]
    for run in runs(options.only, options.backbone, options.labels, options.seeds, lengths):
        if options.arms and run.arm not in options.arms:
            continue
        with results.claimed(asdict(run)) as mine:
            if mine:
                start = start_of(replace(run, data=DATA[run.data]), splits, learned, here, suite="molecules")
                scores = train(run, splits, start)
                results.append({"run": asdict(run), "scores": scores, **here})
                found = f"{scores['held_out']:.3f} eV held out, {scores['test']:.3f} eV on the test structures"
                what = f"{run.data}, {run.labels} labels, {run.arm}, lr {run.length.lr}, seed {run.seed}"
                print(f"{what}: {found}", flush=True)


if __name__ == "__main__":
    main()
