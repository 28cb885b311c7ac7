"""What SCD's condition carries: how well noise is predicted told the right structure's embedding, another's, or none.

A ladder of data, from cells of two atoms, where the embedding must count, to real ones; forms of the condition, and
plain denoising of the same number of steps beside them. Each run denoises structures without labels, and is judged on
held-out ones at some points of its training. Runs end with one line each in the results file; a run that is in there
is not run again, and several processes may share the file:

    python -m benchmarks.evidence.condition small --data FOLDER
    python -m benchmarks.evidence.condition real --data FOLDER --seeds 0 1 2
    python -m benchmarks.evidence.report

The noise error is the mean square of (ε̂ − ε) over σ², each structure counting once, as `ConditionJudge` of this package
measures it. "None" is what the same model does
without an embedding, which it is trained to do on a fifth of the structures; what the condition is worth is to be read
off the plain runs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.command_line import parser_of
from benchmarks.common import existing_folder
from benchmarks.evidence import structures
from benchmarks.evidence.forms import FORMS
from benchmarks.evidence.learning import EQUIFORMER
from benchmarks.evidence.noise import shrinkage_errors, summary
from benchmarks.evidence.results import Results, environment
from benchmarks.evidence.study import add_options, begin
from benchmarks.evidence.trained import JUDGED, Length, Model, denoiser, watch_denoising

SHRINKAGE = "shrinkage"
"""Not a model: the best that can be said of the noise without a condition, on cells made here."""

RESULTS = Path(__file__).parents[1] / "results" / "condition.jsonl"


@dataclass(frozen=True)
class Run:
    """All that decides a run's result.

    Attributes:
        data: name in `structures`.
        form: one of `FORMS`, or `SHRINKAGE`.
        std: σ, Å.
        count: number of training structures; None: all.
    """

    data: str
    form: str
    std: float
    model: Model
    length: Length
    seed: int
    count: int | None = None


# σ in Å: large against thermal displacements where cells are made here, the paper's on real data.
_STD = {"two_atoms": 0.1, "four_atoms": 0.06, "eight_atoms": 0.06}


_THREE = ("plain", "difference", "embedding")
_CELLS = Model(neighbors=60, mixed_sizes=False)
_REAL = {
    "oxides": Model(radius=3.5, neighbors=60),
    "slabs": Model(neighbors=60),
    "molecules": Model(radius=4.5, neighbors=60),
}


def suite(
    name: str, seeds: list[int], data: list[str] | None, steps: int | None, only: list[str] | None = None
) -> Iterator[Run]:
    """The runs of a suite, seed by seed, so that what is there at any time compares like with like.

    Args:
        data: these alone; None: all of the suite's.
        steps: instead of the suite's.
        only: these forms alone, in the order of `FORMS`; None: all of the suite's.
    """

    def chosen(usual: Iterable[str]) -> Iterator[str]:
        return (form for form in usual if only is None or form in only)

    def length(usual: int, batch_size: int) -> Length:
        return Length(steps or usual, batch_size, 1e-3, weight_decay=0.01, clip=1.0)

    for seed in seeds:
        if name == "small":
            for rung in data or ("two_atoms", "four_atoms", "eight_atoms"):
                if seed == seeds[0] and (only is None or SHRINKAGE in only):
                    yield Run(rung, SHRINKAGE, _STD[rung], _CELLS, Length(1, 16, 1e-3), seed=0)
                for form in chosen((*_THREE, "difference of embeddings", "mask token")):
                    yield Run(rung, form, _STD[rung], _CELLS, length(2000, 16), seed)
        elif name == "real":
            for rung in data or ("oxides", "Mo", "Li", "slabs"):
                for form in chosen(_THREE):
                    yield Run(rung, form, 0.04, _REAL.get(rung, Model()), length(1200, 8), seed)
        elif name == "frontier":
            for rung in data or ("molecules",):
                model = _REAL.get(rung, _CELLS)
                for setting in around(Run(rung, "", _STD.get(rung, 0.04), model, length(1000, 32), seed)):
                    for form in chosen(("plain", "embedding")):
                        yield replace(setting, form=form)
        elif name == "sigmas":
            for rung in data or ("two_atoms",):
                for std in (0.02, 0.04, 0.1, 0.2, 0.3):
                    for form in chosen(("plain", "embedding")):
                        yield Run(rung, form, std, _REAL.get(rung, _CELLS), length(1000, 32), seed)
        elif name == "levers":
            for rung in data or ("molecules",):
                for form in chosen(FORMS):
                    model = _REAL.get(rung, _CELLS)
                    yield Run(rung, form, _STD.get(rung, 0.04), model, length(1000, 32), seed)
        else:
            raise ValueError(f"unknown suite {name!r}; known: {', '.join(SUITES)}")


SUITES = ("small", "real", "frontier", "sigmas", "levers")


def on(backbone: str, run: Run) -> Run:
    """The same run of another backbone, in the size of the suites of `benchmarks.evidence.learning`."""
    if backbone == run.model.backbone:
        return run
    sizes = {"backbone": EQUIFORMER.backbone, "layers": EQUIFORMER.layers, "channels": EQUIFORMER.channels}
    return replace(run, model=replace(run.model, **sizes))


def around(run: Run) -> Iterator[Run]:
    """A run, and runs that differ from it in one setting each, those that matter most first."""
    yield run
    for channels in (16, 128):
        yield replace(run, model=replace(run.model, channels=channels))
    for std in (0.01, 0.1):
        yield replace(run, std=std)
    yield replace(run, count=100)
    yield replace(run, length=replace(run.length, batch_size=8))
    yield replace(run, model=replace(run.model, layers=5))
    yield replace(run, count=500)
    yield replace(run, model=replace(run.model, channels=32))
    yield replace(run, model=replace(run.model, layers=2))
    for std in (0.2, 0.02, 0.3):
        yield replace(run, std=std)


def train(run: Run, folder: Path | None) -> dict[str, Any]:
    """Train and judge one run."""
    splits = structures.load(run.data, folder)
    held_out = splits.held_out[:JUDGED]
    with tempfile.TemporaryDirectory() as work:
        trainer = denoiser(
            run.model,
            run.length,
            splits.labelled(run.count, run.seed),
            held_out,
            Path(work),
            form=FORMS.get(run.form, FORMS["plain"]),
            std=run.std,
            seed=run.seed,
        )
        if run.form != SHRINKAGE:
            return watch_denoising(trainer, 4)
        cells = structures.CELLS[run.data]
        in_order = [held_out[i] for i in trainer.val_dataset.indices]  # which the host shuffles
        known = [torch.from_numpy(cells.displacements(atoms, atoms.positions)) for atoms in in_order]
        found = summary({"none": shrinkage_errors(trainer, known, cells.displacement)}, [*map(len, held_out)])
        return {"steps": 0, "structures": found.pop("structures"), "curve": [{"step": 0, **found}]}


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    begin(options)
    results, here = Results(options.results), environment()
    for usual in suite(options.suite, options.seeds, options.only, options.steps, options.forms):
        run = on(options.backbone, usual)
        with results.claimed(asdict(run)) as mine:
            if not mine:
                continue
            scores = train(run, options.data)
            count = run.count or len(structures.load(run.data, options.data).train)
            results.append({"suite": options.suite, "run": asdict(run), "structures": count, "scores": scores, **here})
            last = scores["curve"][-1]
            told = ", ".join(f"{name} {last[name][0]:.4f}" for name in ("right", "other", "none") if name in last)
            what = f"{run.data}, {run.form}, {run.model.backbone} of {run.model.channels} channels, seed {run.seed}"
            print(f"{what}: {told}", flush=True)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of("benchmarks.evidence.condition", __doc__)
    add = parser.add_argument
    add(
        "suite",
        choices=SUITES,
        help="small: cells made here; real: DFT data and slabs; frontier: one setting varied; sigmas: σ varied; "
        "levers: forms",
    )
    add("--data", type=existing_folder, metavar="FOLDER", help="folder of the ASE databases")
    add("--only", nargs="+", metavar="DATA", help="these data alone")
    add("--forms", nargs="+", choices=(*FORMS, SHRINKAGE), metavar="FORM", help="these forms of the condition alone")
    add("--backbone", choices=("painn", EQUIFORMER.backbone), default="painn", help="default: painn")
    add("--steps", type=int, metavar="N", help="instead of the suite's own number")
    add_options(parser, seeds=(0,), results=RESULTS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
