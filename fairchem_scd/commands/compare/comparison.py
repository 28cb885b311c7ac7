"""Validation errors of runs with and without a task, and how sure their difference is."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean, mean, stdev
from typing import Literal

import numpy as np
from scipy import stats

from fairchem_scd.commands.compare.runs import ENDING, Run
from fairchem_scd.commands.plot.curves import Curve
from fairchem_scd.errors import ConfigError

_PREFIX = "val/"
_UNITS = {"energy": "eV", "forces": "eV/Å", "stress": "eV/Å³", "atom": "eV"}
_FALLING = 0.02
"""Errors that fell by this share in the last fifth of the training had not come to an end."""

_ALIKE = 0.1
"""Lengths of runs, and numbers of their validations, that differ by this share are told apart."""

_FEW = 5
"""With fewer validations than this nothing is said of the last fifth."""

_WIDTH = 110

At = Literal["best", "last"]
"""The validation whose errors count for a run: that with the lowest first error, or the last."""


@dataclass(frozen=True)
class Change:
    """By which share a config's error differs from the first config's; below zero it is lower.

    Attributes:
        value: ratio of the geometric means, minus one.
        interval: of 95 % confidence; None: one of the two has one run alone.
    """

    value: float
    interval: tuple[float, float] | None

    @classmethod
    def between(cls, errors: Sequence[float], first: Sequence[float]) -> Change:
        """Of the errors of a config's runs against those of the first's, by a t-test of their logarithms.

        Where there are equally many, the nth of one are paired with the nth of the other. Else it is Welch's test.
        """
        value = geometric_mean(errors) / geometric_mean(first) - 1
        if min(len(errors), len(first)) < 2:
            return cls(value, None)
        paired = len(errors) == len(first)
        logs, first_logs = np.log(errors), np.log(first)
        if max(map(np.ptp, [logs - first_logs] if paired else [logs, first_logs])) < 1e-9:
            return cls(value, (value, value))  # the test is not defined
        test = stats.ttest_rel(logs, first_logs) if paired else stats.ttest_ind(logs, first_logs, equal_var=False)
        low, high = test.confidence_interval(0.95)
        return cls(value, (_minus_one(low), _minus_one(high)))

    @property
    def sure(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


@dataclass(frozen=True)
class Error:
    """One validation error of all runs.

    Attributes:
        name: such as `forces_mae`, or `oc20_forces_mae` where data sets have outputs of their own.
        curves: by config, a curve for each run.
        values: by config, the error that counts for each run; above zero.
    """

    name: str
    curves: dict[str, list[Curve]]
    values: dict[str, list[float]]

    @property
    def heading(self) -> str:
        """The name, with the unit where it is known."""
        unit = _UNITS.get(self.name.removesuffix(ENDING).rpartition("_")[2])
        return self.name if unit is None else f"{self.name} ({unit})"

    def change(self, config: str) -> Change:
        """A config's change against the first one."""
        return Change.between(self.values[config], self.values[next(iter(self.values))])

    def fell(self, config: str) -> float:
        """By which share the lowest error of a config's runs fell in the last fifth of their steps, in the mean."""
        shares = []
        for curve in self.curves[config]:
            before = curve.values[curve.steps <= 0.8 * curve.steps[-1]]
            lowest, earlier = (np.nanmin(values, initial=np.inf) for values in (curve.values, before))
            shares.append(1 - lowest / earlier if 0 < earlier < np.inf else math.nan)
        return mean(shares)


@dataclass(frozen=True)
class Comparison:
    """Runs of several configs and what they were validated by.

    Attributes:
        runs: by config; the first is what others are compared with.
        at: which validation counts.
        errors: those that all runs have, the one that chooses the best validation first.
        notes: what a reader must know of the runs.
    """

    runs: dict[str, list[Run]]
    at: At
    errors: list[Error]
    notes: list[str]


