"""Sections of docs/evidence.md and docs/condition.md, their tables and figures, drawn from the files of results.

    python -m benchmarks.evidence.report

Each section is written between its marks `<!-- begin NAME -->` and `<!-- end NAME -->` of one of the pages, figures to
docs/figures. Nothing is trained. A comparison of which there are not two sides yet is left out.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.evidence.components import components_table, draw_components, groups
from benchmarks.evidence.condition import suite
from benchmarks.evidence.condition_tables import (
    ladder_table,
    levers_table,
    pretrained_table,
    pretrainings,
    probes_table,
)
from benchmarks.evidence.figures import draw_curves, draw_labels, draw_ladder
from benchmarks.evidence.frontier import draw_frontier, frontier_table
from benchmarks.evidence.learning import SUITES
from benchmarks.evidence.results import Results, key_of
from benchmarks.evidence.tables import (
    Record,
    arms_table,
    best_rates,
    budgets,
    compute_table,
    fairchem2_table,
    groups_table,
    properties_table,
    rates_table,
    saved_table,
    trained,
    tuned,
    widest,
)
from fairchem_scd.commands import pictures as style

HERE = Path(__file__).parents[1]
FEW_LABELS = (
    *("few", "rates", "more_label_rates", "energies", "slabs"),
    *("molecules", "more_molecules", "longer_molecules", "many_label_rates"),
)
"""Suites of few labels."""
DOCS = HERE.parent / "docs"
PAGES = ("evidence.md", "condition.md")


def sections(
    learning: list[Record],
    condition: list[Record],
    properties: Sequence[Record] = (),
    fairchem2: Sequence[Record] = (),
    probes: Sequence[Record] = (),
) -> dict[str, str]:
    """The markdown of each section by the name of its marks; empty where there is nothing to compare yet."""
    gaps, second = ([r for r in records if "arm" in r["run"]] for records in (properties, fairchem2))
    few, long = few_labels(learning), trained(learning, "long", "longer", "long_slabs")
    faster = trained(learning, "long_rates")
    before = pretrainings(learning)
    ladder, varied, levers = parted(condition)
    several, explained = of_several_budgets(learning), groups(ladder, before)
    elsewhere = of_suites(
        learning,
        *("equiformer", "equiformer_molecules", "equiformer_rates", "equiformer_tuned", "equiformer_slabs"),
        *("escn_molecules", "esen_molecules"),
    )
    settings = of_suites(learning, "tune", "molecule_tasks")
    heads = trained(learning, "heads")
    rates = of_suites(learning, *(name for name in SUITES if name.endswith("rates")))
    grouped = [r for r in (*best_rates(few), *heads, *long) if "test_groups" in r["scores"]]
    longer = trained(learning, "compute", "molecule_compute")
    shared = {(r["run"]["data"], r["run"]["labels"]) for r in longer}
    compute = longer + [r for r in widest(few) if (r["run"]["data"], r["run"]["labels"]) in shared]
    compute = compute if longer else []
    parts: dict[str, tuple[list[Record], str, Callable[[], str]]] = {
        "few": (few, FEW, lambda: arms_table(best_rates(few))),
        "rates": (rates, RATES, lambda: rates_table(rates)),
        "labels": (several, LABELS, lambda: saved_table(several)),
        "compute": (compute, COMPUTE, lambda: compute_table(compute)),
        "heads": (heads, HEADS, lambda: arms_table(heads)),
        "backbones": (elsewhere, BACKBONES, lambda: arms_table(best_rates(elsewhere))),
        "long": (long, LONG, lambda: with_faster(long, faster, partial(arms_table, best=True))),
        "tune": (settings, TUNE, lambda: arms_table(settings, split="held_out")),
        "groups": (grouped, GROUPS, lambda: with_faster(grouped, faster, groups_table)),
        "condition": (ladder, CONDITION, lambda: ladder_table(ladder)),
        "frontier": (varied, FRONTIER, lambda: frontier_table(varied)),
        "levers": (levers, LEVERS, lambda: levers_table(levers)),
        "pretraining": (before, PRETRAINING, lambda: pretrained_table(before)),
        "components": (before, COMPONENTS, lambda: components_table(explained)),
        "probes": (list(probes), PROBES, lambda: probes_table(list(probes))),
        "properties": (gaps, PROPERTIES, lambda: properties_table(gaps)),
        "fairchem2": (second, FAIRCHEM2, lambda: fairchem2_table(second)),
    }
    return {name: f"{text}\n{table()}\n" if compared(records) else "" for name, (records, text, table) in parts.items()}


def with_faster(records: list[Record], faster: list[Record], table: Callable[[list[Record]], str]) -> str:
    """A table of runs and, where there are two sides, one of runs at a higher learning rate than some of these had."""
    tables = [table(records)]
    if compared(faster):
        tables += ["At a learning rate of 0.004:", table(faster)]
    return "\n\n".join(tables)


def few_labels(learning: list[Record]) -> list[Record]:
    """Runs of few labels."""
    return of_suites(learning, *FEW_LABELS)


def of_suites(learning: list[Record], *names: str) -> list[Record]:
    """Runs of some suites. Some are runs of other suites too, such as one of rates, and may have been done there."""
    records = [record for record in learning if "arm" in record["run"]]
    seeds = sorted({record["run"]["seed"] for record in records})
    wanted = keys_of(run for name in names for run in SUITES[name].runs(seeds))
    return [record for record in records if record["suite"] in names or key_of(record["run"]) in wanted]


def of_several_budgets(learning: list[Record]) -> list[Record]:
    """Runs that tell how errors fall with the number of labels; none where there is one number alone."""
    few = widest(few_labels(learning))
    return tuned(few) if budgets(few) > 1 else []


def parted(condition: Sequence[Record]) -> tuple[list[Record], list[Record], list[Record]]:
    """The ladder of data, runs in which one setting is varied, and the levers, of the results of `evidence.condition`.

    The usual runs of the frontier and the levers are the same, and may have been done for either. Their runs on other
    data or of other backbones count as of the ladder.
    """
    seeds = sorted({record["run"]["seed"] for record in condition})
    wanted = {name: keys_of(suite(name, seeds, None, None)) for name in ("frontier", "sigmas", "levers")}
    known = {record["suite"] for record in condition}
    named = {
        name: [record for record in condition if key_of(record["run"]) in keys] if name in known else []
        for name, keys in wanted.items()
    }
    elsewhere = set().union(*wanted.values())
    ladder = [record for record in condition if key_of(record["run"]) not in elsewhere]
    return ladder, [*named["frontier"], *named["sigmas"]], named["levers"]


def keys_of(runs: Iterable[Any]) -> set[str]:
    """The names of runs by their settings."""
    return {key_of(asdict(run)) for run in runs}


def compared(records: list[Record]) -> bool:
    """Whether there are two sides: two arms, forms of the condition or pre-trainings, on equal data, of equal seed."""
    sides: dict[tuple[str, int], set[str]] = {}
    for record in records:
        run = record["run"]
        before = run.get("pretraining") or {}
        side = run.get("arm") or run.get("form") or repr(before)
        sides.setdefault((run["data"], run.get("seed", before.get("seed"))), set()).add(side)
    return any(len(of) > 1 for of in sides.values())


FEW = """\
## Few labels: pre-training on structures alone

