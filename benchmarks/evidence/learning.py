"""What the denoising tasks buy: equal models, batches, supervised steps and seeds, with and without them, on real data.

Arms of training × data × label budgets × seeds. A fifth of the training data is held out, for tuning and curves; test
files are looked at once, by finished runs. Runs end with one line each in the results file; a run that is in there is
not run again, and several processes may share the file:

    python -m benchmarks.evidence.learning few --data FOLDER --seeds 0 1 2
    python -m benchmarks.evidence.learning long --data FOLDER --only Mo
    python -m benchmarks.evidence.report

Suites, which --only, --arms, --labels, --lr and --seeds narrow down:

- few: few labels, from random weights and after pre-training on the structures of all training data;
- molecules: the same on molecules, which have more structures and fewer atoms;
- more_molecules, longer_molecules: molecules with more labels, at other learning rates and in longer runs;
- slabs: the same on metal slabs with adsorbates, labelled by ASE's effective medium theory;
- rates, molecule_rates, slab_rates, longer_molecule_rates, equiformer_rates: learning rate and length of these, to be
  chosen on held-out structures;
- start_rates, many_label_rates, more_label_rates: the same after each of three pre-trainings, with 192 and all labels
  of molecules, and with 96 and all labels of Mo;
- energies: as few, on oxides, whose structures are relaxed: energies alone;
- compute, molecule_compute: plain training from random weights for as long as pre-training and fine-tuning together;
- heads: as few, with energy heads that start as the host has them;
- long, long_rates, longer, long_slabs: many passes over all labels, a task beside them;
- tune, molecule_tasks: settings of the tasks beside labels, to be judged on held-out structures;
- equiformer, equiformer_molecules, equiformer_tuned, equiformer_slabs: few labels on EquiformerV2;
- escn_molecules, esen_molecules: the same on eSCN, and on eSEN whose forces are the energy's gradient.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.command_line import parser_of
from benchmarks.common import existing_folder
from benchmarks.evidence import databases, structures
from benchmarks.evidence.results import Results, environment
from benchmarks.evidence.study import add_options, begin
from benchmarks.evidence.trained import Length, Model, Pretraining, form_of, start_of, train_labels

RESULTS = Path(__file__).parents[1] / "results" / "learning.jsonl"


@dataclass(frozen=True)
class Run:
    """All that decides a run's result.

    Attributes:
        data: name in `structures`.
        arm: what the run is called in tables.
        labels: how many structures have labels; None: all.
        denoising: the `task.denoising` block beside the labels; empty: the host's own trainer.
        pretraining: before that; None: random weights.
        quiet_heads: the last layer of the energy head starts at zero.
    """

    data: str
    arm: str
    labels: int | None
    seed: int
    model: Model
    length: Length
    denoising: dict[str, Any] = field(default_factory=dict)
    pretraining: Pretraining | None = None
    quiet_heads: bool = True


PLAIN = "plain"
SMALL = Model(layers=2, channels=32)
EQUIFORMER, ESCN, ESEN = (
    Model(backbone, layers=2, channels=32) for backbone in ("equiformer_v2", "escn", "esen_conservative")
)


def _dens(**settings: Any) -> dict[str, Any]:
    return {"dens": {"prob": 0.5, "std": 0.1, "corrupt_ratio": 0.5, "coefficient": 100.0, **settings}}


def _scd(**settings: Any) -> dict[str, Any]:
    return {"scd": {"std": 0.04, "coefficient": 10.0, **settings}}


_GENTLE = {"std": 0.02, "prob": 0.25, "coefficient": 10.0}
# Predicting zero for noise loses 2.7 times what it loses for forces on OC20, at coefficients 10 and 100, but a
# twentieth of that on small data whose normaliser is fitted. So DeNS is tried with a coefficient that makes up for it.
TASKS: dict[str, dict[str, Any]] = {
    "noisy nodes": {"noisy_nodes": {"std": 5e-4, "coefficient": 0.1}},
    "DeNS, coefficient 10": _dens(coefficient=10.0),
    "DeNS, coefficient 100": _dens(),
    "DeNS, σ 0.05, coefficient 100": _dens(std=0.05),
    "DeNS, prob 0.25, coefficient 100": _dens(prob=0.25),
    "DeNS, prob 0.25, coefficient 100, energies of clean structures alone": _dens(prob=0.25, train_outputs=[]),
    "DeNS, prob 0.25, coefficient 100, forces not told": _dens(prob=0.25, force_encoding=False),
    "DeNS, prob 0.25, coefficient 10": _dens(prob=0.25, coefficient=10.0),
    "DeNS, σ 0.02, prob 0.25, coefficient 10": _dens(**_GENTLE),
    "DeNS, σ 0.02, prob 0.25, coefficient 10, forces not told": _dens(**_GENTLE, force_encoding=False),
    "DeNS, σ 0.02, prob 0.25, coefficient 10, energies of clean structures alone": _dens(**_GENTLE, train_outputs=[]),
    "DeNS, σ 0.02, prob 0.25, coefficient 10, all atoms move": _dens(**_GENTLE, corrupt_ratio=None),
    "SCD beside labels, coefficient 10": _scd(),
    "SCD beside labels, coefficient 100": _scd(coefficient=100.0),
    "plain denoising beside labels, coefficient 10": _scd(condition=[]),
    "plain denoising beside labels, coefficient 100": _scd(condition=[], coefficient=100.0),
    "force-denoise": _scd(condition=[], std=0.005),
    "DeNS and SCD in turns": {**_dens(), "scd": {**_scd()["scd"], "prob": 0.5}},
}
"""The `task.denoising` block of each arm that denoises beside the labels; any other arm has none."""

STARTS: dict[str, dict[str, Any]] = {
    "plain denoising": {"form": "plain"},
    "SCD": {"form": "embedding"},
    "difference form": {"form": "difference"},
    "SCD, standardised": {"form": "standardised"},
    "difference of embeddings": {"form": "difference of embeddings"},
    "plain denoising twice as long": {"form": "plain", "times": 2},
    "plain denoising, σ 0.02": {"form": "plain", "std": 0.02},
    "plain denoising, σ 0.1": {"form": "plain", "std": 0.1},
    "plain denoising, σ 0.2": {"form": "plain", "std": 0.2},
}
"""Pre-trainings, each an arm called `START, then TASK`.

