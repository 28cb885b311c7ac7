"""Names for structures that have no name."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset


class Numbered(Dataset):
    """A host dataset whose structures have no `sid`. Each gets its index in the data, which keys its random numbers."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        row = self.dataset[index]
        # The host's datasets are shuffled subsets of the data. The index in the data does not depend on the shuffle.
        row.sid = int(self.dataset.indices[index])
        return row


def named(dataset: Any) -> bool:
    """Whether the structures of a host dataset have a `sid`, judged by the first that can be read."""
    rows = (_readable(dataset, index) for index in range(len(dataset)))
    first = next((row for row in rows if row is not None), None)
    return first is None or "sid" in first


def _readable(dataset: Any, index: int) -> Any:
    try:
        return dataset[index]
    except Exception:  # the error is reported where the row is needed
        return None