Each seed pre-trains anew, on the structures of all training data but the held-out fifth, without labels. "Change" is
against plain training of the same seed. Molecules are frames of molecular dynamics of 88 molecules at 300 to 1000 K,
labelled by GFN2-xTB (`benchmarks/evidence/molecules.py`); the test frames are later ones of the same trajectories, so
no test is on a molecule that is not in the training data. Learning rates are those that were best on held-out
structures among those run with most seeds: one alone on Li, on Mo with 12 and 48 labels, on oxides, and for SCD; the
table of learning rates has all. "Last fifth" is the change of the held-out force error in the last fifth of the
training: below zero it was still falling, above zero the labels were overfitted. Of two seeds both numbers are given.
"""
RATES = """\
### Learning rates

All that were run, each arm against plain training at the same rate.
"""
LABELS = """\
### How many labels pre-training saves

Here and in the [picture](#pre-training-then-energies-and-forces), each arm has with each number of labels the length
that is best on held-out structures, of those that plain training had with all numbers (Mo: 300 and 1000 steps). The
table says how many times as many labels plain training needs for the same error (of forces; on oxides of energies),
between the numbers of labels tried.
"""
COMPUTE = """\
### At equal compute

Pre-training costs too. "Structures passed" counts how many went through the model, forwards and back; a step of SCD
runs each twice. "Ten fine-tunings, each": the same where ten of them share one pre-training.
"""
HEADS = """\
### Energy heads as the host starts them

The same, but the last layer of the energy head begins with random weights.
"""
BACKBONES = """\
### Other backbones

Two blocks of 32 channels. Forces of eSEN are the energy's gradient. On molecules EquiformerV2's plain training and
plain denoising have the learning rates that were best on held-out structures with seed 0, of 0.00025 to 0.008
(`equiformer_rates`; 0.016 came later); the others were run with 0.001 alone.
"""
LONG = """\
## A task beside the labels

All labels, equal numbers of supervised steps. "Lowest held-out force MAE" is what the best checkpoint of a run has;
errors on the test structures are those at its end.
"""
TUNE = """\
### Settings of the tasks

On held-out structures, not on the test file:
"""
GROUPS = """\
### Energies by kind of structure

The mean energy errors on Mo and Li hang on few structures. The test file of Mo has 12 frames of molecular dynamics
(AIMD-NVT), 6 strained cells (Elastic), 3 with a vacancy and 2 surfaces; that of Li has 20, 3, 4 and 2. Energy MAE in
meV/atom. Among 24 labels of Mo there are 0, 1 and 1 surfaces (seeds 0, 1, 2), of Li 2, 0 and 1; among all labels 8.
"""
CONDITION = """\
## Told the right embedding, another's and none

The noisy pass is told a structure's embedding by the clean pass. If the embedding counts, another structure's must do
worse. Noise errors are the mean square error over σ² on held-out structures, ± the standard error over structures;
predicting zero has 1 − 1/N for N atoms. "None" is the same model without an embedding, which it is trained for on a
fifth of the structures. Compare "right" with plain denoising of the same number of steps: where the ratio is below 1,
the second pass helped. "Dimensions" is the participation ratio of what structures are told; "spread" its standard
deviation over structures against its root mean square (not in older lines). "Difference" is a form
that is only in `benchmarks/evidence/forms`: each block is told by how much the mean of its l = 0 features differs
between the clean structure and the noisy one. "The best by theory" is no model but what can be said without a
condition, where structures are lattices with normal displacements of standard deviation s: ε̂ = (x̃ − r) σ² / (σ² + s²)
for sites r.

![Noise errors told the right embedding, another's and none](figures/condition.png)
"""
FRONTIER = """\
### Where it begins to count

Runs of 1000 steps that differ from a usual one in one setting each. A value below 1 says that the right embedding
lowers the noise error of plain denoising; of 1, that the second pass buys nothing.

![What is left of plain denoising's noise error, against the settings](figures/frontier.png)
"""
LEVERS = """\
### Other forms of the condition

Each differs from SCD as shipped in one thing (`benchmarks/evidence/forms`). "Standardised": the mean
and variance of a batch are taken out of c, in place of its LayerNorm (in validation running ones); "by running
statistics": these in training too; "without elements": also, what an atom's features owe to its element is taken out
before they are pooled. "Moments": half of the channels are pooled by their root mean
square over the atoms. "Update layers": PaiNN's feed-forward part. "Dropped by atom": a tenth of the atoms go without
the condition, in place of a fifth of the structures. "Contrastive term": a third pass, told another structure's
embedding, must do worse by 0.2 σ². "σ from large to small": σ begins at four times its value and falls for 500 steps.
"Pooled by element": a vector for each element, and atoms are told that of their own. "Five of these together":
standardised, modulation not zero at first, into the input features, into the update layers, and σ from large to small.
"Mean of the noise kept": it is not taken out in training. "Difference": of the mean features in each block, of the
clean and the noisy structure; "of embeddings": c of the clean structure less c of the noisy one. The ratio compares the
same structures and noise, so its error is small: below 1, the form explains more. On PaiNN only forms that tell
differences gain more than 3 %.
"""
PRETRAINING = """\
## What the condition carried in pre-training on real structures

The pre-trainings of [evidence](evidence.md#few-labels-pre-training-on-structures-alone), judged on held-out structures
of their data as in the section before. Each is compared with plain denoising of equally many steps, which costs half.
"""
COMPONENTS = """\
### Why it explains so little of larger structures

The noise of N atoms has 3N − 3 components, beside its mean. To first order in σ, K independent invariants that a model
is told of the clean structure take K of them away, if it can form the same invariants of the noisy structure: a share
K / (3N − 3). "Components" is the explained share times 3N − 3. Structures of like size are taken together. ± is the
standard error over structures. Slabs have four fixed atoms: of their noise a quarter fewer components move than are
counted here. The picture is under [what bounds it](#what-bounds-it).
"""
PROBES = """\
## What frozen embeddings hold

Ridge regression and nearest neighbours on frozen embeddings, fitted to the training structures and scored on the test
file: the features pooled over a structure's atoms, and SCD's c. "% left" is the share of the variance that is left
over, 100 where the embedding is worth no more than the mean; energies are per atom, beyond a sum over elements. Groups
are kinds of structure, such as surfaces. The polymorph of an oxide is that of the nearest structure of another metal.
On oxides labels are energies alone.
"""
PROPERTIES = """\
## A scalar property: HOMO-LUMO gaps

By GFN2-xTB. "Gaps" are of frames of molecular dynamics of 88 molecules at 300 to 1000 K; the test frames are of the
same molecules, later in their trajectories. "Relaxed gaps" are of 3600 relaxed molecules of up to seven heavy atoms
(C, N, O, F), each there once, so test molecules are new (`benchmarks/evidence/relaxed_molecules.py`). Pre-training has
the structures of all training data but the held-out ones, without labels; batches of 8 fine-tune, with noisy nodes
beside the property and without. "Scratch" begins with random weights; "change" is against it, by seed. The gap is the
mean of the atoms' values.
"""
FAIRCHEM2 = """\
## fairchem 2.x

A small eSCN-MD (two blocks of 32 channels, lmax 2) with direct forces or with the energy's gradient, 300 steps of up to
220 atoms, four structures of metals (oxides: of up to 110 atoms, energies alone), by the host's own command;
pre-training has 400 steps on the structures of all training data. Errors are those of the inference checkpoint in the
host's calculator. DeNS and SCD beside labels denoise in half of the steps.
"""


def fill(page: str, contents: dict[str, str]) -> str:
    """The page with new contents between its marks. Marks without contents are an error, the reverse is not."""

    def put(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- begin {name} -->\n{contents[name]}<!-- end {name} -->"

    return re.sub(r"<!-- begin (\w+) -->\n.*?<!-- end \1 -->", put, page, flags=re.DOTALL)


def stored(folder: Path) -> list[list[Record]]:
    """The lines of the files of results: of learning, the condition, properties, fairchem 2.x, and probes."""
    names = ("learning", "condition", "properties", "fairchem2", "probes")
    return [Results(folder / f"{name}.jsonl").records() for name in names]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence.report", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument(
        "--results", type=Path, default=HERE / "results", metavar="FOLDER", help="of the files of results"
    )
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="FOLDER", help="of the pages to fill in")
    options = parser.parse_args(arguments)
    learning, condition, *others = stored(options.results)
    contents = sections(learning, condition, *others)
    for page in (options.docs / name for name in PAGES):
        page.write_text(fill(page.read_text(), contents))
    figures = options.docs / "figures"
    ladder, varied, _ = parted(condition)
    with style.printed():
        if found := groups(ladder, pretrainings(learning)):
            figures.mkdir(exist_ok=True)
            draw_components(found, figures / "components.png")
        for draw, records, name in (
            (draw_labels, of_several_budgets(learning), "few_labels"),
            (draw_curves, trained(learning, "long", "long_slabs"), "beside_labels"),
            (draw_ladder, ladder, "condition"),
            (partial(draw_frontier, ladder=ladder), varied, "frontier"),
        ):
            if compared(records):
                figures.mkdir(exist_ok=True)
                draw(records, figures / f"{name}.png")


if __name__ == "__main__":
    main()
