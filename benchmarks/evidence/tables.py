"""Tables of what was learned, of the lines of the files of results."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

FIRST = "plain"
"""The arm that others are compared with."""

Record = dict[str, Any]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± standard deviation of three and more; one number or two as they are; nothing where there is none."""
    if len(values) < 3:
        return ", ".join(f"{value:.{digits}f}" for value in values)
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def change(values: dict[int, float], plain: dict[int, float]) -> str:
    """Change against the plain runs of the same seeds in percent: mean ± standard deviation, or one or two numbers."""
    percents = [100 * (values[seed] / plain[seed] - 1) for seed in sorted(values.keys() & plain.keys())]
    if len(percents) < 3:
        return ", ".join(f"{percent:+.0f}" for percent in percents) + (" %" if percents else "")
    return f"{statistics.mean(percents):+.0f} ± {statistics.stdev(percents):.0f} %"


def labels_for(error: float, curve: dict[int, float]) -> float | None:
    """How many labels a curve {labels: error} needs for an error, between its points, straight in log-log.

    None where the error lies outside of what the curve reaches.
    """
    points = sorted(curve.items())
    for (few, high), (many, low) in pairwise(points):
        if high >= error >= low and high > low:
            share = math.log(high / error) / math.log(high / low)
            return few * (many / few) ** share
    return None


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


# --- learning ---------------------------------------------------------------------------------------------------------


def trained(records: Iterable[Record], *suites: str) -> list[Record]:
    """Runs that were trained on labels, of these suites."""
    return [r for r in records if r["suite"] in suites and "arm" in r["run"]]


def by_seed(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, dict[int, Record]]:
    """Records by key, and by seed under it, in order of first sight."""
    groups: dict[Any, dict[int, Record]] = defaultdict(dict)
    for record in records:
        groups[key(record)][record["run"]["seed"]] = record
    return dict(groups)


def errors_table(
    records: list[Record],
    head: dict[str, Callable[[Record], Any]],
    errors: dict[str, Callable[[Record], float | None]],
    first: str = FIRST,
    digits: int = 1,
    notes: Mapping[str, Callable[[list[Record]], str]] | None = None,
    changes: bool = True,
) -> str:
    """Errors of each arm, and their change against the first arm by seed. What stands alone is left out.

    Args:
        records: of finished runs.
        head: the columns that say what is compared, by their headings; arms are compared where these are equal.
        errors: the columns of errors; None: the run has no such error.
        first: the arm that others are compared with.
        digits: of the errors, after the point.
        notes: further columns, of all runs of a row.
        changes: show the changes.
    """
    groups = by_seed(records, lambda record: (*(of(record) for of in head.values()), record["run"]["arm"]))
    arms = Counter(key[:-1] for key in groups)
    notes, rows = notes or {}, []
    for key in sorted((key for key in groups if arms[key[:-1]] > 1), key=lambda key: (key[:-1], key[-1] != first)):
        *said, arm = key
        seeds, plain = groups[key], groups.get((*said, first), {})
        cells = [note(list(seeds.values())) for note in notes.values()]
        for of in errors.values():
            values, base = (
                {seed: value for seed, record in group.items() if (value := of(record)) is not None}
                for group in (seeds, plain)
            )
            cells.append(spread([*values.values()], digits))
            if changes:
                cells.append("" if arm == first else change(values, base))
        rows.append([*map(str, said), arm, str(len(seeds)), *cells])
    columns = [heading for name in errors for heading in ((name, "change") if changes else (name,))]
    return table([*head, "training", "seeds", *notes, *columns], rows)


def arms_table(records: list[Record], split: str = "test", *, best: bool = False) -> str:
    """Errors of each arm, and their change against plain training by seed.

    Args:
        best: also the lowest held-out force error that each run had at any time.
    """
    return errors_table(
        records,
        {
            "data": lambda r: r["run"]["data"],
            "backbone": lambda r: r["run"]["model"]["backbone"],
            "channels": channels,
            "labels": number_of_labels,
            "steps": lambda r: r["run"]["length"]["steps"],
        },
        {
            "force MAE, meV/Å": lambda r: _milli(r, "force_mae", split),
            "energy MAE, meV/atom": lambda r: _milli(r, "energy_mae", split),
        },
        notes={"epochs": _epochs, "learning rate": _rates, "last fifth": _last_fifth}
        | ({"lowest held-out force MAE": _lowest} if best else {}),
    )


def rates_table(records: list[Record]) -> str:
    """Errors of each arm at each learning rate, and their change against plain training at the same rate by seed."""
    return errors_table(
        records,
        {
            "data": lambda r: r["run"]["data"],
            "backbone": lambda r: r["run"]["model"]["backbone"],
            "labels": number_of_labels,
            "steps": lambda r: r["run"]["length"]["steps"],
            "learning rate": lambda r: r["run"]["length"]["lr"],
        },
        {
            "held-out force MAE, meV/Å": lambda r: _milli(r, "force_mae", "held_out"),
            "test force MAE, meV/Å": lambda r: _milli(r, "force_mae"),
            "test energy MAE, meV/atom": lambda r: _milli(r, "energy_mae"),
        },
    )


