"""Molecules with labels by GFN2-xTB: frames of molecular dynamics with energies, forces and HOMO-LUMO gaps.

The molecules are those of ASE's G2 collection that have at least `--atoms` atoms and no unpaired electron. Each runs
Langevin dynamics at several temperatures; a frame is kept every so many femtoseconds. The first part of a trajectory is
for training and the last for testing, with a stretch between them that neither has.

    uv run python -m benchmarks.evidence.molecules FOLDER

writes FOLDER/molecules_train.db and FOLDER/molecules_test.db, ASE databases. A row's `data` has `gap` [eV] and
`temperature` [K]; its key `molecule` has the name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.collections import g2
from ase.db import connect
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
from ase.optimize import BFGS
from tqdm import tqdm

from benchmarks.command_line import parser_of

TEMPERATURES = (300.0, 600.0, 1000.0)
"""Of the trajectories, K."""


@dataclass(frozen=True)
class Trajectory:
    """How a trajectory is run and cut.

    Attributes:
        timestep: fs.
        equilibration: steps before the first frame.
        stride: steps from one frame to the next.
        train, gap, test: frames for training, left out, and for testing, in this order.
    """

    timestep: float = 1.0
    equilibration: int = 100
    stride: int = 20
    train: int = 12
    gap: int = 2
    test: int = 4


def closed_shell_molecules(at_least: int) -> list[Atoms]:
    """The molecules of ASE's G2 collection with `at_least` atoms or more and no unpaired electron, named in `info`."""
    found = []
    for name in sorted(g2.names):
        atoms = molecule(name)
        if len(atoms) >= at_least and not atoms.get_initial_magnetic_moments().any():
            atoms.info["molecule"] = name
            found.append(atoms)
    return found


def frames(atoms: Atoms, temperature: float, how: Trajectory, seed: int) -> Iterator[Atoms]:
    """Frames of one trajectory from the relaxed molecule, with energy [eV], forces [eV/Å] and `gap` [eV] in `info`."""
    from tblite.ase import TBLite

    atoms = atoms.copy()
    atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
    rng = np.random.default_rng(seed)
    BFGS(atoms, logfile=None).run(fmax=0.05, steps=200)
    MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=rng)
    Stationary(atoms)
    dynamics = Langevin(
        atoms, how.timestep * units.fs, temperature_K=temperature, friction=0.01 / units.fs, rng=rng, fixcm=True
    )
    dynamics.run(how.equilibration)
    for _ in range(how.train + how.gap + how.test):
        dynamics.run(how.stride)
        frame = Atoms(atoms.numbers, atoms.positions - atoms.positions.mean(axis=0))
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        frame.calc = SinglePointCalculator(frame, energy=energy, forces=forces)
        frame.info.update(molecule=atoms.info["molecule"], temperature=temperature, gap=orbital_gap(atoms.calc))
        yield frame


def orbital_gap(calculator: object) -> float:
    """Difference between the lowest empty and the highest occupied orbital, eV."""
    result = calculator._res  # ASE's interface of tblite does not hand orbitals on
    levels, occupations = result.get("orbital-energies"), result.get("orbital-occupations")
    homo = int(np.flatnonzero(occupations > 1.0)[-1])
    return float(levels[homo + 1] - levels[homo]) * units.Hartree


def write(folder: Path, at_least: int, how: Trajectory, seed: int) -> tuple[int, int]:
    """Write both databases; returns their numbers of rows.

    Raises:
        FileExistsError: one of them is there already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"molecules_{part}.db" for part in ("train", "test")]
    for path in paths:
        if path.exists():
            raise FileExistsError(f"{path} is there already; remove it to make the data again")
    counts = [0, 0]
    runs = [(m, t) for m in closed_shell_molecules(at_least) for t in TEMPERATURES]
    with connect(paths[0]) as train, connect(paths[1]) as test:
        for number, (atoms, temperature) in enumerate(tqdm(runs, unit="trajectory")):
            for i, frame in enumerate(frames(atoms, temperature, how, seed=1000 * seed + number)):
                if how.train <= i < how.train + how.gap:
                    continue
                part = int(i >= how.train)
                data = {"gap": frame.info["gap"], "temperature": temperature}
                (train, test)[part].write(frame, molecule=frame.info["molecule"], data=data)
                counts[part] += 1
    return counts[0], counts[1]


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of("benchmarks.evidence.molecules", __doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the databases are written")
    parser.add_argument("--atoms", type=int, default=4, help="fewest atoms of a molecule; default: %(default)s")
    parser.add_argument(
        "--train", type=int, default=Trajectory.train, help="training frames of a trajectory; default: %(default)s"
    )
    parser.add_argument(
        "--test", type=int, default=Trajectory.test, help="test frames of a trajectory; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="of velocities and dynamics; default: %(default)s")
    options = parser.parse_args(arguments)
    how = Trajectory(train=options.train, test=options.test)
    train, test = write(options.folder, options.atoms, how, options.seed)
    print(f"{train} training and {test} test frames in {options.folder}")


if __name__ == "__main__":
    main()
