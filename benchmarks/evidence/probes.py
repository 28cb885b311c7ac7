"""What frozen embeddings hold: linear and nearest-neighbour probes of features and of SCD's c.

The backbones are those that `benchmarks.evidence.learning` pre-trained, one for each seed, beside two that are made
here: with random weights, and trained on all labels for as many steps as pre-training had. A probe sees the features
pooled over a structure's atoms, or c, and no gradient reaches the backbone: ridge regression for energy per atom,
volume per atom and the HOMO-LUMO gap, and the class of the nearest structure for the group of a metal's structure and
the polymorph of an oxide, there the nearest of those of other metals. Probes are fitted to the training structures and
scored on the test file. Runs end with one line each in the results file:

    python -m benchmarks.evidence.probes --data FOLDER --learning RESULTS --only Mo --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.spacegroup import get_spacegroup

from benchmarks.command_line import parser_of
from benchmarks.common import existing_folder
from benchmarks.evidence import databases, learning, structures
from benchmarks.evidence.forms import FORMS
from benchmarks.evidence.results import Results, environment
from benchmarks.evidence.structures import KeptAseDB, Splits
from benchmarks.evidence.study import add_options, begin
from benchmarks.evidence.trained import (
    Length,
    Model,
    Pretraining,
    denoiser,
    form_of,
    in_form,
    kept_pretraining,
    train_labels,
)
from fairchem_scd.commands.embed.embeddings import embed

RESULTS = Path(__file__).parents[1] / "results" / "probes.jsonl"
SUITES = {"Mo": "few", "Li": "few", "oxides": "energies", "molecules": "molecules"}
"""Where `benchmarks.evidence.learning` has the data's model and pre-training."""
_ENERGY = {"energy": lambda atoms: atoms.get_potential_energy() / len(atoms)}
_CRYSTAL = {**_ENERGY, "volume": lambda atoms: atoms.get_volume() / len(atoms)}
_METAL = {**_CRYSTAL, "group": databases.group_of}
TARGETS: dict[str, dict[str, Callable[[Atoms], Any]]] = {
    "Mo": _METAL,
    "Li": _METAL,
    # Its six polymorphs have six space groups.
    "oxides": {**_CRYSTAL, "polymorph": lambda atoms: get_spacegroup(atoms).symbol},
    "molecules": {**_ENERGY, "gap": databases.gap_of},
}
"""What probes are to find: energies and volumes per atom, eV and Å³; gaps, eV; classes."""
UNTRAINED, SUPERVISED = "random weights", "energy and forces, all labels"
PENALTIES = np.logspace(-4, 4, 17)
"""Of ridge regression on standardised features, times the number of structures."""


@dataclass(frozen=True)
class Run:
    """All that decides a run's result; `start` is one of `learning.STARTS`, `UNTRAINED` or `SUPERVISED`."""

    data: str
    arm: str
    seed: int
    model: Model
    pretraining: Pretraining | None


def runs(only: list[str], seeds: list[int]) -> Iterator[Run]:
    """All runs, in an order that gives whole comparisons early."""
    for data in only:
        for seed in seeds:
            of_suite = {run.arm: run for run in learning.SUITES[SUITES[data]].runs([seed]) if run.data == data}
            model = next(iter(of_suite.values())).model
            for arm in (UNTRAINED, SUPERVISED):
                yield Run(data, arm, seed, model, None)
            for arm in learning.STARTS:
                yield Run(data, arm, seed, model, of_suite[f"{arm}, then {learning.PLAIN}"].pretraining)


# --- probes -----------------------------------------------------------------------------------------------------------


def ridge(x: np.ndarray, y: np.ndarray, x_test: np.ndarray) -> np.ndarray:
    """Predictions [T] of ridge regression fitted to features [B, C] and values [B], with its penalty by leave-one-out.

    Features are standardised, and the mean of the values is fitted too.
    """
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-12
    z, offset = (x - mean) / scale, y.mean()
    u, s, vt = np.linalg.svd(z, full_matrices=False)
    best = (np.inf, np.zeros(z.shape[1]))
    for penalty in PENALTIES * len(z):
        shrunk = s**2 / (s**2 + penalty)
        residual = (y - offset) - u @ (shrunk * (u.T @ (y - offset)))
        # The error of each left out follows from its own weight in the fit; the mean takes 1/B of it.
        left_out = residual / (1 - np.einsum("bi,i,bi->b", u, shrunk, u) - 1 / len(z))
        error = float(np.mean(left_out**2))
        if error < best[0]:
            best = (error, vt.T @ (s / (s**2 + penalty) * (u.T @ (y - offset))))
    return (x_test - mean) / scale @ best[1] + offset


def nearest(x: np.ndarray, classes: np.ndarray, x_test: np.ndarray, apart: np.ndarray | None = None) -> np.ndarray:
    """The class [T] of the nearest of B structures, by the distance between standardised features.

    Args:
        apart: [T, B] bool, those that are not asked; None: all are.
    """
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-12
    one, other = (x_test - mean) / scale, (x - mean) / scale
    distances = np.linalg.norm(one[:, None] - other[None], axis=-1)
    return classes[np.where(False if apart is None else apart, np.inf, distances).argmin(axis=1)]


