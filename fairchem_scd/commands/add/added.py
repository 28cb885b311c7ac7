"""A config with a task added, and how two configs differ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Added:
    """A config with a task added.

    Attributes:
        before, after: text of the config and of the new file.
        shares: share of the steps of each task that is on. All other steps are ordinary.
        pretraining: the config trains no outputs.
    """

    before: str
    after: str
    shares: dict[str, float]
    pretraining: bool


def differences(one: Any, other: Any, key: str = "") -> Iterator[str]:
    """Dotted keys under which two configs differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in dict.fromkeys([*one, *other]):
            inner = f"{key}.{name}" if key else str(name)
            if name not in one or name not in other:
                yield inner
            else:
                yield from differences(one[name], other[name], inner)
    elif type(one) is not type(other) or (one != other and not _both_nan(one, other)):
        yield key


def _both_nan(one: Any, other: Any) -> bool:
    return isinstance(one, float) and math.isnan(one) and math.isnan(other)
