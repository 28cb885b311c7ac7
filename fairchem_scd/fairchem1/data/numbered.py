"""Names for structures that have none."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset


class Numbered(Dataset):
    """A host dataset whose structures carry no `sid`: each gets its place in the data, by which its noise is keyed."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        row = self.dataset[index]
        # The host's datasets are shuffled subsets; the place in the data itself does not depend on the shuffle.
        row.sid = int(self.dataset.indices[index])
        return row


def named(dataset: Any) -> bool:
    """Whether the structures of a host dataset carry a `sid`, by the first that can be read."""
    rows = (_readable(dataset, index) for index in range(len(dataset)))
    first = next((row for row in rows if row is not None), None)
    return first is None or "sid" in first


def _readable(dataset: Any, index: int) -> Any:
    try:
        return dataset[index]
    except Exception:  # said where the row is needed
        return None
