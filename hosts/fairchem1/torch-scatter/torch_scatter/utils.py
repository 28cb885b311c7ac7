"""Shapes: the part of `torch_scatter.utils` that fairchem-core 1.10 imports."""

from __future__ import annotations

from torch import Tensor


def broadcast(src: Tensor, other: Tensor, dim: int) -> Tensor:
    """View an index in the shape of the values that it belongs to.

    Args:
        src: one-dimensional, along `dim` of `other`; or with the first dimensions of `other`.
        other: [..., n, ...], the values.
        dim: the dimension of `other` that a one-dimensional `src` runs along.

    Returns:
        A view of `src`, expanded to the shape of `other`.
    """
    before = dim % other.dim() if src.dim() == 1 else 0
    after = other.dim() - before - src.dim()
    return src.view((1,) * before + tuple(src.shape) + (1,) * after).expand_as(other)
