"""Intervals for what was measured in many rounds."""

from __future__ import annotations

import math


def median_interval(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """Interval for the median by order statistics; all of the values where they are too few for the level."""
    ordered, n = sorted(values), len(values)
    rank, tail = 0, 0.5**n
    # Largest rank with a binomial tail below it of at most (1 - level) / 2.
    while rank < (n - 1) // 2 and tail + math.comb(n, rank + 1) * 0.5**n <= (1 - level) / 2:
        rank += 1
        tail += math.comb(n, rank) * 0.5**n
    return ordered[rank], ordered[n - 1 - rank]
