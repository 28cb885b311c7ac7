"""The values that a run logged under one tag."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


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