def groups_table(records: list[Record]) -> str:
    """Energy errors of each group of test structures, of runs that have errors by group."""

    def energy(group: str) -> Callable[[Record], float | None]:
        return lambda record: 1000 * record["scores"]["test_groups"][group]["energy_mae"]

    groups = sorted({name for record in records for name in record["scores"]["test_groups"]})
    return errors_table(
        records,
        {
            "data": lambda r: r["run"]["data"],
            "labels": number_of_labels,
            "steps": lambda r: r["run"]["length"]["steps"],
            "energy heads": lambda r: "quiet" if r["run"].get("quiet_heads", True) else "the host's",
        },
        {group: energy(group) for group in groups},
        changes=False,
    )


def _epochs(records: list[Record]) -> str:
    return str(round(epochs(records[0])))


def epochs(record: Record, steps: int | None = None) -> float:
    """How often a run has seen each label after so many steps; None: at its end."""
    length = record["run"]["length"]
    return (steps or length["steps"]) * length["batch_size"] / number_of_labels(record)


def _rates(records: list[Record]) -> str:
    return ", ".join(dict.fromkeys(f"{record['run']['length']['lr']:g}" for record in records))


def _lowest(records: list[Record]) -> str:
    return spread([1000 * min(point["force_mae"] for point in record["scores"]["curve"]) for record in records])


def _last_fifth(records: list[Record]) -> str:
    """By how much the held-out error changed in the last fifth of the training, of forces if there are any."""
    changes = []
    for record in records:
        curve = record["scores"].get("curve", [])
        errors = [point.get("force_mae", point["energy_mae"]) for point in curve]
        at = [point["step"] for point in curve]
        before = [error for step, error in zip(at, errors, strict=True) if step <= 0.85 * at[-1]] if at else []
        if before:
            changes.append(100 * (errors[-1] / before[-1] - 1))
    return f"{statistics.mean(changes):+.0f} %" if changes else ""


def properties_table(records: list[Record]) -> str:
    """Errors of HOMO-LUMO gaps of each arm, and their change against training from random weights by seed."""
    return errors_table(
        records,
        {
            "data": lambda r: r["run"]["data"].replace("_", " "),
            "backbone": lambda r: r["run"]["model"]["backbone"],
            "channels": channels,
            "labels": lambda r: r["run"]["labels"],
            "steps": lambda r: r["run"]["length"]["steps"],
            "learning rate": lambda r: r["run"]["length"]["lr"],
        },
        {
            "held-out gap MAE, eV": lambda r: r["scores"]["held_out"],
            "test gap MAE, eV": lambda r: r["scores"]["test"],
        },
        first="scratch",
        digits=2,
    )


def fairchem2_table(records: list[Record]) -> str:
    """Errors of each arm on fairchem 2.x, and their change against plain training by seed."""
    return errors_table(
        records,
        {
            "data": lambda r: r["run"]["data"],
            "forces": lambda r: r["run"]["forces"],
            "labels": lambda r: r["run"]["labels"] or "all",
            "steps": lambda r: r["run"]["size"]["steps"],
        },
        {
            "force MAE, meV/Å": lambda r: _milli(r, "force_mae"),
            "energy MAE, meV/atom": lambda r: _milli(r, "energy_mae"),
        },
    )


def _milli(record: Record, name: str, split: str = "test") -> float | None:
    errors = record["scores"][split]
    return 1000 * errors[name] if name in errors else None


def compute_table(records: list[Record]) -> str:
    """Test errors beside what a run cost: how many structures went through the model, pre-training included.

    Also where ten runs share one pre-training.
    """
    groups = by_seed(
        records,
        lambda r: (
            r["run"]["data"],
            number_of_labels(r),
            passed(r["run"]),
            r["run"]["arm"],
            r["run"]["length"]["steps"],
        ),
    )
    rows = []
    for data, labels, cost, arm, steps in sorted(groups):
        seeds = groups[data, labels, cost, arm, steps]
        cells = [
            spread([error for r in seeds.values() if (error := _milli(r, name)) is not None])
            for name in ("force_mae", "energy_mae")
        ]
        shared = passed(next(iter(seeds.values()))["run"], shared_by=10)
        rows.append([data, str(labels), arm, str(steps), f"{cost:.0f}", f"{shared:.0f}", str(len(seeds)), *cells])
    heads = ["data", "labels", "training", "steps with labels", "structures passed", "ten fine-tunings, each", "seeds"]
    return table([*heads, "force MAE, meV/Å", "energy MAE, meV/atom"], rows)


