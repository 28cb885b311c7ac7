"""A stand-in for torch-scatter in plain PyTorch, for machines without a C++ compiler.

It holds what fairchem-core 1.10 calls: `scatter`, `segment_coo`, `segment_csr` and `utils.broadcast`. Each takes the
arguments of the function of that name in torch-scatter 2.1.2 and gives the same values and gradients. Everything else
raises an ImportError that says how to get the real package. `__version__` ends in `+standin`.

Two things differ, and both only where fairchem does not go: second derivatives exist for the segment functions too, and
a minimum or maximum over values with a NaN among them is NaN (the real package ignores the NaN).
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from .utils import broadcast

__version__ = "2.1.2+standin"
__all__ = ["__version__", "scatter", "segment_coo", "segment_csr"]


def scatter(
    src: Tensor,
    index: Tensor,
    dim: int = -1,
    out: Tensor | None = None,
    dim_size: int | None = None,
    reduce: str = "sum",
) -> Tensor:
    """Reduce the values of `src` that have the same index.

    Args:
        src: [..., n, ...], any number type.
        index: [n], or with the first dimensions of `src`; int64, in any order.
        dim: the dimension of `src` that is reduced.
        out: None; the real package can also add to a tensor that exists.
        dim_size: length of the result along `dim`; None: the largest index plus 1, which a GPU has to be asked for.
        reduce: "sum" or "add", "mean", "min", "max". Where no value has an index, the result is 0.

    Returns:
        [..., dim_size, ...]. The gradient of "min" and "max" goes to the first of equal values.

    Raises:
        NotImplementedError: `out` or `reduce="mul"`, which only the real package has.
        ValueError: an unknown `reduce`.
    """
    if out is not None:
        _refuse("the argument 'out'")
    full = broadcast(index, src, dim)
    if dim_size is None:
        dim_size = int(index.max()) + 1 if index.numel() else 0
    size = list(src.shape)
    size[dim] = dim_size
    if reduce in ("sum", "add"):
        return src.new_zeros(size).scatter_add_(dim, full, src)
    if reduce == "mean":
        return _mean(src, index, full, dim, size)
    if reduce in ("min", "max"):
        return _extreme(src, full, dim, size, reduce)
    if reduce == "mul":
        _refuse("reduce='mul'")
    raise ValueError(f"reduce is 'sum', 'add', 'mean', 'min' or 'max', not {reduce!r}")


def segment_coo(
    src: Tensor, index: Tensor, out: Tensor | None = None, dim_size: int | None = None, reduce: str = "sum"
) -> Tensor:
    """`scatter` along the last dimension of an `index` that is sorted (not checked; unsorted it works as well)."""
    dim = index.dim() - 1
    shape = src.shape[: index.dim()]
    return scatter(src, index.expand(shape), dim, out, dim_size, reduce)


def segment_csr(src: Tensor, indptr: Tensor, out: Tensor | None = None, reduce: str = "sum") -> Tensor:
    """Reduce each run of rows `indptr[i]` to `indptr[i + 1]` of `src`; rows outside all runs are left out.

    Args:
        src: [n, ...].
        indptr: [m + 1], ascending, int64; the real package also takes one with more dimensions.

    Returns:
        [m, ...], 0 where a run is empty.
    """
    if indptr.dim() != 1:
        _refuse("segment_csr with an indptr of more than one dimension")
    rows = torch.arange(src.shape[0], device=src.device)
    # 1, 2, ... are the runs; 0 is before the first of them, and the last value behind all of them.
    run = torch.searchsorted(indptr.contiguous(), rows, right=True)
    return scatter(src, run, 0, out, indptr.numel() + 1, reduce)[1:-1]


def _mean(src: Tensor, index: Tensor, full: Tensor, dim: int, size: list[int]) -> Tensor:
    along = min(dim % src.dim(), index.dim() - 1)
    counted = list(index.shape)
    counted[along] = size[dim]
    # Counted in the values' type, as the real package counts.
    ones = src.new_ones(1).expand(index.shape)
    count = src.new_zeros(counted).scatter_add_(along, index, ones).clamp_(min=1)
    total = src.new_zeros(size).scatter_add_(dim, full, src)
    count = broadcast(count, total, dim)
    return total.div_(count, rounding_mode=None if total.is_floating_point() else "floor")


def _extreme(src: Tensor, full: Tensor, dim: int, size: list[int], reduce: str) -> Tensor:
    values = src.detach()
    best = values.new_zeros(size).scatter_reduce_(dim, full, values, f"a{reduce}", include_self=False)
    if not (src.requires_grad and torch.is_grad_enabled()):
        return best
    # torch would share the gradient among equal values; here it goes to the first, as in the real package on a CPU.
    count = src.shape[dim]
    position = broadcast(torch.arange(count, device=src.device), src, dim)
    candidate = position.where(values == best.gather(dim, full), count)
    first = torch.full_like(best, count, dtype=torch.long).scatter_reduce_(dim, full, candidate, "amin")
    beyond = list(src.shape)
    beyond[dim] = 1  # one zero behind the values, for where nothing has an index
    return torch.cat((src, src.new_zeros(beyond)), dim).gather(dim, first)


def _refuse(what: str) -> NoReturn:
    raise NotImplementedError(_missing(what))


def _missing(what: str) -> str:
    return (
        f"{what} is not in the stand-in for torch-scatter that is installed here, which holds what fairchem-core 1.10 "
        "needs (scatter, segment_coo, segment_csr, utils.broadcast). The real package has it: pip uninstall -y "
        "torch-scatter, then a wheel that PyG's installation guide names for this PyTorch and CUDA, or, with a C++ "
        "compiler, pip install --no-build-isolation torch-scatter==2.1.2"
    )


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Not an AttributeError, which `from torch_scatter import ...` would replace by a message of its own.
    raise ImportError(_missing(f"torch_scatter.{name}"))
