"""Sample data: structures with the labels of a classical potential, as rows, batches and databases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ase.db
import lmdb
import numpy as np
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch


def crystal(seed: int, repeat: tuple[int, int, int] = (1, 1, 1)) -> Atoms:
    """A small cell of an alloy, strained and rattled, with the labels of a classical potential; one atom is fixed."""
    rng = np.random.default_rng(seed)
    atoms = bulk("Cu", cubic=True, a=3.7 + 0.2 * rng.random()).repeat(repeat)
    atoms.set_atomic_numbers(rng.choice([13, 29, 47], len(atoms)))
    atoms.set_cell(atoms.cell @ (np.eye(3) + 0.02 * rng.standard_normal((3, 3))), scale_atoms=True)
    atoms.positions += 0.06 * rng.standard_normal((len(atoms), 3))
    return labelled(atoms, fixed=[0])


def cluster(seed: int) -> Atoms:
    """A molecule without a cell, with the labels of a classical potential."""
    rng = np.random.default_rng(seed)
    atoms = molecule(["H2O", "NH3", "CH4", "CH3OH"][seed % 4])
    atoms.positions += 0.05 * rng.standard_normal((len(atoms), 3))
    return labelled(atoms)


def labelled(atoms: Atoms, fixed: Sequence[int] = ()) -> Atoms:
    """The structure with its energy, forces and, in a cell, stress."""
    atoms.calc = EMT()
    energy, forces = atoms.get_potential_energy(), atoms.get_forces(apply_constraint=False)
    stress = atoms.get_stress(apply_constraint=False) if atoms.pbc.all() else None
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces, stress=stress)
    if fixed:
        atoms.set_constraint(FixAtoms(fixed))
    return atoms


def crystals(count: int, seed: int = 0) -> list[Atoms]:
    return [crystal(seed + i, (1, 1, 1 + i % 2)) for i in range(count)]


def write(folder: Path, split: str, structures: Sequence[Atoms]) -> None:
    """A database as the host reads it, where `run_config` looks for it."""
    path = database(folder, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    with ase.db.connect(str(path)) as rows:
        for atoms in structures:
            rows.write(atoms)
    np.savez(path.parent / "metadata.npz", natoms=np.array([len(atoms) for atoms in structures]))


def database(folder: Path, split: str) -> Path:
    """Where the database of a split is."""
    return folder / split / f"{split}.aselmdb"


def sample_data(folder: Path) -> Path:
    """The folder, with data for runs."""
    write(folder, "train", crystals(8))
    write(folder, "val", crystals(4, 100))
    return folder


def row(atoms: Atoms, dataset: str = "mo", **labels: str) -> AtomicData:
    """One structure as the host's dataset gives it; `labels` are further names for its labels."""
    data = AtomicData.from_ase(atoms, task_name=dataset, r_data_keys=["charge", "spin"])
    data.dataset_name = f"{dataset}.train"
    if "stress" in data:
        data.stress = data.stress.reshape(1, 9)  # as configs have the host transform it
    for name, label in labels.items():
        data[name] = data[label].clone()
    return data


def batch_of(structures: Sequence[Atoms], **how: Any) -> AtomicData:
    """Structures as a batch of the host, with the labels that all of them have."""
    rows = [row(atoms, **how) for atoms in structures]
    for key in ("stress", "forces", "energy"):
        if not all(key in each for each in rows):
            for each in rows:
                each.__keys__.discard(key)
    return atomicdata_list_to_batch(rows)


def broken(path: Path, number: int) -> None:
    """Damage a row of a database."""
    with lmdb.open(str(path), subdir=False, lock=False) as env, env.begin(write=True) as transaction:
        assert transaction.put(str(number).encode(), b"no row")
