"""Sample data of metal slabs as a database that the host's `ase_db` format reads (`.aselmdb`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ase.db
import numpy as np
from fairchem.core.datasets.ase_datasets import AseDBDataset

from fairchem_scd.errors import ConfigError
from fairchem_scd.sample_data import DEFAULTS, Slabs, write_once


class EmtSlabsDataset(AseDBDataset):
    """The host's `ase_db` dataset, over data that is written when the dataset is first opened.

    A config names it by `format: fairchem_scd.fairchem2.sample_data.EmtSlabsDataset`. Settings, beside those of
    `ase_db`:
        src: folder of the data.
        num_structures: how many; 200 by default.
        num_systems: number of different pairs of slab and adsorbate; all 126 by default.
        seed: of the random displacements; 0 by default.

    The same settings give the same structures and labels. Any number of processes may open it at once: one writes, the
    others wait.

    Raises:
        ConfigError: `src` is missing, or holds data written with other settings.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.dbs = []  # the host's __del__ reads them, even if an error is raised below
        if not isinstance(config.get("src"), str):
            raise ConfigError(
                f"dataset: EmtSlabsDataset needs src, one folder for its data (got {config.get('src')!r})"
            )
        folder = Path(config["src"])
        write_emt_slabs(folder, **{key: config.get(key, DEFAULTS[key]) for key in DEFAULTS})
        super().__init__({**config, "src": str(folder / "data.aselmdb")})


def write_emt_slabs(folder: Path, num_structures: int, num_systems: int, seed: int) -> None:
    """Write `data.aselmdb` and the host's `metadata.npz` into a folder, unless they are there already.

    Raises:
        ConfigError: a setting is out of range, or the folder holds something else.
    """
    settings = {"num_structures": num_structures, "num_systems": num_systems, "seed": seed}
    write_once(folder, settings, _write, format="aselmdb")


def _write(folder: Path, slabs: Slabs) -> None:
    natoms = []
    with ase.db.connect(str(folder / "data.aselmdb")) as db:
        for atoms, sid, fid in slabs:
            atoms.get_forces()  # which also computes the energy: the database keeps what has been computed
            db.write(atoms, data={"sid": sid, "fid": fid})
            natoms.append(len(atoms))
    np.savez(folder / "metadata.npz", natoms=np.array(natoms))