def probe(
    x: np.ndarray,
    x_test: np.ndarray,
    targets: dict[str, tuple[np.ndarray, np.ndarray]],
    apart: np.ndarray | None = None,
) -> dict[str, float]:
    """Scores of probes of features [B, C] on others [T, C].

    Args:
        apart: see `nearest`.

    Returns:
        For numbers the share of their variance on the test structures that is left over, 1 where the training mean does
        as well (more where it does better); for classes the share of structures put into a wrong one.
    """
    scores = {}
    for name, (known, test) in targets.items():
        if known.dtype.kind == "U":
            wrong = nearest(x, known, x_test, apart) != test
            scores[name] = float(wrong.mean())
        else:
            left = ridge(x, known, x_test) - test
            scores[name] = float(np.mean(left**2) / np.mean((test - known.mean()) ** 2))
    return {name: round(score, 5) for name, score in scores.items()}


# --- data -------------------------------------------------------------------------------------------------------------


@cache
def load(name: str, folder: Path) -> tuple[list[Atoms], list[Atoms], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """All structures for training and for testing, and what probes are to find of both.

    Energies per atom are those beyond a sum over elements fitted to the training structures.
    """
    parts = databases.read(name, folder)
    found = [
        {target: np.array([of(atoms) for atoms in part]) for target, of in TARGETS[name].items()} for part in parts
    ]
    shares = [databases.shares_of_elements(part) for part in parts]
    of_elements = databases.reference_energies(shares[0], found[0]["energy"])
    for said, share in zip(found, shares, strict=True):
        said["energy"] -= share @ of_elements
    return *parts, {target: (found[0][target], found[1][target]) for target in found[0]}


def of_one_metal(test: list[Atoms], known: list[Atoms]) -> np.ndarray:
    """[T, B] whether two oxides are of the same metal."""
    metals = [np.array([max(atoms.numbers) for atoms in part]) for part in (test, known)]
    return metals[0][:, None] == metals[1][None]


# --- backbones --------------------------------------------------------------------------------------------------------


def checkpoint_of(run: Run, learned: Results, folder: Path, splits: Splits, kept: Path) -> Path | None:
    """The checkpoint of a run's backbone; None: `benchmarks.evidence.learning` has not pre-trained it yet."""
    if run.pretraining is not None:
        _, path = kept_pretraining(run, learned)
        return path if path.exists() else None
    if run.arm == UNTRAINED:
        nothing = Length(1, 4, 1e-3)
        rows = splits.train[:8], splits.held_out[:8]
        trainer = denoiser(run.model, nothing, *rows, folder, form=FORMS["embedding"], std=0.04, seed=run.seed)
        return Path(trainer.save(checkpoint_file="untrained.pt", training_state=False))
    before = learning.SUITES[SUITES[run.data]].before
    length = Length(before.steps, before.batch_size, before.lr)
    train_labels(
        run.model,
        length,
        splits,
        splits.train,
        seed=run.seed,
        denoising={},
        start=None,
        quiet_heads=True,
        forces=run.data not in databases.ENERGIES_ALONE,
        points=1,
        keep=kept,
    )
    return kept


def train(run: Run, learned: Results, folder: Path) -> dict[str, Any] | None:
    """The scores of a run's probes: of the features, and of c where SCD has made one. None: nothing to probe yet."""
    known, test, targets = load(run.data, folder)
    with tempfile.TemporaryDirectory() as work:
        scratch = Path(work)
        checkpoint = checkpoint_of(run, learned, scratch, structures.load(run.data, folder), scratch / "supervised.pt")
        if checkpoint is None:
            return None
        made = []
        for part, atoms in (("train", known), ("test", test)):
            rows = KeptAseDB(
                {"src": structures.write(atoms, scratch / f"{part}_probed.db"), "a2g_args": {"r_energy": True}}
            )
            with in_form(form_of(run)):
                made.append(embed(checkpoint, rows, batch_size=32, device="cpu"))
    apart = of_one_metal(test, known) if run.data == "oxides" else None
    scores = {"features": probe(made[0].features, made[1].features, targets, apart)}
    if run.arm == "SCD":
        scores["c"] = probe(made[0].condition, made[1].condition, targets, apart)
    return scores


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    begin(options)
    results, learned, here = Results(options.results), Results(options.learning), environment()
    for run in runs(options.only, options.seeds):
        with results.claimed(asdict(run)) as mine:
            scores = train(run, learned, options.data) if mine else None
            if scores is None:
                continue
            results.append({"run": asdict(run), "scores": scores, **here})
            print(f"{run.data}, {run.arm}, seed {run.seed}: {scores}", flush=True)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of("benchmarks.evidence.probes", __doc__)
    add = parser.add_argument
    add("--data", type=existing_folder, required=True, metavar="FOLDER", help="folder of the ASE databases")
    add("--only", nargs="+", choices=SUITES, default=["Mo", "molecules"], metavar="DATA", help="these data alone")
    add("--learning", type=Path, default=learning.RESULTS, metavar="FILE", help="results with checkpoints beside them")
    add_options(parser, seeds=(0, 1, 2), results=RESULTS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
