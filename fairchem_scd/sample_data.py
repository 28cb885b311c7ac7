"""Sample data: metal slabs with adsorbates, labelled by ASE's EMT, and folders of it that are written once.

No host is needed here. Each wing has a dataset over it, in the file format that its host reads.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import add_adsorbate, fcc100, fcc110, fcc111, molecule
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.optimize import FIRE
from filelock import FileLock
from tqdm import tqdm

from fairchem_scd.denoising.random import stream
from fairchem_scd.errors import ConfigError

_METALS = ("Cu", "Ag", "Au", "Ni", "Pd", "Pt", "Al")
_FACETS = {"fcc111": fcc111, "fcc100": fcc100, "fcc110": fcc110}
_ADSORBATES = ("H", "C", "N", "O", "CO", "OH")
_SYSTEMS = [(m, f, a) for m in _METALS for f in _FACETS for a in _ADSORBATES]

DEFAULTS = {"num_structures": 200, "num_systems": len(_SYSTEMS), "seed": 0}
"""Of the settings that choose the sample data: how many structures, of how many systems, and a random seed."""

Slabs = Iterator[tuple[Atoms, int, int]]


def write_once(folder: Path, settings: Mapping[str, int], write: Callable[[Path, Slabs], None], **form: str) -> None:
    """Write sample data into a folder, unless it is there already.

    Any number of processes may call this at once: one writes, the others wait. What a process wrote before it was
    killed is never used.

    Args:
        folder: gets its name only when it is complete.
        settings: the keys of `DEFAULTS`.
        write: writes structures into a folder that is there and empty.
        form: what else a folder must have been written with, such as a file format.

    Raises:
        ConfigError: a setting is out of range, or the folder holds something else.
    """
    for key, least in (("num_structures", 1), ("num_systems", 1), ("seed", 0)):
        if isinstance(settings[key], bool) or not isinstance(settings[key], int) or settings[key] < least:
            raise ConfigError(f"dataset.{key}: expected a whole number of at least {least} (got {settings[key]!r})")
    written = {**settings, **form}
    if folder.exists():  # it is complete then, and may lie where nothing can be written
        _check_same(folder, written)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The lock ends with the process that holds it.
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if folder.exists():
            _check_same(folder, written)
            return
        for stale in folder.parent.glob(f".{folder.name}.tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
        logging.info("writing %d EMT slabs to be kept in %s", settings["num_structures"], folder.parent)
        write(temporary, tqdm(emt_slabs(**settings), total=settings["num_structures"], desc="EMT slabs"))
        (temporary / "settings.json").write_text(json.dumps(written))
        temporary.chmod(0o755)
        temporary.rename(folder)


def _check_same(folder: Path, settings: Mapping[str, Any]) -> None:
    try:
        written = json.loads((folder / "settings.json").read_text())
    except FileNotFoundError:
        raise ConfigError(f"dataset.src: {folder} exists and was not written by emt_slabs; choose another") from None
    different = [key for key in settings if written.get(key) != settings[key]]
    if different:
        held = ", ".join(f"{key} {written.get(key)} instead of {settings[key]}" for key in different)
        raise ConfigError(f"dataset.src: {folder} was written with {held}; choose another folder or remove it")


def emt_slabs(num_structures: int, seed: int, num_systems: int = len(_SYSTEMS)) -> Slabs:
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
