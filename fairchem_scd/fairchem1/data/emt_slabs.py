"""Sample data of metal slabs as an OC20-style S2EF LMDB."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from fairchem.core.common.registry import registry
from fairchem.core.datasets import LmdbDataset
from fairchem.core.preprocessing import AtomsToGraphs

from fairchem_scd.errors import ConfigError
from fairchem_scd.sample_data import DEFAULTS, Slabs, emt_slabs, write_once

__all__ = ["EmtSlabsDataset", "emt_slabs", "write_emt_slabs"]


@registry.register_dataset("emt_slabs")
class EmtSlabsDataset(LmdbDataset):
    """The host's LMDB dataset, over data that is written when the dataset is first opened.

    Settings, beside those of the host's `lmdb` format:
        src: folder of the data.
        num_structures: how many; 200 by default.
        num_systems: number of different pairs of slab and adsorbate; all 126 by default.
        seed: of the random displacements; 0 by default.

    The same settings give the same structures and labels. Any number of processes may open it at once: one writes, the
    others wait. What a process wrote before it was killed is never used.

    Raises:
        ConfigError: `src` is missing, or holds data written with other settings.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.path, self.envs = Path(), []  # the host's __del__ reads them, even if an error is raised below
        if not config.get("src"):
            raise ConfigError("dataset: format emt_slabs needs src, the folder to keep its data in")
        write_emt_slabs(Path(config["src"]), **{key: config.get(key, DEFAULTS[key]) for key in DEFAULTS})
        super().__init__(config)


def write_emt_slabs(folder: Path, num_structures: int, num_systems: int, seed: int) -> None:
    """Write `data.0000.lmdb` and the host's `metadata.npz` into a folder, unless they are there already.

    Raises:
        ConfigError: a setting is out of range, or the folder holds something else.
    """
    settings = {"num_structures": num_structures, "num_systems": num_systems, "seed": seed}
    write_once(folder, settings, _write)


def _write(folder: Path, slabs: Slabs) -> None:
    converter = AtomsToGraphs(r_energy=True, r_forces=True, r_edges=False, r_pbc=True)
    natoms = []
    db = lmdb.open(str(folder / "data.0000.lmdb"), map_size=2**34, subdir=False, meminit=False)
    with db, db.begin(write=True) as transaction:
        for index, (atoms, sid, fid) in enumerate(slabs):
            row = converter.convert(atoms)
            # OC20's own names; a config maps them with key_mapping.
            row.y, row.force = row.energy, row.forces
            del row.energy, row.forces
            row.sid, row.fid, row.natoms = sid, fid, len(atoms)
            natoms.append(len(atoms))
            transaction.put(f"{index}".encode("ascii"), pickle.dumps(row, protocol=4))
        transaction.put(b"length", pickle.dumps(len(natoms), protocol=4))
    np.savez(folder / "metadata.npz", natoms=np.array(natoms))