def compare(runs: dict[str, list[Run]], at: At = "best") -> Comparison:
    """Compare runs by the validation errors that all of them have, those of corrupted structures left out.

    Args:
        runs: of each config, which differ in their seed.
        at: which validation counts for a run. "best": that with the lowest force error, where there are no forces the
            lowest energy or whatever comes first.

    Raises:
        ConfigError: the runs have no such error in common, or one of a run's is not a number at any validation.
    """
    every = [run for of in runs.values() for run in of]
    for run in every:
        if not any(map(_counts, run.curves)):
            raise ConfigError(f"{run.label}: no validation errors in its log, such as val/forces_mae")
    found = sorted({tag for run in every for tag in run.curves if _counts(tag)}, key=_order)
    shared = [tag for tag in found if all(tag in run.curves for run in every)]
    if not shared:
        listed = "; ".join(f"{r.label} has {', '.join(t for t in found if t in r.curves)}" for r in every)
        raise ConfigError(f"the runs have no validation error in common: {listed}")
    for run in every:
        for tag in shared:
            if not np.isfinite(run.curves[tag].values).any():
                raise ConfigError(f"{run.label}: {tag} is not a number at any validation; leave this run out")
    zero = [tag for tag in shared if any(np.nanmin(run.curves[tag].values) <= 0 for run in every)]
    counted = [tag for tag in shared if tag not in zero]
    if not counted:
        raise ConfigError(f"the errors that the runs have in common are zero: {', '.join(zero)}")
    missing = {tag: _some([r.label for r in every if tag not in r.curves]) for tag in found if tag not in shared}
    notes = [*_notes_on_lengths(runs, counted[0]), *_notes_on_numbers(every, counted)]
    notes += [f"Left out: {tag.removeprefix(_PREFIX)}, which is not in the log of {of}." for tag, of in missing.items()]
    notes += [f"Left out: {tag.removeprefix(_PREFIX)}, which is zero at some validation." for tag in zero]
    errors = []
    for tag in counted:
        values = {config: [_value(run, tag, counted[0], at) for run in of] for config, of in runs.items()}
        curves = {config: [run.curves[tag] for run in of] for config, of in runs.items()}
        errors.append(Error(tag.removeprefix(_PREFIX), curves, values))
    return Comparison(runs, at, errors, notes)


def text(found: Comparison) -> str:
    """A comparison as a table and sentences."""
    first, *others = found.runs
    chosen = "of the last validation" if found.at == "last" else f"where {found.errors[0].name} was lowest"
    heads = ["", "runs", "last step", *(e.heading for e in found.errors)]
    rows = [
        [name, str(len(of)), _steps(of, found.errors[0]), *(_spread(e.values[name]) for e in found.errors)]
        for name, of in found.runs.items()
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [f"Validation errors {chosen} (mean ± standard deviation over runs):", ""]
    lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (heads, *rows)]
    sentences = found.notes + [_sentence(e, name, first) for name in others for e in found.errors]
    for name in others:
        if len(found.runs[name]) == len(found.runs[first]) > 1:
            pairs = zip(found.runs[first], found.runs[name], strict=True)
            sentences.append(f"Paired, in the order given: {', '.join(f'{a.label} – {b.label}' for a, b in pairs)}.")
    few = [f"{name} ({len(of)})" for name, of in found.runs.items() if len(of) < 3]
    if few:
        sentences.append(
            f"Fewer than three runs of {', '.join(few)}. Errors differ from seed to seed; with three or more runs of "
            "each config the interval says how much may be chance."
        )
    if len(others) * len(found.errors) > 2:
        sentences.append(
            "There are several comparisons here. Of twenty without any difference, one has an interval without zero."
        )
    sentences += _notes_on_the_end(found)
    wrapped = [textwrap.fill(s, _WIDTH, subsequent_indent="  ", break_on_hyphens=False) for s in sentences]
    return "\n".join([*lines, "", *wrapped])


def _counts(tag: str) -> bool:
    """Whether a tag is of an error of the config's outputs: not of noise, nor of one component of the forces."""
    return bool(re.fullmatch(r"val/(?!.*denoising)(?!forces[xyz]_)[\w-]+_mae", tag))


def _order(tag: str) -> tuple[bool, bool, str]:
    return "forces" not in tag, "energy" not in tag, tag