def passed(run: Record, shared_by: int = 1) -> float:
    """How many structures went through the model, forwards and back: a step of SCD runs each twice.

    Args:
        shared_by: how many runs share one pre-training.
    """
    count = run["length"]["steps"] * run["length"]["batch_size"]
    before = run["pretraining"]
    if before is not None:
        passes = 1 if before["form"] == "plain" else 2
        count += passes * before["length"]["steps"] * before["length"]["batch_size"] / shared_by
    return count


def saved_table(records: list[Record]) -> str:
    """How many times more labels plain training needs for an arm's error, of forces where there are any."""
    rows = []
    groups = by_seed(records, lambda r: (r["run"]["data"], r["run"]["arm"], number_of_labels(r)))
    most = {d: max(n for data, arm, n in groups if (data, arm) == (d, FIRST)) for d, a, _ in groups if a == FIRST}
    for data, arm, labels in sorted(groups, key=lambda key: (key[0], key[2], key[1])):
        if arm == FIRST or labels >= most.get(data, 0):
            continue
        factors, beyond = [], 0
        for seed, record in groups[data, arm, labels].items():
            curve = {
                n: _error(seeds[seed])
                for (d, a, n), seeds in groups.items()
                if (d, a) == (data, FIRST) and seed in seeds
            }
            needed = labels_for(_error(record), curve)
            if needed is not None:
                factors.append(needed / labels)
            elif curve and _error(record) < min(curve.values()):
                beyond += 1
        shown = spread(factors) if factors else ""
        more = f"{beyond} of them better than plain training with any number tried" if beyond else ""
        rows.append([data, arm, str(labels), str(len(groups[data, arm, labels])), shown, more])
    return table(["data", "training", "labels", "seeds", "plain training needs so many times as many", ""], rows)


def _error(record: Record, split: str = "test") -> float:
    errors = record["scores"][split]
    return errors.get("force_mae", errors["energy_mae"])


def budgets(records: Iterable[Record]) -> int:
    """With how many numbers of labels plain training was run, on the data where it was with most."""
    groups = by_seed(
        (r for r in records if r["run"]["arm"] == FIRST), lambda r: (r["run"]["data"], number_of_labels(r))
    )
    datas = [data for data, _ in groups]
    return max(map(datas.count, datas), default=0)


def channels(record: Record) -> int:
    """Width of the model."""
    return record["run"]["model"]["channels"]


def widest(records: list[Record]) -> list[Record]:
    """The runs of the widest model, so that one curve holds one model."""
    most = max(map(channels, records), default=0)
    return [record for record in records if channels(record) == most]


def best_rates(records: Sequence[Record]) -> list[Record]:
    """The runs of the learning rate that was best on held-out structures, for each data, model, arm, labels, steps."""

    def cell(record: Record) -> tuple[Any, ...]:
        model = record["run"]["model"]
        steps = record["run"]["length"]["steps"]
        what = (record["run"]["data"], record["run"]["arm"], number_of_labels(record), steps)
        return (*what, model["backbone"], model["channels"])

    return _best(records, cell, lambda record: record["run"]["length"]["lr"])


def tuned(records: Sequence[Record]) -> list[Record]:
    """The runs of the length that was best on held-out structures, for each data, arm and labels.

    Of the lengths that all numbers of labels of the data were trained for without pre-training: a longer training with
    more labels would count as an effect of the labels. Learning rates as in `best_rates`.
    """
    records = best_rates(records)
    lengths: dict[str, dict[int, set[int]]] = {}
    for record in records:
        if record["run"]["arm"] == FIRST:
            of_data = lengths.setdefault(record["run"]["data"], {})
            of_data.setdefault(number_of_labels(record), set()).add(record["run"]["length"]["steps"])
    shared = {data: set.intersection(*of.values()) for data, of in lengths.items()}
    kept = [r for r in records if r["run"]["length"]["steps"] in shared.get(r["run"]["data"], ())]
    return _best(
        kept,
        lambda record: (record["run"]["data"], record["run"]["arm"], number_of_labels(record)),
        lambda record: record["run"]["length"]["steps"],
    )


def _best(records: Sequence[Record], cell: Callable[[Record], Any], variant: Callable[[Record], Any]) -> list[Record]:
    """In each cell the records of the variant with the lowest held-out error, of forces if there are any.

    Only variants that were run with as many seeds as any other are looked at.
    """
    groups = by_seed(records, lambda record: (cell(record), variant(record)))
    chosen = []
    for one in dict.fromkeys(key for key, _ in groups):
        variants = [list(seeds.values()) for (key, _), seeds in groups.items() if key == one]
        most = max(map(len, variants))
        whole = [runs for runs in variants if len(runs) == most]
        chosen += min(whole, key=lambda runs: statistics.mean(_error(run, "held_out") for run in runs))
    return chosen


def number_of_labels(record: Record) -> int:
    """Number of structures with labels, also where it is all of them."""
    return record["run"]["labels"] or ALL[record["run"]["data"]]


ALL = {"Mo": 155, "Li": 193, "oxides": 189, "slabs": 960, "molecules": 2534, "relaxed_molecules": 2304}
"""How many training structures there are, see `structures.load`."""
