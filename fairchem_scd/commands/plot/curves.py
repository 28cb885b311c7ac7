"""The values that a run logged under one tag, and statistics of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

_BINS = 400


@dataclass(frozen=True)
class Curve:
    """The values that a run logged under one tag.

    Attributes:
        steps: [n] int, training steps, in rising order.
        values: [n] float, in the unit the run logged.
    """

    steps: np.ndarray
    values: np.ndarray


def curve_of(points: Mapping[int, float]) -> Curve:
    """A curve of values by step, in any order."""
    steps = np.fromiter(points.keys(), dtype=np.int64, count=len(points))
    values = np.fromiter(points.values(), dtype=np.float64, count=len(points))
    order = np.argsort(steps)
    return Curve(steps[order], values[order])


def same_curves(one: Curve, other: Curve) -> bool:
    """Whether two curves have the same values at the same steps; NaN is equal to NaN."""
    return np.array_equal(one.steps, other.steps) and np.array_equal(one.values, other.values, equal_nan=True)


def running_median(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Running median over 2% of the points, at least 21, at no more than `_BINS` steps: (steps, values)."""
    count = len(curve.steps)
    half = max(10, count // 100)
    centres = np.unique(np.linspace(0, count - 1, min(count, _BINS)).round().astype(int))
    windows = [slice(max(0, i - half), i + half + 1) for i in centres]
    return curve.steps[centres], np.array([_finite(np.nanmedian, curve.values[w]) for w in windows])


def binned(curve: Curve, low: float, high: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two percentiles of the points in each of `_BINS` bins: (steps, low, high)."""
    bins = np.array_split(np.arange(len(curve.steps)), _BINS)
    middle = [rows[len(rows) // 2] for rows in bins]
    bounds = [_finite(np.nanpercentile, curve.values[rows], [low, high]) for rows in bins]
    below, above = np.array([np.broadcast_to(bound, 2) for bound in bounds]).T
    return curve.steps[middle], below, above


def _finite(function: Callable[..., Any], values: np.ndarray, *arguments: Any) -> Any:
    """A statistic of the values that are numbers; NaN where none is."""
    return function(values, *arguments) if not np.isnan(values).all() else np.nan
