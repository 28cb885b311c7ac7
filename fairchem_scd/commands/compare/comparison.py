"""Validation errors of runs with and without a task, and how sure their difference is."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, mean, stdev

import numpy as np
from scipy import stats

from fairchem_scd.commands.plot.curves import Curve
from fairchem_scd.errors import ConfigError

ENDING = "_mae"
_PREFIX = "val/"
_UNITS = {"energy": "eV", "forces": "eV/Å", "stress": "eV/Å³"}
_FALLING = 0.02
"""Errors that fell by this share in the last fifth of the runs had not come to an end."""


def named(runs: Sequence[str]) -> dict[str, list[str]]:
    """Folders of runs by the name of their arm, from words such as `plain=FOLDER`.

    Raises:
        ConfigError: a word is not of this kind, a folder is given twice, or there are fewer than two names.
    """
    folders: dict[str, list[str]] = {}
    given: dict[Path, str] = {}
    for run in runs:
        name, equals, folder = run.partition("=")
        if not (name and equals and folder):
            raise ConfigError(f"{run}: give each run as NAME=RUN, such as plain=logs/tensorboard/my_run")
        path = Path(folder).resolve()
        if path in given:
            raise ConfigError(f"{run}: the run is given twice, as {given[path]} too")
        given[path] = run
        folders.setdefault(name, []).append(folder)
    if len(folders) < 2:
        raise ConfigError(
            f"all runs have the name '{next(iter(folders))}'; give runs of two names, the one to compare with first"
        )
    return folders


@dataclass(frozen=True)
class Arm:
    """Runs of one config that differ in their seed.

    Attributes:
        name: that the user gave it.
        runs: by folder, a run's curves by tag, such as `val/forces_mae`.
    """

    name: str
    runs: Mapping[str, Mapping[str, Curve]]


@dataclass(frozen=True)
class Change:
    """By which share an arm's error differs from the first arm's; below zero it is lower.

    Attributes:
        value: ratio of the geometric means, minus one.
        interval: of 95 % confidence; None: one of the two arms has one run alone.
    """

    value: float
    interval: tuple[float, float] | None

    @classmethod
    def between(cls, errors: Sequence[float], first: Sequence[float]) -> Change:
        """Of the errors of an arm's runs against those of the first arm's, by a t-test of their logarithms.

        Where there are equally many, the nth of one are paired with the nth of the other. Else it is Welch's test.
        """
        value = geometric_mean(errors) / geometric_mean(first) - 1
        if min(len(errors), len(first)) < 2:
            return cls(value, None)
        paired = len(errors) == len(first)
        logs, first_logs = np.log(errors), np.log(first)
        if np.ptp(logs - first_logs if paired else [np.ptp(logs), np.ptp(first_logs), 0]) == 0:
            return cls(value, (value, value))  # the test is not defined
        test = stats.ttest_rel(logs, first_logs) if paired else stats.ttest_ind(logs, first_logs, equal_var=False)
        low, high = test.confidence_interval(0.95)
        return cls(value, (math.expm1(low), math.expm1(high)))

    @property
    def shown(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


@dataclass(frozen=True)
class Error:
    """One validation error of all arms.

    Attributes:
        name: such as `forces_mae`, or `oc20_forces_mae` where data sets have outputs of their own.
        curves: by arm, a curve for each run, up to the last step that all runs have.
    """

    name: str
    curves: dict[str, list[Curve]]

    @property
    def unit(self) -> str:
        """ "" where it is not known."""
        return _UNITS.get(self.name.removesuffix(ENDING).rpartition("_")[2], "")

    def lowest(self, arm: str) -> list[float]:
        """The lowest error of each run of an arm; above zero, so that errors have ratios."""
        return [max(float(np.nanmin(curve.values)), 1e-12) for curve in self.curves[arm]]

    def change(self, arm: str) -> Change:
        """An arm's change against the first arm."""
        return Change.between(self.lowest(arm), self.lowest(next(iter(self.curves))))

    def fell(self, arm: str) -> float:
        """By which share the lowest error of an arm's runs fell in the last fifth of the steps, in the mean.

        NaN where a run was not validated before that.
        """
        shares = []
        for curve, lowest in zip(self.curves[arm], self.lowest(arm), strict=True):
            before = curve.values[curve.steps <= 0.8 * curve.steps[-1]]
            shares.append(1 - lowest / float(np.nanmin(before)) if np.isfinite(before).any() else math.nan)
        return mean(shares)


