"""Finds rows that cannot be trained on when they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from fairchem_scd.denoising.periodic import check_spots
from fairchem_scd.errors import ConfigError, DataError
from fairchem_scd.fairchem1.data.distances import nearest_images, neighbours
from fairchem_scd.fairchem1.data.rows import check_batch

_SAMPLE = 32
_ENOUGH = 100
"""After so many bad rows one after the other, reading ends in an error."""


class Guarded(Dataset):
    """A host dataset in which the next good row takes the place of a bad one.

    Every row says under `bad_data` what was wrong with the rows whose place it takes, "" if it takes none. Whether that
    ends the run is decided by the trainer, on all ranks at once. Under `stands_in_for` it says which row was asked for,
    "" if it is that row: a row may be in one batch with itself in the place of another.

    Args:
        dataset: of the host, or a wrapper of this package.
        split: its key in the config.
        check: raises ConfigError or DataError for a row that cannot be trained on.
    """

    def __init__(self, dataset: Any, split: str, check: Callable[[Any], None]) -> None:
        self.dataset, self.split, self.check = dataset, split, check

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Any, Exception | None]:
        """The row and None, or None and what is wrong with the row."""
        try:
            row = self.dataset[index]
        except Exception as error:  # of lmdb, pickle, ase …
            return None, DataError(f"cannot be read: {type(error).__name__}: {error}")
        try:
            self.check(row)
        except (ConfigError, DataError) as error:
            return None, error
        return row, None

    def __getitem__(self, index: int) -> Any:
        found: list[str] = []
        for offset in range(min(len(self), _ENOUGH)):
            row, error = self.read((index + offset) % len(self))
            if error is None:
                row.bad_data = "\n".join(found)
                row.stands_in_for = f"row {self._place(index)}" if found else ""
                return row
            found.append(self._named((index + offset) % len(self), error))
        raise DataError(f"{len(found)} rows one after the other cannot be trained on; the first: {found[0]}")

    def sample(self, *, skip: bool) -> list[Any]:
        """Rows evenly spaced over the data.

        Args:
            skip: leave bad rows out.

        Raises:
            ConfigError, DataError: there are no rows, all of them are bad, or one is bad and `skip` is False.
        """
        if not len(self):
            raise ConfigError(f"dataset.{self.split}: no structures")
        last, parts = len(self) - 1, max(min(len(self), _SAMPLE) - 1, 1)
        rows = []
        for index in sorted({k * last // parts for k in range(parts + 1)}):
            row, error = self.read(index)
            if error is None:
                rows.append(row)
            elif not skip:
                raise type(error)(self._named(index, error)) from error
        if not rows:
            raise type(error)(self._named(index, error)) from error
        return rows

    def _named(self, index: int, error: Exception) -> str:
        return f"dataset.{self.split}, row {self._place(index)}: {error}"

    def _place(self, index: int) -> int:
        """The row's number in the data. The host's datasets are shuffled subsets of it."""
        dataset = self.dataset
        while not hasattr(dataset, "indices") and hasattr(dataset, "dataset"):
            dataset = dataset.dataset
        indices = getattr(dataset, "indices", None)
        return int(indices[index]) if indices is not None else index


def check_row(
    row: Any,
    split: str,
    needed: Mapping[str, str],
    *,
    max_num_elements: int | None,
    elements_key: str | None,
    use_pbc: bool,
    cutoff: float | None,
    alone: str,
) -> None:
    """Raise ConfigError or DataError for a row that cannot be trained on.

    Args:
        row: of a dataset.
        split: its key in the config.
        needed: for each label that is trained on or conditioned on, the part of the config that asks for it.
        max_num_elements: see `check_batch`.
        elements_key: see `check_batch`.
        use_pbc: the model's graphs are periodic.
        cutoff: within which the model sees neighbours, Å.
        alone: why the host cannot run a row without any edge, for the message; "" where it can.
    """
    if not len(row.pos):
        raise DataError("a structure without atoms")
    for label, by in sorted(needed.items()):
        if getattr(row, label, None) is None:
            raise ConfigError(
                f"{by} needs the label '{label}', which is not there; its keys: {', '.join(sorted(row.keys()))}. LMDBs "
                f"name labels by dataset.{split}.key_mapping (y: energy, force: forces), ASE databases read them with "
                f"dataset.{split}.a2g_args.r_{label}: true"
            )
    check_batch(row, needed, max_num_elements, elements_key)
    distance = nearest_images(row, use_pbc)
    check_spots(distance)
    if alone and cutoff is not None and not _has_neighbours(row, distance, cutoff, use_pbc):
        raise DataError(f"no atom has a neighbour within {cutoff:g} Å, and {alone}")


def _has_neighbours(row: Any, distance: Tensor, cutoff: float, use_pbc: bool) -> bool:
    """Whether any atom has a neighbour. `distance`: from `nearest_images`, which finds most of them faster."""
    return float(distance.min()) < cutoff or len(neighbours(row, cutoff, use_pbc)[0]) > 0