Arguments of `Pretraining`; `times`: its steps, as a multiple of the suite's. A step of SCD passes each structure twice,
so plain denoising twice as long is its equal in compute.
"""

PRETRAINED = tuple(f"{start}, then {PLAIN}" for start in STARTS)
THEN_DENS = "plain denoising, then DeNS, prob 0.25, coefficient 100"
ARMS = (PLAIN, *TASKS, *PRETRAINED, THEN_DENS)


_CUTOFF = {"oxides": {"radius": 3.5, "neighbors": 60}}


@dataclass(frozen=True)
class Suite:
    """Arms × data × labels × seeds.

    Attributes:
        budgets: numbers of labels, None for all, in groups: a group is run for all seeds before the next.
        before: how long pre-training is.
        tuned: learning rate of arms that are pre-trained, by the number of steps; else that of `lengths`.
        points: how often a run looks at the held-out structures.
    """

    data: tuple[str, ...]
    budgets: tuple[tuple[int | None, ...], ...]
    arms: tuple[str, ...]
    model: Model
    lengths: tuple[Length, ...]
    before: Length
    quiet_heads: bool = True
    tuned: Mapping[int, float] = field(default_factory=dict)
    points: int = 5

    def runs(self, seeds: Sequence[int]) -> Iterator[Run]:
        """All runs, in an order that gives whole comparisons early."""
        for data, budgets, seed in product(self.data, self.budgets, seeds):
            for labels, length, arm in product(budgets, self.lengths, self.arms):
                start, _, task = arm.rpartition(", then ")
                before = self.pretraining(seed, start) if start else None
                if start:
                    length = replace(length, lr=self.tuned.get(length.steps, length.lr))
                denoising = TASKS.get(task, {})
                model = replace(self.model, **_CUTOFF.get(data, {}))
                yield Run(data, arm, labels, seed, model, length, denoising, before, self.quiet_heads)

    def pretraining(self, seed: int, start: str) -> Pretraining:
        """The pre-training of one of `STARTS`."""
        how = {"std": 0.04, **STARTS[start]}
        length = replace(self.before, steps=how.pop("times", 1) * self.before.steps)
        return Pretraining(length=length, seed=seed, **how)


_METALS = ("Mo", "Li")
_BEFORE = Length(1200, 8, 1e-3, weight_decay=0.01, clip=1.0)
# Those of SCD and of DeNS with prob 0.25 and coefficient 100 were the best in `tune`; the others vary DeNS.
_BESIDE = (
    PLAIN,
    *(arm for arm in TASKS if arm.startswith("DeNS, prob 0.25")),
    "DeNS, σ 0.02, prob 0.25, coefficient 10",
    "SCD beside labels, coefficient 10",
)
_FEW = Suite(
    ("oxides", *_METALS),
    ((24,), (None,), (96,), (12, 48)),
    (PLAIN, *PRETRAINED),
    Model(),
    # Of 5e-4 to 8e-3 the best on held-out structures of Mo, with 24 labels and seed 0: the suite `rates`.
    (Length(300, 4, 4e-3), Length(1000, 4, 1e-3)),
    _BEFORE,
    tuned={300: 2e-3},
)
_RATES: dict[str, Any] = {"budgets": ((24,),), "arms": (PLAIN, *PRETRAINED[:1]), "tuned": {}}
_MOLECULES = replace(
    _FEW,
    data=("molecules",),
    budgets=((96,), (24, 384), (12, 48, 192, None)),
    model=Model(radius=4.5, neighbors=60),
    lengths=(Length(1000, 8, 2e-3),),  # chosen likewise: the suite `molecule_rates`
    before=replace(_BEFORE, steps=2000, batch_size=32),
    tuned={1000: 1e-3},
)
# One rate is the best for both: the suite `slab_rates`.
_SLABS = replace(_MOLECULES, data=("slabs",), budgets=((96,), (24, 384)), model=Model(neighbors=60), tuned={})


def _at(steps: int, *rates: float) -> tuple[Length, ...]:
    """Trainings in batches of 8 at several learning rates."""
    return tuple(Length(steps, 8, lr) for lr in rates)


_EQUIFORMER_MOLECULES = replace(
    _MOLECULES,
    arms=(PLAIN, *(f"{start}, then {PLAIN}" for start in ("plain denoising", "SCD", "SCD, standardised"))),
    model=replace(EQUIFORMER, radius=4.5, neighbors=60),
    lengths=(Length(1000, 8, 1e-3),),
    before=Length(1500, 16, 1e-3, weight_decay=0.01, clip=1.0),
)
SUITES = {
    "few": _FEW,
    "molecules": _MOLECULES,
    "slabs": _SLABS,
    # The rates that were best on held-out structures with so many labels.
    "more_molecules": replace(_MOLECULES, budgets=((384,),), lengths=(Length(1000, 8, 4e-3),), tuned={1000: 2e-3}),
    "longer_molecules": replace(_MOLECULES, budgets=((384,),), lengths=(Length(3000, 8, 2e-3),), tuned={3000: 1e-3}),
    "rates": replace(
        _FEW,
        **_RATES,
        lengths=(
            *(Length(300, 4, lr) for lr in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)),
            *(Length(1000, 4, lr) for lr in (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)),
        ),
    ),
    "molecule_rates": replace(
        _MOLECULES,
        **{**_RATES, "budgets": ((24,), (384,))},
        lengths=_at(1000, 5e-4, 1e-3, 2e-3, 4e-3),
    ),
    "start_rates": replace(
        _MOLECULES,
        **{**_RATES, "budgets": ((96,),), "arms": (PLAIN, *PRETRAINED[:3])},
        lengths=_at(1000, 5e-4, 1e-3, 2e-3, 4e-3),
    ),
    "many_label_rates": replace(
        _MOLECULES,
        **{**_RATES, "budgets": ((192, None),)},
        lengths=_at(1000, 1e-3, 2e-3, 4e-3),
    ),
    "more_label_rates": replace(
        _FEW,
        **{**_RATES, "budgets": ((None,), (96,))},
        data=("Mo",),
        lengths=(
            *(Length(300, 4, lr) for lr in (4e-3, 8e-3, 1.6e-2)),
            *(Length(1000, 4, lr) for lr in (1e-3, 2e-3, 4e-3)),
        ),
    ),
    "slab_rates": replace(
        _SLABS,
        **{**_RATES, "budgets": ((96,),)},
        lengths=_at(1000, 5e-4, 1e-3, 2e-3, 4e-3),
    ),
    "longer_molecule_rates": replace(
        _MOLECULES,
        **{**_RATES, "budgets": ((384,),)},
        lengths=_at(3000, 1e-3, 2e-3, 4e-3),
    ),
    # A step of pre-training has twice as many structures; with SCD each passes twice.
    "compute": replace(_FEW, arms=(PLAIN,), lengths=(Length(2700, 4, 1e-3), Length(5100, 4, 1e-3))),
    "molecule_compute": replace(_MOLECULES, budgets=((96,),), arms=(PLAIN,), lengths=(Length(9000, 8, 1e-3),)),
    "heads": replace(_FEW, budgets=((24,),), lengths=_FEW.lengths[:1], quiet_heads=False),
    "energies": replace(
        _FEW,
        data=("oxides",),
        lengths=(Length(300, 8, 2e-3),),
    ),
    "long": replace(
        _FEW,
        data=_METALS,
        budgets=((None,),),
        arms=(*_BESIDE, PRETRAINED[0], THEN_DENS),
        lengths=(Length(3000, 4, 1e-3),),
        points=12,
    ),
    "long_rates": replace(
        _FEW, data=("Mo",), budgets=((None,),), arms=_BESIDE[:2], lengths=(Length(3000, 4, 4e-3),), points=12
    ),
    "longer": replace(
        _FEW, data=("Mo",), budgets=((None,),), arms=_BESIDE[:2], lengths=(Length(9000, 4, 1e-3),), points=18
    ),
    "long_slabs": replace(
        _SLABS,
        budgets=((None,),),
        arms=(PLAIN, "DeNS, prob 0.25, coefficient 100", "DeNS, σ 0.02, prob 0.25, coefficient 10"),
        lengths=(Length(7200, 8, 2e-3),),  # 60 passes
        points=12,
    ),
    "tune": Suite(("Mo",), ((96,),), (PLAIN, *TASKS), SMALL, (Length(600, 4, 2e-3),), _BEFORE),
    # At the rate that is best for plain training.
    "molecule_tasks": replace(
        _MOLECULES,
        budgets=((384,),),
        arms=(
            PLAIN,
            *(arm for arm in TASKS if "σ 0.02" in arm),
            *("DeNS, coefficient 10", "DeNS, σ 0.05, coefficient 100"),
            *("SCD beside labels, coefficient 10", "plain denoising beside labels, coefficient 10", "noisy nodes"),
        ),
        lengths=(Length(3000, 8, 2e-3),),
    ),
    "equiformer_molecules": _EQUIFORMER_MOLECULES,
    "equiformer_rates": replace(
        _EQUIFORMER_MOLECULES,
        **{**_RATES, "budgets": ((96,),)},
        lengths=_at(1000, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    ),
    "equiformer_tuned": replace(
        _EQUIFORMER_MOLECULES,
        budgets=((96,),),
        arms=_EQUIFORMER_MOLECULES.arms[:2],
        # Of the rates up to 0.008 in `equiformer_rates` the best for plain training, and below after pre-training.
        lengths=(Length(1000, 8, 8e-3),),
        tuned={1000: 5e-4},
    ),
    "equiformer_slabs": replace(
        _EQUIFORMER_MOLECULES,
        data=("slabs",),
        arms=_EQUIFORMER_MOLECULES.arms[:2],
        model=replace(EQUIFORMER, neighbors=60),
    ),
    **{
        f"{name}_molecules": replace(
            _EQUIFORMER_MOLECULES,
            budgets=((96,),),
            arms=_EQUIFORMER_MOLECULES.arms[:2],
            model=replace(model, radius=4.5, neighbors=60),
        )
        for name, model in (("escn", ESCN), ("esen", ESEN))
    },
    "equiformer": Suite(
        ("Mo",),
        ((24,),),
        (PLAIN, *PRETRAINED),
        EQUIFORMER,
        (Length(200, 4, 1e-3),),
        Length(300, 4, 1e-3, weight_decay=0.01, clip=1.0),
    ),
}


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    begin(options)
    results, here = Results(options.results), environment()
    for run in chosen(options):
        with results.claimed(asdict(run)) as mine:
            if not mine:
                continue
            splits = structures.load(run.data, options.data)
            scores = train_labels(
                run.model,
                run.length,
                splits,
                splits.labelled(run.labels, run.seed),
                seed=run.seed,
                denoising=run.denoising,
                start=start_of(run, splits, results, here, suite=options.suite),
                start_form=form_of(run),
                quiet_heads=run.quiet_heads,
                forces=run.data not in databases.ENERGIES_ALONE,
                points=SUITES[options.suite].points,
            )
            results.append({"suite": options.suite, "run": asdict(run), "scores": scores, **here})
            found = ", ".join(f"{name} {1000 * value:.1f}" for name, value in scores["test"].items())
            what = f"{run.data}, {run.labels or 'all'} labels, {run.arm}, seed {run.seed}"
            print(f"{what}: on the test structures {found} (meV/atom, meV/Å)", flush=True)


def chosen(options: argparse.Namespace) -> Iterator[Run]:
    """The runs of the suite that the options leave."""
    for run in SUITES[options.suite].runs(options.seeds):
        narrowed = (
            (options.only, run.data),
            (options.arms, run.arm),
            (options.labels, str(run.labels or "all")),
            (options.lr, run.length.lr),
        )
        if all(wanted is None or value in wanted for wanted, value in narrowed):
            yield run


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of("benchmarks.evidence.learning", __doc__)
    add = parser.add_argument
    add("suite", choices=SUITES, help="which runs")
    add("--data", type=existing_folder, metavar="FOLDER", help="folder of the ASE databases")
    add("--only", nargs="+", choices=structures.LABELLED, metavar="DATA", help="these data alone")
    add("--arms", nargs="+", choices=ARMS, metavar="ARM", help="these arms alone, by their names")
    add("--labels", nargs="+", metavar="N", help="these numbers of labels alone; all: every one")
    add("--lr", nargs="+", type=float, metavar="RATE", help="these learning rates alone")
    add_options(parser, seeds=(0, 1, 2), results=RESULTS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
