"""Names for structures that have none, and numbers for those that share one."""

from __future__ import annotations

from typing import Any

import numpy as np
from fairchem.core.datasets.ase_datasets import AseAtomsDataset
from torch.utils.data import Dataset

from fairchem_scd.denoising.structures import names

_PAIRS = 8


class Numbered(Dataset):
    """A host dataset in which every row says its number: its index in the data, which keys its random numbers.

    Args:
        dataset: of the host.
        key: under which a row says it: `sid` where structures have no name, `row_number` where some share one.
    """

    def __init__(self, dataset: Any, key: str = "sid") -> None:
        self.dataset, self.key = dataset, key

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        row = self.dataset[index]
        # The host's datasets are shuffled subsets of the data. The index in the data does not depend on the shuffle.
        row[self.key] = int(self.dataset.indices[index])
        return row


def named(dataset: Any) -> bool:
    """Whether the structures of a host dataset have a `sid`, judged by the first that can be read."""
    rows = (_readable(dataset, index) for index in range(len(dataset)))
    first = next((row for row in rows if row is not None), None)
    return first is None or "sid" in first


def told_apart(dataset: Any, repeated: tuple[str, int, int] | None) -> Any:
    """A host dataset of which no two rows have the same identity, and so the same noise.

    Rows get a number where names alone may not tell them apart. ASE's formats are such whatever the sample: a name is
    what the user wrote into `atoms.info`, often a trajectory's, and all frames have fid 0 unless the user wrote that
    too. Other formats are where a sample repeats a name; names that are unique, as OC20's, stay the keys of the noise
    that they have always been.

    Args:
        dataset: a subset, as the host makes it.
        repeated: what `repeated_name` found.
    """
    numbered = repeated is not None or isinstance(dataset.dataset, AseAtomsDataset)
    return Numbered(dataset, "row_number") if numbered else dataset


def repeated_name(dataset: Any) -> tuple[str, int, int] | None:
    """A name that two rows of a host dataset share, and their numbers; None: a sample has none.

    The sample are rows evenly spaced over the data, whatever their order in the subset, each with the row that follows
    it: where sid is a trajectory's, neighbours share it.
    """
    if not len(dataset):
        return None
    data = dataset.dataset
    first, last = int(np.min(dataset.indices)), int(np.max(dataset.indices))
    places = {*np.linspace(first, last, _PAIRS).astype(int).tolist()}
    seen: dict[str, int] = {}
    for place in sorted(places | {place + 1 for place in places if place + 1 < len(data)}):
        row = _readable(data, place)
        for name in names(row) if row is not None else ():
            if name in seen:
                return name, seen[name], place
            seen[name] = place
    return None


def _readable(dataset: Any, index: int) -> Any:
    try:
        return dataset[index]
    except Exception:  # the error is reported where the row is needed
        return None
