"""Hooks that live for a pass, for adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(*handles: RemovableHandle) -> Iterator[None]:
    """Remove hooks on the way out, exceptions included."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def with_scalars(embedding: Tensor, rows: Sequence[int], change: Callable[[Tensor], Tensor]) -> Tensor:
    """A copy of spherical coefficients with other l = 0 features.

    Args:
        embedding: [N, K, C] coefficients.
        rows: the l = 0 row of each of R resolutions.
        change: [N, R·C] to [N, R·C], in the order of rows.
    """
    # A copy of these rows alone: a view would keep all of the embedding for backward. Plain numbers as indices, since a
    # tensor of them would have to be sent to the device.
    scalars = torch.cat([embedding[:, row] for row in rows], dim=1)
    changed = embedding.clone()
    for row, value in zip(rows, change(scalars).chunk(len(rows), dim=1), strict=True):
        changed[:, row] = value
    return changed