@dataclass(frozen=True)
class Comparison:
    """Arms and what their runs were validated by.

    Attributes:
        arms: by name, the number of runs; the first is what others are compared with.
        steps: the last step that all runs have.
        longest: the last step of any run.
        errors: those that all runs have.
    """

    arms: dict[str, int]
    steps: int
    longest: int
    errors: list[Error]


def compare(arms: Sequence[Arm]) -> Comparison:
    """Compare runs by the validation errors that all of them have, those of corrupted structures left out.

    Raises:
        ConfigError: the runs have no such error, or one of them was not validated by the last step of another.
    """
    every = {folder: curves for arm in arms for folder, curves in arm.runs.items()}
    validated = {folder: [tag for tag in curves if _counts(tag)] for folder, curves in every.items()}
    for folder, tags in validated.items():
        if not tags:
            raise ConfigError(f"{folder}: no validation errors in its log, such as val/forces_mae")
    shared = set.intersection(*map(set, validated.values()))
    if not shared:
        listed = "; ".join(f"{folder} has {', '.join(sorted(tags))}" for folder, tags in validated.items())
        raise ConfigError(f"the runs have no validation error in common: {listed}")
    last = {folder: int(curves[min(shared)].steps[-1]) for folder, curves in every.items()}
    steps = min(last.values())
    errors = []
    for tag in sorted(shared, key=_order):
        curves = {arm.name: [_until(run[tag], steps, folder) for folder, run in arm.runs.items()] for arm in arms}
        errors.append(Error(tag.removeprefix(_PREFIX), curves))
    return Comparison({arm.name: len(arm.runs) for arm in arms}, steps, max(last.values()), errors)


def text(found: Comparison) -> str:
    """A comparison as a table and sentences."""
    first, *others = found.arms
    heads = ["", "runs", *(f"{e.name}{f', {e.unit}' if e.unit else ''}" for e in found.errors)]
    rows = [[arm, str(count), *(_spread(e.lowest(arm)) for e in found.errors)] for arm, count in found.arms.items()]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [f"Lowest validation errors up to step {found.steps} (± standard deviation over runs):", ""]
    lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (heads, *rows)]
    lines.append("")
    lines += [_sentence(e, arm, first) for arm in others for e in found.errors]
    alone = [arm for arm, count in found.arms.items() if count < 2]
    if alone:
        lines.append(
            f"One run alone of {', '.join(alone)}: how much errors differ from seed to seed is not known. Train each "
            "config with three seeds."
        )
    falling = [
        f"{e.name} of {arm} by {100 * e.fell(arm):.0f} %"
        for e in found.errors
        for arm in found.arms
        if e.fell(arm) > _FALLING
    ]
    if falling:
        lines.append(
            f"Still falling in the last fifth of the steps: {', '.join(falling)}. Longer runs may come out otherwise."
        )
    if len({count for count in found.arms.values() if count > 1}) > 1:
        lines.append("Numbers of runs differ, so runs are not paired by seed: the intervals are wider than need be.")
    if found.longest > found.steps:
        lines.append(
            f"Some runs are longer, up to step {found.longest}. Where learning rates follow a schedule over a run's "
            "length, runs of one length alone can be compared."
        )
    return "\n".join(lines)


def _counts(tag: str) -> bool:
    """Whether a tag is of an error of the config's outputs: not of noise, nor of one component of the forces."""
    return bool(re.fullmatch(r"val/(?!.*denoising)(?!forces[xyz]_)\w+_mae", tag))


def _order(tag: str) -> tuple[bool, bool, str]:
    return "forces" not in tag, "energy" not in tag, tag


def _until(curve: Curve, steps: int, folder: str) -> Curve:
    rows = curve.steps <= steps
    if not np.isfinite(curve.values[rows]).any():
        raise ConfigError(f"{folder}: no validation up to step {steps}, where the shortest run ends")
    return Curve(curve.steps[rows], curve.values[rows])


def _spread(errors: Sequence[float]) -> str:
    return f"{mean(errors):.4g}" + (f" ± {stdev(errors):.2g}" if len(errors) > 1 else "")


def _sentence(error: Error, arm: str, first: str) -> str:
    change = error.change(arm)
    size = f"{abs(100 * change.value):.1f} %"
    where = "lower" if change.value < 0 else "higher"
    if change.interval is None:
        return f"{arm}: {error.name} {size} {where} than {first} (no interval)"
    interval = f"95 % interval {100 * change.interval[0]:+.1f} to {100 * change.interval[1]:+.1f} %"
    if change.shown:
        return f"{arm}: {error.name} {size} {where} than {first} ({interval})"
    return f"{arm}: {error.name}: these runs show no difference from {first} ({interval})"
