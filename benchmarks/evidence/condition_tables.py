"""Tables of docs/condition.md: the condition and the embeddings, of the lines of the files of results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.evidence.tables import Record, by_seed, channels, spread, table
from fairchem_scd.denoising.condition_report import Gain

NAMES = {
    "plain": "nothing: plain denoising",
    "embedding": "embedding (SCD as shipped)",
    "shrinkage": "nothing: the best by theory",
}
"""What runs are told, in the words of the tables."""


def ladder_table(records: list[Record]) -> str:
    """Noise errors at the end of each run, and what the condition explains."""
    plain = {but_form(r): r for r in records if r["run"]["form"] == "plain"}
    rows = []
    for record in sorted(records, key=lambda r: (r["run"]["data"], model_of(r), r["run"]["seed"])):
        run, last = record["run"], record["scores"]["curve"][-1]
        cells = [with_error(last.get(told)) for told in ("right", "other", "none")]
        beside = plain.get(but_form(record))
        ratio = ""
        if beside is not None and run["form"] != "plain":
            ratio = ratio_of(record["scores"]["structures"]["right"], beside["scores"]["structures"]["none"])
        head = [run["data"], model_of(record), str(record["scores"]["steps"]), str(run["seed"])]
        rows.append([*head, NAMES.get(run["form"], run["form"]), *cells, ratio, *variety(last)])
    heads = ["data", "model", "steps", "seed", "told", "right", "another's", "none", "right / plain denoising"]
    return table([*heads, *VARIETY], rows)


def levers_table(records: Sequence[Record]) -> str:
    """Noise errors of other forms of the condition, and their ratio to those of the package's form."""
    usual = {r["run"]["seed"]: r for r in records if r["run"]["form"] == "embedding"}
    rows = []
    for record in records:
        run, last = record["run"], record["scores"]["curve"][-1]
        beside, told = usual.get(run["seed"]), "none" if run["form"] == "plain" else "right"
        if beside is None:
            continue
        errors = (of["scores"]["structures"] for of in (record, beside))
        ratio = ratio_of(*(of[name] for of, name in zip(errors, (told, "right"), strict=True)))
        cells = [with_error(last.get(name)) for name in ("right", "other", "none")]
        head = [run["data"], str(record["scores"]["steps"]), str(run["seed"]), NAMES.get(run["form"], run["form"])]
        rows.append([*head, *cells, ratio, *variety(last)])
    heads = ["data", "steps", "seed", "told", "right", "another's", "none", "noise error / that of SCD as shipped"]
    return table([*heads, *VARIETY], rows)


def pretrained_table(records: list[Record]) -> str:
    """What the condition carried in the pre-trainings of `learning`, beside plain denoising of equal steps.

    Args:
        records: lines of pre-trainings, see `pretrainings`.
    """
    plain = {pretraining_of(r): r for r in records if told_of(r) == "plain"}
    rows = []
    for record in sorted(records, key=lambda r: (*pretraining_of(r), told_of(r))):
        beside = plain.get(pretraining_of(record))
        if told_of(record) == "plain" or beside is None:
            continue
        data, model, steps, _, seed = pretraining_of(record)
        last, errors = record["scores"]["curve"][-1], record["scores"]["structures"]
        difference, its_error = last["other_minus_right"]
        rows.append(
            [
                *(data, model, str(steps), str(seed), told_of(record)),
                *(with_error(last[told]) for told in ("right", "other", "none")),
                f"{difference / its_error:.1f}",
                with_error(beside["scores"]["curve"][-1]["none"]),
                ratio_of(errors["right"], beside["scores"]["structures"]["none"]),
                *variety(last),
            ]
        )
    heads = [
        "data",
        "model",
        "steps",
        "seed",
        "told",
        "right",
        "another's",
        "none",
        "(another's − right) / its error",
    ]
    return table([*heads, "plain denoising", "right / plain denoising", *VARIETY], rows)


VARIETY = ("dimensions", "spread")


def variety(scores: Mapping[str, Any]) -> list[str]:
    """How what runs are told varies over structures, in the columns `VARIETY`; older lines have no spread."""
    return [
        f"{scores[name]:.{digits}f}" if name in scores else "" for name, digits in zip(VARIETY, (1, 2), strict=True)
    ]


def pretrainings(records: Iterable[Record]) -> list[Record]:
    """The lines of pre-trainings that were judged, among the results of `benchmarks.evidence.learning`."""
    return [r for r in records if "arm" not in r["run"] and "structures" in r["scores"]]


def pretraining_of(record: Record) -> tuple[str, str, int, float, int]:
    """Data, model, steps, σ in Å, and seed of a pre-training."""
    run = record["run"]
    before = run["pretraining"]
    return run["data"], model_of(record), before["length"]["steps"], before["std"], before["seed"]


def model_of(record: Record) -> str:
    """Backbone and number of channels of a run."""
    return f"{record['run']['model']['backbone']} {channels(record)}"


def told_of(record: Record) -> str:
    """The form of a pre-training's condition; "plain": it has none."""
    return record["run"]["pretraining"]["form"]


def probes_table(records: list[Record]) -> str:
    """Scores of probes of frozen embeddings, means over seeds."""
    groups = by_seed(records, lambda r: (r["run"]["data"], r["run"]["arm"]))
    targets = ("energy", "volume", "gap", "group", "polymorph")
    names = [name for name in targets if any(name in r["scores"]["features"] for r in records)]
    rows = []
    for (data, arm), seeds in sorted(groups.items(), key=lambda group: group[0][0]):
        for what in ("features", "c"):
            scores = [record["scores"][what] for record in seeds.values() if what in record["scores"]]
            if scores:
                cells = [spread([100 * score[name] for score in scores if name in score]) for name in names]
                rows.append([data, arm, what, str(len(scores)), *cells])
    units = {"group": "wrong", "polymorph": "wrong"}
    return table(["data", "backbone", "probed", "seeds", *(f"{n}, % {units.get(n, 'left')}" for n in names)], rows)


def ratio_of(errors: Sequence[float], others: Sequence[float]) -> str:
    """Ratio of the means of paired errors, with its standard error over structures."""
    gain = Gain.of(torch.tensor(errors), torch.tensor(others))
    return f"{1 - gain.value:.3f} ± {gain.error:.3f}"


def with_error(pair: Sequence[float] | None) -> str:
    """A mean and its standard error; nothing where there is none."""
    return "" if pair is None else f"{pair[0]:.4f} ± {pair[1]:.4f}"


def but_form(record: Record) -> str:
    """A name for all settings of a run of `benchmarks.evidence.condition` but the form of its condition."""
    return repr(sorted((key, repr(value)) for key, value in record["run"].items() if key != "form"))
