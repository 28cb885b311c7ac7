"""What the denoising tasks buy: equal models, batches, supervised steps and seeds, with and without them, on real data.

Arms of training × data × label budgets × seeds. A fifth of the training data is held out, for tuning and curves; test
files are looked at once, by finished runs. Runs end with one line each in the results file; a run that is in there is
not run again, and several processes may share the file:

    python -m benchmarks.learning few --data FOLDER --seeds 0 1 2
    python -m benchmarks.learning long --data FOLDER --only Mo
    python -m benchmarks.report

Suites:

- tune: settings of the tasks beside labels, judged on held-out structures alone;
- few: few labels, from random weights and after pre-training on all structures of the training data;
- long: many passes over all labels, each task beside them;
- equiformer: few labels on EquiformerV2.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import structures
from benchmarks.common import existing_folder, use_threads
from benchmarks.results import Results, environment, key_of
from benchmarks.trained import Length, Model, Pretraining, pretrain, train_labels

RESULTS = Path(__file__).parent / "results" / "learning.jsonl"


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


SMALL = Model(layers=2, channels=32)
PLAIN, NOISE_FIRST, SCD_FIRST = "plain", "plain denoising, then plain", "SCD, then plain"

# Loss of predicting zero for noise and for forces, at coefficient 10 and 100: 2.7 on OC20, a twentieth of it where the
# normaliser is fitted to small data. So DeNS is tried with coefficients that make up for that.
TASKS: dict[str, dict[str, Any]] = {
    "noisy nodes": {"noisy_nodes": {"std": 5e-4, "coefficient": 0.1}},
    "DeNS": {"dens": {"prob": 0.5, "std": 0.1, "corrupt_ratio": 0.5, "coefficient": 10.0}},
    "DeNS, coefficient 100": {"dens": {"prob": 0.5, "std": 0.1, "corrupt_ratio": 0.5, "coefficient": 100.0}},
    "DeNS, σ 0.05, coefficient 100": {"dens": {"prob": 0.5, "std": 0.05, "corrupt_ratio": 0.5, "coefficient": 100.0}},
    "DeNS, prob 0.25, coefficient 100": {
        "dens": {"prob": 0.25, "std": 0.1, "corrupt_ratio": 0.5, "coefficient": 100.0}
    },
    "SCD beside labels": {"scd": {"std": 0.04, "coefficient": 10.0}},
    "SCD beside labels, coefficient 100": {"scd": {"std": 0.04, "coefficient": 100.0}},
    "plain denoising beside labels": {"scd": {"condition": [], "std": 0.04, "coefficient": 10.0}},
    "plain denoising beside labels, coefficient 100": {"scd": {"condition": [], "std": 0.04, "coefficient": 100.0}},
    "force-denoise": {"scd": {"condition": [], "std": 0.005, "coefficient": 10.0}},
    "DeNS and SCD in turns": {
        "dens": {"prob": 0.5, "std": 0.1, "corrupt_ratio": 0.5, "coefficient": 100.0},
        "scd": {"prob": 0.5, "std": 0.04, "coefficient": 10.0},
    },
}
"""The `task.denoising` block of each arm that denoises beside the labels."""


def pretrainings(seed: int, length: Length) -> dict[str, Pretraining | None]:
    """What comes before the labels, by arm; equally many steps."""
    return {
        PLAIN: None,
        NOISE_FIRST: Pretraining({"condition": [], "std": 0.04}, length, seed),
        SCD_FIRST: Pretraining({"std": 0.04}, length, seed),
    }


def suite(name: str, seeds: list[int], data: list[str] | None) -> Iterator[Run]:
    """The runs of a suite, in an order that gives whole comparisons early."""
    if name == "few":
        before = Length(400, 4, 2e-3, weight_decay=0.01, clip=1.0)
        for some in data or ("Mo", "Li"):
            for budgets in ((24,), (None,), (96,), (12, 48)):
                for seed in seeds:
                    for labels in budgets:
                        for arm, pretraining in pretrainings(seed, before).items():
                            yield Run(some, arm, labels, seed, SMALL, Length(300, 4, 2e-3), pretraining=pretraining)
    elif name == "long":
        for some in data or ("Mo", "Li"):
            for seed in seeds:
                for arm in (PLAIN, "DeNS, coefficient 100", "SCD beside labels"):
                    yield Run(some, arm, None, seed, SMALL, Length(1200, 4, 2e-3), TASKS.get(arm, {}))
    elif name == "tune":
        for some in data or ("Mo",):
            for arm in (PLAIN, *TASKS):
                yield Run(some, arm, 96, 0, SMALL, Length(600, 4, 2e-3), TASKS.get(arm, {}))
    elif name == "equiformer":
        model = Model("equiformer_v2", layers=2, channels=32)
        before = Length(300, 8, 1e-3, weight_decay=0.01, clip=1.0)
        for seed in seeds:
            for some in data or ("Mo",):
                for arm, pretraining in pretrainings(seed, before).items():
                    yield Run(some, arm, 24, seed, model, Length(200, 4, 1e-3), pretraining=pretraining)
    else:
        raise ValueError(f"unknown suite {name!r}; known: {', '.join(SUITES)}")


SUITES = ("few", "long", "tune", "equiformer")


def start_of(run: Run, splits: structures.Splits, results: Results, name: str) -> Path | None:
    """The checkpoint that a run starts from, pre-trained now if it is not there yet.

    Checkpoints are kept beside the results; each pre-training has a line of its own in them.
    """
    if run.pretraining is None:
        return None
    settings = {"data": run.data, "model": asdict(run.model), "pretraining": asdict(run.pretraining)}
    checkpoint = results.path.with_suffix(".checkpoints") / f"{key_of(settings)}.pt"
    with results.claimed(settings, wait=True) as mine:
        if mine or not checkpoint.exists():
            scores = pretrain(run.model, run.pretraining, splits, checkpoint)
            if mine:
                results.append({"suite": name, "run": settings, "scores": scores, **environment()})
    return checkpoint


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    use_threads(options.threads)
    torch.set_flush_denormal(True)  # radial bases make many numbers too small to count, and slow
    logging.getLogger().setLevel(logging.ERROR)
    results = Results(options.results)
    for run in suite(options.suite, options.seeds, options.only):
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
                start=start_of(run, splits, results, options.suite),
                quiet_heads=run.quiet_heads,
            )
            results.append({"suite": options.suite, "run": asdict(run), "scores": scores, **environment()})
            test = scores["test"]
            print(
                f"{run.data}, {run.labels or 'all'} labels, {run.arm}, seed {run.seed}: "
                f"{1000 * test['energy_mae']:.1f} meV/atom, {1000 * test['force_mae']:.1f} meV/Å on the test file",
                flush=True,
            )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    summary, _, epilog = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning",
        description=summary,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("suite", choices=SUITES, help="which runs")
    add("--data", type=existing_folder, metavar="FOLDER", help="folder of the ASE databases")
    add("--only", nargs="+", choices=structures.LABELLED, metavar="DATA", help="these data alone")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    add("--results", type=Path, default=RESULTS, metavar="FILE", help="JSON lines, one a finished run; appended to")
    add("--threads", type=int, metavar="N", help="CPU threads (default: OMP_NUM_THREADS, else all cores)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
