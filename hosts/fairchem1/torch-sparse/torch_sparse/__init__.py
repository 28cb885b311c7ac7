"""A stand-in for torch-sparse in plain PyTorch, for machines without a C++ compiler.

It holds what fairchem-core 1.10 uses: a `SparseTensor` of edges whose rows can be picked. GemNet and DimeNet++ find
triplets with it: an entry is an edge, its row the target, its column the source, its value the edge's number; picking
the row of every edge's own atom gives all pairs of edges that meet there. Order and values are those of torch-sparse
0.6.18. Everything else raises an error that says how to get the real package. `__version__` ends in `+standin`.

torch_geometric looks for `SparseStorage` too before it takes torch-sparse as installed. There is none here on purpose:
so it works with PyTorch's own sparse tensors, and never calls what is missing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__version__ = "0.6.18+standin"
__all__ = ["SparseTensor", "__version__"]


class _Asked(type):
    """Names the real package where a class is asked for what it does not have."""

    def __getattr__(cls, name: str) -> Any:
        raise AttributeError(_missing(f"SparseTensor.{name}"))


class _Storage:
    """The entries, sorted by row."""

    def __init__(self, row: Tensor, col: Tensor, value: Tensor | None) -> None:
        self._row, self._col, self._value = row, col, value

    def row(self) -> Tensor:
        return self._row

    def col(self) -> Tensor:
        return self._col

    def value(self) -> Tensor | None:
        return self._value

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(_missing(f"SparseTensor.storage.{name}"))


class SparseTensor(metaclass=_Asked):
    """Entries of a matrix, sorted by row and then column; one place may have several.

    Args:
        row: [entries], int64.
        col: [entries], int64.
        value: [entries, ...], or None.
        sparse_sizes: number of rows and of columns.

    Raises:
        NotImplementedError: no `row`, `col` or `sparse_sizes`, which the real package can do without, or any other
            argument of its own.
    """

    def __init__(
        self,
        row: Tensor | None = None,
        rowptr: Tensor | None = None,
        col: Tensor | None = None,
        value: Tensor | None = None,
        sparse_sizes: tuple[int, int] | None = None,
        is_sorted: bool = False,
        trust_data: bool = False,
    ) -> None:
        if row is None or col is None or rowptr is not None or sparse_sizes is None or None in sparse_sizes:
            raise NotImplementedError(_missing("SparseTensor without row, col and both sparse_sizes"))
        if not is_sorted:
            place = row * sparse_sizes[1] + col
            # Asked and sorted as in the real package, so that entries of one place come in the same order on a CPU.
            if (place[1:] < place[:-1]).any():
                order = place.sort().indices
                row, col = row[order], col[order]
                value = None if value is None else value[order]
        self._sizes = (int(sparse_sizes[0]), int(sparse_sizes[1]))
        self.storage = _Storage(row, col, value)

    def sparse_sizes(self) -> tuple[int, int]:
        """Number of rows and of columns."""
        return self._sizes

    def coo(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows, columns and values of the entries."""
        return self.storage.row(), self.storage.col(), self.storage.value()

    def set_value(self, value: Tensor | None, layout: str | None = None) -> SparseTensor:
        """The same entries with other values, one for each entry in their order here."""
        row, col, _ = self.coo()
        return self._sorted(row, col, None, self._sizes).set_value_(value, layout)

    def set_value_(self, value: Tensor | None, layout: str | None = None) -> SparseTensor:
        """`set_value` in place."""
        if layout not in (None, "coo"):
            raise NotImplementedError(_missing(f"SparseTensor.set_value with layout={layout!r}"))
        if value is not None and value.shape[0] != self.storage.row().shape[0]:
            raise ValueError(f"{value.shape[0]} values for {self.storage.row().shape[0]} entries")
        self.storage._value = value
        return self

    def sum(self, dim: int | None = None) -> Tensor:
        """Number of entries in each row, [rows], float32 as in the real package; for entries without values."""
        if dim != 1 or self.storage.value() is not None:
            raise NotImplementedError(_missing("SparseTensor.sum but for dim=1 without values"))
        return self._entries().to(torch.float)

    def __getitem__(self, rows: Tensor) -> SparseTensor:
        """Pick rows, [picked], int64, in any order and as often as they are named."""
        if not (isinstance(rows, Tensor) and rows.dtype == torch.long and rows.dim() == 1):
            raise NotImplementedError(_missing("SparseTensor[...] but for one tensor of row numbers"))
        entries = self._entries()
        starts = entries.cumsum(0) - entries
        picked = entries[rows]
        row = torch.arange(rows.shape[0], device=rows.device).repeat_interleave(picked)
        # An entry's number here: its number among all that were picked, moved to where its row starts.
        shift = starts[rows] - (picked.cumsum(0) - picked)
        entry = torch.arange(row.shape[0], device=rows.device) + shift[row]
        _, col, value = self.coo()
        value = None if value is None else value[entry]
        return self._sorted(row, col[entry], value, (rows.shape[0], self._sizes[1]))

    def _entries(self) -> Tensor:
        row = self.storage.row()
        return row.new_zeros(self._sizes[0]).scatter_add_(0, row, torch.ones_like(row))

    @classmethod
    def _sorted(cls, row: Tensor, col: Tensor, value: Tensor | None, sizes: tuple[int, int]) -> SparseTensor:
        return cls(row=row, col=col, value=value, sparse_sizes=sizes, is_sorted=True)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(_missing(f"SparseTensor.{name}"))


def _missing(what: str) -> str:
    return (
        f"{what} is not in the stand-in for torch-sparse that is installed here, which holds what fairchem-core 1.10 "
        "needs (a SparseTensor whose rows are picked). The real packages have it: pip uninstall -y torch-scatter "
        "torch-sparse, then the wheels that PyG's installation guide names for this PyTorch and CUDA, or, with a C++ "
        "compiler, pip install --no-build-isolation torch-scatter==2.1.2 torch-sparse==0.6.18"
    )


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Not an AttributeError, which `from torch_sparse import ...` would replace by a message of its own.
    raise ImportError(_missing(f"torch_sparse.{name}"))
