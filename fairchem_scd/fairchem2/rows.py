"""Rows that cannot be trained on: found where they are read, and named."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from ase.data import chemical_symbols
from fairchem.core.datasets.atomic_data import AtomicData
from fairchem.core.datasets.collaters.mt_collater import MTCollater
from fairchem.core.datasets.mt_concat_dataset import ConcatDataset
from fairchem.core.units.mlip_unit.mlip_unit import Task
from torch import Tensor
from torch.utils.data import Dataset

from fairchem_scd.denoising.adapter import Adapter
from fairchem_scd.denoising.data_faults import with_advice
from fairchem_scd.denoising.periodic import check_spots, nearest_images
from fairchem_scd.denoising.tasks import DenoisingTask
from fairchem_scd.errors import ConfigError, DataError
from fairchem_scd.fairchem2.batch import structures_of

_SAMPLE = 32
_ENOUGH = 100
"""After so many bad rows one after the other, the run ends."""


class Guarded(Dataset):
    """A dataset of the host in which the next good row takes the place of a bad one.

    Every row says under `bad_data` what was wrong with the rows whose place it takes, "" if it takes none. Whether
    that ends the run is decided by the unit, on all ranks at once. Where too many bad rows follow each other, the run
    must end whatever its settings: the row says so under `no_good_row`, which is "" otherwise. An error raised here, in
    the loader of one rank, would leave the other ranks waiting for it. So a row that was good before training is given.

    Args:
        dataset: of the host: one data set, and one split of it.
        name: as the host calls it, such as "omat.train".
        check: raises DataError for a row that cannot be trained on.

    Attributes:
        spare: a good row, from `keep_spare`; None: too many bad rows are an error where they are read.
    """

    def __init__(self, dataset: Any, name: str, check: Callable[[AtomicData], None]) -> None:
        self.dataset, self.name, self.check = dataset, name, check
        self.spare: AtomicData | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or name.startswith("__"):  # while it is unpickled, in a loader's process
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, index: int) -> AtomicData:
        found: list[str] = []
        for offset in range(min(len(self), _ENOUGH)):
            row, error = self.read((index + offset) % len(self))
            if error is None:
                row.bad_data, row.no_good_row = "\n".join(found), ""
                return row
            found.append(error)
        message = f"{len(found)} rows one after the other cannot be trained on; the first: {found[0]}"
        if self.spare is None:
            raise DataError(message)
        row = copy.deepcopy(self.spare)
        row.bad_data, row.no_good_row = "", message
        return row

    def read(self, index: int) -> tuple[AtomicData | None, str | None]:
        """The row and None, or None and what is wrong with the row, with its name."""
        where = f"{self.name}, row {self._place(index)}"
        try:
            row = self.dataset[index]
        except Exception as error:  # of lmdb, zlib, ase …
            return None, f"{where}: cannot be read: {type(error).__name__}: {error}"
        try:
            self.check(row)
        except DataError as error:
            return None, f"{where}{_sid(row)}: {error}"
        return row, None

    def sample(self, *, skip: bool) -> list[AtomicData]:
        """Rows evenly spaced over the data.

        Args:
            skip: leave bad rows out.

        Raises:
            DataError: all rows are bad, or one is bad and `skip` is False.
        """
        last, parts = len(self) - 1, max(min(len(self), _SAMPLE) - 1, 1)
        rows, errors = [], []
        for index in sorted({k * last // parts for k in range(parts + 1)}):
            row, error = self.read(index)
            rows += [] if row is None else [row]
            errors += [] if error is None else [error]
        if errors and not rows:
            raise DataError(f"all {len(errors)} rows sampled cannot be trained on; the first: {errors[0]}")
        if errors and not skip:
            raise DataError(with_advice(errors[0]))
        return rows

    def keep_spare(self) -> None:
        """Keep a good row of the sample, of medium size. It must be done before the loader's processes get copies.

        Raises:
            DataError: all rows of the sample are bad.
        """
        rows = self.sample(skip=True)
        self.spare = sorted(rows, key=lambda row: len(row.pos))[len(rows) // 2]

    def _place(self, index: int) -> int:
        """The row's number in the data; the host's splits may be subsets of it."""
        indices = getattr(self.dataset, "indices", None)
        return index if indices is None else int(indices[index])


def guard(loader: Any, check: Callable[[AtomicData], None]) -> Sequence[Guarded]:
    """Put guards around the datasets of a loader of the host, in place, and return them; none if it is of another kind.

    It must be done before the loader is iterated over, since its processes get copies.
    """
    concat = getattr(loader, "dataset", None)
    if not isinstance(concat, ConcatDataset):
        return []
    concat.datasets = [
        dataset if isinstance(dataset, Guarded) else Guarded(dataset, name, check)
        for name, dataset in zip(concat.dataset_names, concat.datasets, strict=True)
    ]
    return concat.datasets


def check_loader(loader: Any, host_tasks: Sequence[Task]) -> None:
    """Raise ConfigError where a loader would make batches for tasks that are not there."""
    if not host_tasks and isinstance(getattr(loader, "collate_fn", None), MTCollater):
        raise ConfigError(
            "collate_fn of a data loader: mt_collater_adapter makes batches for tasks, and there are none; use "
            "{_target_: fairchem.core.datasets.collaters.simple_collater.data_list_collater, _partial_: true, "
            "otf_graph: true}"
        )


def check_sample(
    guarded: Guarded, tasks: Mapping[str, DenoisingTask], host_tasks: Sequence[Task], adapter: Adapter, *, skip: bool
) -> None:
    """Check that denoising tasks can train on a sample of the data.

    Raises:
        ConfigError: they cannot; the message names the task.
        DataError: a row is bad, and `skip` is False.
    """
    rows = guarded.sample(skip=skip)
    sample = [structures_of(row, adapter.periodic(row.pbc), host_tasks) for row in rows]
    for task in tasks.values():
        task.check_sample(sample, f"sampled from {guarded.name}")


def row_check(host_tasks: Sequence[Task], adapter: Adapter) -> Callable[[AtomicData], None]:
    """`check_row` for the host's tasks that train and the adapter of a model's backbone."""
    return partial(
        check_row,
        host_tasks=host_tasks,
        max_num_elements=adapter.backbone.max_num_elements,
        always_periodic=bool(adapter.periodic(torch.zeros(1, 3, dtype=torch.bool)).all()),
    )


def check_row(
    row: AtomicData, host_tasks: Sequence[Task], max_num_elements: int, *, always_periodic: bool = False
) -> None:
    """Check a row of a dataset.

    An infinite label counts as one that is missing, as it does to the host, but not as a bad one.

    Args:
        row: as the host's dataset gives it.
        host_tasks: the tasks that train.
        max_num_elements: one more than the highest atomic number that the model knows.
        always_periodic: the model repeats every structure in all directions, whatever the row's own `pbc`.

    Raises:
        DataError: it has no atoms, an element beyond the model's table, a position or cell that is not finite, two
            atoms on the same spot, or a label that is missing or not a number.
    """
    if not len(row.pos):
        raise DataError("a structure without atoms")
    highest = int(row.atomic_numbers.max())
    if highest >= max_num_elements:
        name = chemical_symbols[highest] if highest < len(chemical_symbols) else "?"
        raise DataError(
            f"element {highest} ({name}) is beyond the model's table, which ends at {max_num_elements - 1}; raise "
            "max_num_elements of the backbone"
        )
    for key in ("pos", "cell"):
        if not bool(row[key].isfinite().all()):
            raise DataError(f"{key} is not finite: {_first(row[key], ~row[key].isfinite())}")
    pbc = torch.ones(3) if always_periodic else row.pbc.view(3)
    check_spots(nearest_images(row.pos, row.cell.view(3, 3), pbc))
    dataset = _dataset(row)
    for name in (task.name for task in host_tasks if dataset in task.datasets):
        if name not in row:
            raise DataError(
                f"no label '{name}', which runner.train_eval_unit.tasks trains on the data set {dataset}; its keys: "
                f"{', '.join(sorted(row.keys()))}"
            )
        if bool(row[name].isnan().any()):
            raise DataError(f"label '{name}' is not a number: {_first(row[name], row[name].isnan())}")


def _dataset(row: AtomicData) -> str | None:
    """The name of a row's data set, which the host keeps as such or in a list."""
    name = row.get("dataset", None)
    return name[0] if isinstance(name, list) else name


def _first(values: Tensor, wrong: Tensor) -> list[float]:
    """The first line of a tensor in which an element is wrong."""
    lines, marks = values.reshape(-1, values.shape[-1]), wrong.reshape(-1, values.shape[-1])
    return lines[int(marks.any(dim=1).nonzero()[0])].tolist()


def _sid(row: AtomicData) -> str:
    return f" (sid {row.sid[0]})" if row.sid and row.sid[0] else ""
