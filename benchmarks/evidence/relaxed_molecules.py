"""Relaxed molecules with HOMO-LUMO gaps by GFN2-xTB: a small data set of the kind of QM9.

Molecules of up to seven atoms of C, N, O and F, and hydrogen, are grown at random, bond by bond. RDKit knows which
are possible and which are equal, and gives a first geometry (ETKDG, MMFF94); GFN2-xTB relaxes it. No molecule is there
twice, so each test molecule is new to a model.

    uv run python -m benchmarks.evidence.relaxed_molecules FOLDER

writes FOLDER/relaxed_molecules.db, an ASE database. A row's `data` has `gap` [eV]; its key `smiles` has the molecule.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import CalculationFailed
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import covalent_radii
from ase.db import connect
from ase.optimize import BFGS
from tqdm import tqdm

from benchmarks.command_line import parser_of
from benchmarks.evidence.molecules import orbital_gap

ELEMENTS = {"C": (4, 0.62), "N": (3, 0.17), "O": (2, 0.17), "F": (1, 0.04)}
"""How many bonds an atom has, and how often it is drawn."""

HEAVY = (4, 7)
"""Fewest and most atoms that are not hydrogen; fewer where no bond is left to grow from."""


def different_molecules(seed: int) -> Iterator[str]:
    """SMILES of molecules grown at random, each once, without end."""
    from rdkit import RDLogger
    from rdkit.Chem import MolToSmiles, SanitizeMol

    RDLogger.DisableLog("rdApp.*")  # impossible molecules are expected
    rng, known = np.random.default_rng(seed), set()
    while True:
        grown = grow(int(rng.integers(HEAVY[0], HEAVY[1] + 1)), rng)
        try:
            SanitizeMol(grown)
        except ValueError:
            continue
        smiles = MolToSmiles(grown)
        if smiles not in known:
            known.add(smiles)
            yield smiles


def grow(atoms: int, rng: np.random.Generator) -> Any:
    """A molecule of so many heavy atoms, or fewer where no bond is free: a tree, then up to two rings closed in it."""
    from rdkit.Chem import Atom, BondType, GetDistanceMatrix, RWMol

    orders = (BondType.SINGLE, BondType.DOUBLE, BondType.TRIPLE)
    molecule = RWMol()
    molecule.AddAtom(Atom("C"))
    names, weights = list(ELEMENTS), [often for _, often in ELEMENTS.values()]
    while molecule.GetNumAtoms() < atoms:
        free = free_bonds(molecule)
        at = [i for i, bonds in enumerate(free) if bonds]
        if not at:
            break
        neighbour, element = int(rng.choice(at)), str(rng.choice(names, p=weights))
        drawn = int(rng.choice([1, 2, 3], p=[0.7, 0.22, 0.08]))
        order = min(drawn, free[neighbour], ELEMENTS[element][0])
        molecule.AddBond(neighbour, molecule.AddAtom(Atom(element)), orders[order - 1])
    for _ in range(int(rng.choice([0, 1, 2], p=[0.45, 0.45, 0.1]))):
        free, far = free_bonds(molecule), GetDistanceMatrix(molecule, force=True)
        pairs = [(i, j) for i in range(len(free)) for j in range(i) if free[i] and free[j] and 2 <= far[i, j] <= 5]
        if pairs:
            i, j = pairs[rng.integers(len(pairs))]
            molecule.AddBond(i, j, BondType.SINGLE)
    return molecule


def free_bonds(molecule: Any) -> list[int]:
    """How many hydrogen atoms each heavy atom has."""
    molecule.UpdatePropertyCache()
    return [atom.GetTotalNumHs() for atom in molecule.GetAtoms()]


def relaxed(smiles: str) -> Atoms | None:
    """The molecule relaxed, with energy [eV], forces [eV/Å], and `gap` [eV] in `info`.

    None: RDKit finds no geometry, GFN2-xTB does not converge, it does not relax in 200 steps, or its bonds change.
    """
    from rdkit.Chem import AddHs, AllChem, MolFromSmiles
    from tblite.ase import TBLite

    molecule = AddHs(MolFromSmiles(smiles))
    if AllChem.EmbedMolecule(molecule, randomSeed=1) != 0 or not AllChem.MMFFHasAllMoleculeParams(molecule):
        return None
    AllChem.MMFFOptimizeMolecule(molecule, maxIters=1000)
    numbers = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    atoms = Atoms(numbers, molecule.GetConformer().GetPositions())
    atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
    wanted = {tuple(sorted((bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()))) for bond in molecule.GetBonds()}
    try:
        at_rest = BFGS(atoms, logfile=None).run(fmax=0.02, steps=200)
    except CalculationFailed:
        return None
    if not at_rest or bonds(atoms) != wanted:
        return None
    found = Atoms(numbers, atoms.positions - atoms.positions.mean(axis=0))
    found.calc = SinglePointCalculator(found, energy=atoms.get_potential_energy(), forces=atoms.get_forces())
    found.info["gap"] = orbital_gap(atoms.calc)
    return found


def bonds(atoms: Atoms) -> set[tuple[int, int]]:
    """Pairs of atoms that are no further apart than 1.3 times the sum of their covalent radii."""
    radii = covalent_radii[atoms.numbers]
    near = atoms.get_all_distances() < 1.3 * (radii[:, None] + radii)
    return {(int(i), int(j)) for i, j in zip(*np.nonzero(np.triu(near, 1)), strict=True)}


def write(folder: Path, count: int, seed: int) -> Path:
    """Write the database; returns its path.

    Raises:
        FileExistsError: it is there already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "relaxed_molecules.db"
    if path.exists():
        raise FileExistsError(f"{path} is there already; remove it to make the data again")
    molecules = different_molecules(seed)
    with connect(path) as rows, tqdm(total=count, unit="molecule") as progress:
        while progress.n < count:
            smiles = next(molecules)
            if (atoms := relaxed(smiles)) is not None:
                rows.write(atoms, smiles=smiles, data={"gap": atoms.info["gap"]})
                progress.update()
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of("benchmarks.evidence.relaxed_molecules", __doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the database is written")
    parser.add_argument("--count", type=int, default=3600, help="molecules; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the molecules' growth; default: %(default)s")
    options = parser.parse_args(arguments)
    print(f"{options.count} molecules in {write(options.folder, options.count, options.seed)}")


if __name__ == "__main__":
    main()
