"""The ASE databases of the studies, read and split in the same way on both hosts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ase.db
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

FILES = {
    "Mo": ("mlearn_Mo_train.db", "mlearn_Mo_test.db"),
    "Li": ("mlearn_Li_train.db", "mlearn_Li_test.db"),
    "oxides": ("oxides.db", None),
    "molecules": ("molecules_train.db", "molecules_test.db"),
    "relaxed_molecules": ("relaxed_molecules.db", None),
}
"""ASE databases by the name of the data: of training and of testing; None: a fifth of the first.

Those of molecules are made by `python -m benchmarks.evidence.molecules FOLDER` and `….relaxed_molecules FOLDER`.
"""

ENERGIES_ALONE = ("oxides", "relaxed_molecules")
"""Data whose structures are relaxed, so that their forces are nearly zero: energies alone are trained."""


def read(name: str, folder: Path) -> tuple[list[Atoms], list[Atoms]]:
    """The structures for training and for the last look.

    Args:
        name: one of `FILES`.
        folder: of the databases.
    """
    first, second = FILES[name]
    known = read_file(folder / first)
    if second is not None:
        return known, read_file(folder / second)
    test, train = parted(known, 0.2, seed=1)
    return train, test


def read_file(path: Path) -> list[Atoms]:
    """The structures of an ASE database with their labels, molecules in a cell; see `group_of` and `gap_of`."""
    found = []
    with ase.db.connect(str(path)) as db:
        for row in db.select():
            atoms = repeated(row.toatoms())
            atoms.info.update(group=row.get("group"), gap=row.data.get("gap"))
            found.append(atoms)
    return found


def group_of(atoms: Atoms) -> str | None:
    """The kind of structure that its database calls it, such as Surface or Vacancy; None: it says nothing."""
    return atoms.info.get("group")


def gap_of(atoms: Atoms) -> float | None:
    """The HOMO-LUMO gap in eV; None: its database says nothing."""
    return atoms.info.get("gap")


def repeated(atoms: Atoms) -> Atoms:
    """Molecules in a cell so large that no atom meets an image of another; what has a cell, as it is."""
    if atoms.cell.rank:
        return atoms
    labels = atoms.calc.results
    atoms.center(vacuum=5.0)
    atoms.pbc = True
    atoms.calc = SinglePointCalculator(atoms, energy=labels["energy"], forces=labels["forces"])
    return atoms


def parted(items: list[Atoms], share: float, seed: int) -> tuple[list[Atoms], list[Atoms]]:
    """A random share of the items, and the rest."""
    order = np.random.default_rng(seed).permutation(len(items))
    count = round(share * len(items))
    return [items[i] for i in order[:count]], [items[i] for i in order[count:]]


def shares_of_elements(structures: Sequence[Atoms]) -> np.ndarray:
    """[B, 100] the share of a structure's atoms that each element has, by atomic number."""
    return np.stack([np.bincount(atoms.numbers, minlength=100) / len(atoms) for atoms in structures])


def reference_energies(shares: np.ndarray, per_atom: np.ndarray) -> np.ndarray:
    """[100] energies of the elements, eV per atom, fitted to energies per atom [B] of structures of these shares."""
    return np.linalg.lstsq(shares, per_atom, rcond=None)[0]
