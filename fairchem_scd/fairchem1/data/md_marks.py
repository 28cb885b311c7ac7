"""OC20 All+MD: which frames come from molecular dynamics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairchem.core.common.registry import registry
from fairchem.core.datasets import LmdbDataset

from fairchem_scd.errors import ConfigError


def read_md_marks(folder: Path) -> np.ndarray:
    """Read the `data_log.*.txt` files beside the LMDBs.

    The files are sorted by name, and their lines numbered from the first file to the last. Line k describes structure k
    of the sorted `*.lmdb` files, as in `…/relaxations/…/random1331004.traj,258,365`.

    Returns:
        [lines] bool: the line's path names `md` and not `relaxations`.

    Raises:
        ConfigError: the folder has no such file, or no line says what kind of frame it is.
    """
    logs = sorted(folder.glob("*.txt"))
    if not logs:
        raise ConfigError(
            f"dataset.train.src: {folder} has no *.txt files, which tell MD frames from relaxations; "
            "use format: lmdb for data without an MD part"
        )
    marks, tells = [], False
    for log in logs:
        # OC20 All+MD has 172 million lines, so none is kept in memory.
        with log.open() as lines:
            kinds = np.fromiter((2 if "relaxations" in line else "md" in line for line in lines), dtype=np.int8)
        tells |= bool(kinds.any())
        marks.append(kinds == 1)
    if not tells:
        raise ConfigError(
            f"dataset.train.src: the *.txt files in {folder} do not tell MD frames from relaxations: none of their "
            f"{sum(map(len, marks))} lines names 'relaxations' or 'md'. fairchem's preprocessing leaves the words out; "
            "configs/dens_oc20_all_md.yml shows how to add them"
        )
    return np.concatenate(marks)


@registry.register_dataset("oc20_md_lmdb")
@registry.register_dataset("dens_lmdb")
class MarkedLmdbDataset(LmdbDataset):
    """The host's LMDB dataset, with `md` [1] on every structure: 1 for frames of molecular dynamics.

    Registered as `oc20_md_lmdb`, and as `dens_lmdb`, the name in the DeNS authors' configs. Structures beyond the last
    line count as relaxations.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self._md = read_md_marks(self.path if self.path.is_dir() else self.path.parent)

    def __getitem__(self, idx: int) -> Any:
        row = super().__getitem__(idx)
        place = int(self.indices[idx])
        row.md = torch.tensor([int(place < len(self._md) and self._md[place])])
        return row
