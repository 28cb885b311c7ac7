"""The data of the studies: real DFT data, slabs and cells made here, each split in the same way at every call."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ase.db
import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from fairchem.core.common.registry import registry
from fairchem.core.datasets.ase_datasets import AseDBDataset

from benchmarks.evidence import databases
from fairchem_scd.fairchem1.data.emt_slabs import emt_slabs

LABELLED = (*databases.FILES, "slabs")
"""Data with energies and forces. `slabs`: metal slabs with adsorbates by ASE's effective medium theory."""

UNLABELLED = ("two_atoms", "four_atoms", "eight_atoms")
"""Strained and rattled cells, without labels."""

_SLABS = (1200, 300)  # for training and held out, and for testing


@dataclass(frozen=True)
class Splits:
    """Structures: to train on; held out of the training data, for tuning and curves; for the last look."""

    train: list[Atoms]
    held_out: list[Atoms]
    test: list[Atoms]

    def labelled(self, count: int | None, seed: int) -> list[Atoms]:
        """`count` of the training structures; more of the same seed contain fewer. None: all."""
        if count is not None and count > len(self.train):
            raise ValueError(f"{count} labels asked for; there are {len(self.train)} training structures")
        order = np.random.default_rng([seed, 1]).permutation(len(self.train))
        return [self.train[i] for i in order[:count]]


@cache
def load(name: str, folder: Path | None) -> Splits:
    """The splits of some data, made once a process: not to be changed.

    Args:
        name: one of `LABELLED` or `UNLABELLED`.
        folder: of the databases in `databases.FILES`; not needed for what is made here.
    """
    if name in databases.FILES:
        train, test = databases.read(name, folder)
    elif name == "slabs":
        made = [with_labels(atoms) for atoms, _, _ in emt_slabs(sum(_SLABS), seed=0)]
        train, test = made[: _SLABS[0]], made[_SLABS[0] :]
    elif name in CELLS:
        rng = np.random.default_rng(0)
        train, test = ([CELLS[name].make(rng) for _ in range(count)] for count in (2400, 128))
    else:
        raise ValueError(f"unknown data {name!r}; known: {', '.join((*LABELLED, *UNLABELLED))}")
    return split(train, test)


def with_labels(atoms: Atoms) -> Atoms:
    """The same, with the energy and forces of its calculator as a database keeps them."""
    forces = atoms.get_forces(apply_constraint=False)
    atoms.calc = SinglePointCalculator(atoms, energy=atoms.get_potential_energy(), forces=forces)
    return atoms


def split(known: list[Atoms], test: list[Atoms]) -> Splits:
    """The splits of structures that may be trained on, of which a fifth is held out, and others for the last look."""
    held_out, train = databases.parted(known, 0.2, seed=0)
    return Splits(train, held_out, test)


@dataclass(frozen=True)
class Cells:
    """Strained and rattled cells of cubic metals.

    Attributes:
        metals: one of them is drawn for each cell.
        repeat: of the conventional cell.
        strain: standard deviation of each of the nine strains.
        displacement: standard deviation of each displacement, Å.
    """

    metals: tuple[str, ...]
    repeat: tuple[int, int, int]
    strain: float
    displacement: float

    def make(self, rng: np.random.Generator) -> Atoms:
        """One cell, drawn at random."""
        metal = self.metals[rng.integers(len(self.metals))] if len(self.metals) > 1 else self.metals[0]
        atoms = self.ideal(metal)
        atoms.set_cell(atoms.cell @ (np.eye(3) + self.strain * rng.standard_normal((3, 3))), scale_atoms=True)
        atoms.positions += self.displacement * rng.standard_normal(atoms.positions.shape)
        return atoms

    def ideal(self, metal: str) -> Atoms:
        """The cell before it is deformed."""
        return bulk(metal, cubic=True).repeat(self.repeat)

    def displacements(self, atoms: Atoms, positions: np.ndarray) -> np.ndarray:
        """[N, 3] how far positions are from the sites of the strained lattice, Å, without their mean."""
        ideal = self.ideal(atoms.get_chemical_symbols()[0])
        sites = ideal.get_scaled_positions(wrap=False) @ atoms.cell.array
        moved = positions - sites
        return moved - moved.mean(axis=0)


_FCC = ("Cu", "Ag", "Au", "Ni", "Pd", "Pt")
CELLS = {
    "two_atoms": Cells(("Mo",), (1, 1, 1), strain=0.02, displacement=0.2),
    "four_atoms": Cells(_FCC, (1, 1, 1), strain=0.03, displacement=0.15),
    "eight_atoms": Cells(_FCC, (2, 1, 1), strain=0.03, displacement=0.15),
}
"""What `UNLABELLED` are made of."""


# --- for the host -----------------------------------------------------------------------------------------------------


def write(structures: Sequence[Atoms], path: Path) -> str:
    """Write structures, with their labels, as an ASE database that the host can read; returns its path."""
    with ase.db.connect(str(path), append=False) as db:
        for atoms in structures:
            db.write(atoms)
    return str(path)


@registry.register_dataset("kept_ase_db")
class KeptAseDB(AseDBDataset):
    """The host's ASE database, read once: small data for many short epochs."""

    def __init__(self, config: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._row = cache(super().__getitem__)

    def __getitem__(self, index: int) -> Any:
        return copy.copy(self._row(int(index)))
