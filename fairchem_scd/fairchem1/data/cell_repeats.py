"""Random repeats of small periodic cells: the same crystal in a larger cell, with its labels and marks."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from fairchem_scd.denoising.random import stream
from fairchem_scd.denoising.settings import CellRepeatSettings
from fairchem_scd.denoising.structures import identities
from fairchem_scd.errors import ConfigError

_POSITIONS = ("pos", "pos_relaxed")
_PER_ATOM = ("atomic_numbers", "tags", "fixed", "forces", "force")
_EXTENSIVE = ("energy", "y", "y_init", "y_relaxed")
_UNCHANGED = ("stress", "stress_isotropic", "stress_anisotropic", "pbc", "sid", "fid", "row_number", "md", "skip_dens")


def check_outputs(outputs: Mapping[str, Any]) -> frozenset[str]:
    """The per-atom labels among a config's outputs. Raises ConfigError where an output may or may not be extensive."""
    known = {*_PER_ATOM, *_EXTENSIVE, *_UNCHANGED}
    for name, output in outputs.items():
        if name not in known and output.get("level") != "atom":
            raise ConfigError(
                f"task.denoising.repeat_cells: it is not known how the output '{name}' changes when a cell is repeated "
                "(energy grows with the atoms, stress stays); leave repeat_cells or the output out"
            )
    return frozenset(name for name, output in outputs.items() if output.get("level") == "atom")


def repeat(row: Any, repeats: Sequence[int], per_atom: Collection[str] = ()) -> Any:
    """A structure in a cell that is repeated along its axes, with its labels and marks.

    Args:
        row: of a host dataset. Energies grow with the number of copies, forces and tags are copied, stress stays.
        repeats: how often along each of the three cell vectors.
        per_atom: further keys with a row for each atom, which are copied.

    Returns:
        A new row, with one copy of the atoms after the other. Keys of which it is not known how they change are left
        out, such as edges.
    """
    out, per_atom = copy.copy(row), {*_PER_ATOM, *per_atom}
    known = {*_POSITIONS, *per_atom, *_EXTENSIVE, *_UNCHANGED, "cell", "natoms"}
    for key in list(row.keys()):
        if key not in known:
            del out[key]
    shifts = torch.cartesian_prod(*(torch.arange(n) for n in repeats)).to(row.cell)
    copies, cell = len(shifts), row.cell.view(3, 3)
    for key in row.keys():  # noqa: SIM118
        if key in _POSITIONS:
            out[key] = (row[key][None] + (shifts @ cell)[:, None]).reshape(-1, 3)
        elif key in per_atom:
            out[key] = torch.cat([row[key]] * copies)
        elif key in _EXTENSIVE:
            out[key] = row[key] * copies
    out.cell = (cell * torch.tensor(repeats, dtype=cell.dtype)[:, None]).view_as(row.cell)
    out.natoms = row.natoms * copies
    return out


def draw_repeats(natoms: int, periodic: Sequence[bool], settings: CellRepeatSettings, rng: Any) -> tuple[int, int, int]:
    """How often to repeat a cell along each axis: first as `min_atoms` asks, then at random.

    As in the code of SCD's authors, a structure of N atoms that is too small is doubled along ⌈min_atoms / N⌉ − 1
    random periodic axes, or along all of them where there are fewer. Then `tries` may double further axes. Ours: where
    a structure is too small with all its axes doubled, it is repeated further.
    """
    repeats, axes = [1, 1, 1], [axis for axis in range(3) if periodic[axis]]
    if not axes or not natoms:
        return 1, 1, 1
    for _ in range(math.ceil(settings.min_atoms / natoms) - 1):
        single = [axis for axis in axes if repeats[axis] == 1]
        if not single:
            break
        repeats[single[int(rng.random() * len(single))]] = 2
    while natoms * math.prod(repeats) < settings.min_atoms:
        # The axis with the fewest repeats so far, chosen at random among equals.
        fewest = min(repeats[axis] for axis in axes)
        candidates = [axis for axis in axes if repeats[axis] == fewest]
        repeats[candidates[int(rng.random() * len(candidates))]] += 1
    for _ in range(settings.tries):
        doubled, axis = rng.random() < settings.prob, axes[int(rng.random() * len(axes))]
        if doubled and repeats[axis] == 1 and 2 * natoms * math.prod(repeats) <= settings.max_atoms:
            repeats[axis] = 2
    return repeats[0], repeats[1], repeats[2]


class RepeatedCells(Dataset):
    """A host dataset whose small periodic cells are repeated at random, anew in each epoch.

    Repeats are drawn from (seed, epoch, identity). So they do not depend on the worker or rank that loads a structure,
    and are the same after a restart.

    Args:
        dataset: of the host.
        settings: how to draw them.
        seed: of the run.
        sampler: the host's batch sampler, which knows the epoch.
        per_atom: names of further per-atom labels, beside forces.
    """

    def __init__(
        self, dataset: Any, settings: CellRepeatSettings, seed: int, sampler: Any, per_atom: Collection[str] = ()
    ) -> None:
        self.dataset, self.settings, self.seed, self.sampler = dataset, settings, seed, sampler
        self.per_atom = per_atom

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        row = self.dataset[index]
        (name,) = identities(row)
        rng = stream(self.seed, self.sampler.sampler.epoch, f"cell of {name}")
        pbc = getattr(row, "pbc", None)
        periodic = [True] * 3 if pbc is None else [bool(p) for p in pbc.view(-1)]
        # Also where nothing is repeated: all rows of a batch must have the same keys, and `repeat` leaves some out.
        return repeat(row, draw_repeats(len(row.pos), periodic, self.settings, rng), self.per_atom)