def _value(run: Run, tag: str, first: str, at: At) -> float:
    """The error that counts: at the validation that the first error chooses, or the latest before it with a number."""
    chooser, curve = run.curves[first], run.curves[tag]
    finite = np.isfinite(chooser.values)
    steps, values = chooser.steps[finite], chooser.values[finite]
    step = steps[-1] if at == "last" else steps[np.argmin(values)]
    known = np.isfinite(curve.values)
    until = known & (curve.steps <= step)
    return float(curve.values[until][-1] if until.any() else curve.values[known][0])


def _notes_on_lengths(runs: Mapping[str, list[Run]], tag: str) -> list[str]:
    """What differs between the runs so much that their errors may differ by it alone."""
    notes = []
    last = {run.label: int(run.curves[tag].steps[-1]) for of in runs.values() for run in of}
    if min(last.values()) < (1 - _ALIKE) * max(last.values()):
        short, long = min(last, key=last.__getitem__), max(last, key=last.__getitem__)
        notes.append(
            f"The runs are not equally long: {short} ends at step {last[short]}, {long} at step {last[long]}. Each is "
            "taken to its own end. If a run was stopped early, its error is not that of a whole training."
        )
    often = {run.label: len(run.curves[tag].steps) for of in runs.values() for run in of}
    if min(often.values()) < (1 - _ALIKE) * max(often.values()):
        rare, frequent = min(often, key=often.__getitem__), max(often, key=often.__getitem__)
        notes.append(
            f"{rare} was validated {often[rare]} times and {frequent} {often[frequent]} times. The best of more "
            "validations is lower by chance; `--at last` compares the last ones."
        )
    return notes


def _notes_on_numbers(every: Sequence[Run], tags: Sequence[str]) -> list[str]:
    """Where errors are not numbers."""
    found = []
    for run in every:
        for tag in tags:
            steps = run.curves[tag].steps[~np.isfinite(run.curves[tag].values)]
            if len(steps):
                found.append(f"{run.label}: {tag.removeprefix(_PREFIX)} is not a number at step {steps[0]}.")
    return found


def _notes_on_the_end(found: Comparison) -> list[str]:
    """Whether the training was long enough to tell."""
    often = min(len(curve.steps) for e in found.errors for curves in e.curves.values() for curve in curves)
    if often < _FEW:
        times = "once" if often == 1 else f"{often} times"
        return [f"A run was validated only {times}, so whether errors were still falling is not known."]
    fell = {(e.name, name): e.fell(name) for e in found.errors for name in found.runs}
    falling = [f"{e} of {name} by {100 * share:.0f} %" for (e, name), share in fell.items() if share > _FALLING]
    if not falling:
        return []
    return [
        f"Still falling in the last fifth of the training: {', '.join(falling)}. Longer runs may change the result."
    ]


def _sentence(error: Error, name: str, first: str) -> str:
    change = error.change(name)
    where = "lower" if change.value < 0 else "higher"
    said = f"{_percent(abs(change.value))} {where} than {first}" if abs(change.value) >= 5e-4 else f"equal to {first}"
    if change.interval is None:
        return f"{name}: {error.name} {said} (no interval: one run)"
    low, high = (("-" if end < 0 else "+") + _percent(abs(end)) for end in change.interval)
    doubt = "" if change.sure or change.value == 0 else ": may be chance, more seeds can tell"
    return f"{name}: {error.name} {said} (95 % interval {low} to {high}){doubt}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 10 else "over 1000 %"


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.4g}" + (f" ± {stdev(values):#.2g}" if len(values) > 1 else "")


def _steps(runs: Sequence[Run], error: Error) -> str:
    last = sorted({int(run.curves[_PREFIX + error.name].steps[-1]) for run in runs})
    return str(last[0]) if len(last) == 1 else f"{last[0]} to {last[-1]}"


def _some(labels: Sequence[str]) -> str:
    return ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")


def _minus_one(log: float) -> float:
    """exp(log) − 1, or infinity."""
    return math.expm1(log) if log < 700 else math.inf
