"""Sample data: metal slabs with adsorbates, labelled by ASE's EMT, as an OC20-style S2EF LMDB."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from ase import Atoms
from ase.build import add_adsorbate, fcc100, fcc110, fcc111, molecule
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.optimize import FIRE
from fairchem.core.common.registry import registry
from fairchem.core.datasets import LmdbDataset
from fairchem.core.preprocessing import AtomsToGraphs
from filelock import FileLock
from tqdm import tqdm

from fairchem_scd.denoising.random import stream
from fairchem_scd.errors import ConfigError

_METALS = ("Cu", "Ag", "Au", "Ni", "Pd", "Pt", "Al")
_FACETS = {"fcc111": fcc111, "fcc100": fcc100, "fcc110": fcc110}
_ADSORBATES = ("H", "C", "N", "O", "CO", "OH")
_SYSTEMS = [(m, f, a) for m in _METALS for f in _FACETS for a in _ADSORBATES]


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
        settings = {"num_structures": 200, "num_systems": len(_SYSTEMS), "seed": 0}
        settings.update({key: config[key] for key in settings if key in config})
        write_emt_slabs(Path(config["src"]), **settings)
        super().__init__(config)


def write_emt_slabs(folder: Path, num_structures: int, num_systems: int, seed: int) -> None:
    """Write `data.0000.lmdb` and the host's `metadata.npz` into a folder, unless they are there already.

    Raises:
        ConfigError: a setting is out of range, or the folder holds something else.
    """
    settings = {"num_structures": num_structures, "num_systems": num_systems, "seed": seed}
    for key, least in (("num_structures", 1), ("num_systems", 1), ("seed", 0)):
        if isinstance(settings[key], bool) or not isinstance(settings[key], int) or settings[key] < least:
            raise ConfigError(f"dataset.{key}: expected a whole number of at least {least} (got {settings[key]!r})")
    if folder.exists():  # it is complete then, and may lie where nothing can be written
        _check_same(folder, settings)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The lock ends with the process that holds it, and the folder gets its name only when it is complete.
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if folder.exists():
            _check_same(folder, settings)
            return
        for stale in folder.parent.glob(f".{folder.name}.tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
        _write(temporary, **settings)
        (temporary / "settings.json").write_text(json.dumps(settings))
        temporary.chmod(0o755)
        temporary.rename(folder)


def _check_same(folder: Path, settings: dict[str, Any]) -> None:
    try:
        written = json.loads((folder / "settings.json").read_text())
    except FileNotFoundError:
        raise ConfigError(f"dataset.src: {folder} exists and was not written by emt_slabs; choose another") from None
    different = [key for key in settings if written.get(key) != settings[key]]
    if different:
        held = ", ".join(f"{key} {written.get(key)} instead of {settings[key]}" for key in different)
        raise ConfigError(f"dataset.src: {folder} was written with {held}; choose another folder or remove it")


def _write(folder: Path, num_structures: int, num_systems: int, seed: int) -> None:
    logging.info("writing %d EMT slabs to be kept in %s", num_structures, folder.parent)
    converter = AtomsToGraphs(r_energy=True, r_forces=True, r_edges=False, r_pbc=True)
    natoms = []
    db = lmdb.open(str(folder / "data.0000.lmdb"), map_size=2**34, subdir=False, meminit=False)
    with db, db.begin(write=True) as transaction:
        slabs = tqdm(emt_slabs(num_structures, seed, num_systems), total=num_structures, desc="EMT slabs")
        for index, (atoms, sid, fid) in enumerate(slabs):
            row = converter.convert(atoms)
            # OC20's own names; a config maps them with key_mapping.
            row.y, row.force = row.energy, row.forces
            del row.energy, row.forces
            row.sid, row.fid, row.natoms = sid, fid, len(atoms)
            natoms.append(len(atoms))
            transaction.put(f"{index}".encode("ascii"), pickle.dumps(row, protocol=4))
        transaction.put(b"length", pickle.dumps(num_structures, protocol=4))
    np.savez(folder / "metadata.npz", natoms=np.array(natoms))


def emt_slabs(num_structures: int, seed: int, num_systems: int = len(_SYSTEMS)) -> Iterator[tuple[Atoms, int, int]]:
    """Slabs far from equilibrium: (atoms with EMT attached, sid of the system, fid of the frame).

    A frame is a nearly relaxed system, rattled by 0.02 to 0.15 Å.
    """
    relaxed: dict[int, Atoms] = {}
    # Spread over metals, facets and adsorbates.
    sids = np.linspace(0, len(_SYSTEMS) - 1, min(num_systems, len(_SYSTEMS))).round().astype(int)
    for frame in range(num_structures):
        rng = stream(seed, frame, "emt slab")
        sid = int(sids[rng.integers(len(sids))])
        if sid not in relaxed:
            relaxed[sid] = _system(*_SYSTEMS[sid])
        atoms = relaxed[sid].copy()
        free = np.ones(len(atoms), dtype=bool)
        free[atoms.constraints[0].index] = False
        displacement = rng.standard_normal((len(atoms), 3)) * rng.uniform(0.02, 0.15)
        atoms.positions[free] += displacement[free]
        atoms.calc = EMT()
        yield atoms, sid, frame


def _system(metal: str, facet: str, adsorbate: str) -> Atoms:
    """A slab of three layers with one adsorbate, nearly relaxed. Tags as in OC20: 2 adsorbate, 1 surface, 0 below."""
    slab = _FACETS[facet](metal, size=(2, 2, 3), vacuum=6.0, periodic=True)
    layers = slab.get_tags()  # 1 is the top layer
    guest = molecule(adsorbate) if len(adsorbate) > 1 else Atoms(adsorbate)
    if adsorbate == "CO":
        guest.rotate(180, "x")  # it binds through its carbon
    add_adsorbate(slab, guest, height=1.6, position="ontop")
    slab.set_tags([*np.where(layers == 1, 1, 0), *[2] * len(guest)])
    slab.set_constraint(FixAtoms(np.flatnonzero(layers == layers.max())))
    slab.calc = EMT()
    FIRE(slab, logfile=None).run(fmax=0.2, steps=60)
    return slab
