"""Distances between the atoms of a row, with their periodic images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.neighborlist import neighbor_list
from torch import Tensor

from fairchem_scd.denoising import periodic


def nearest_images(row: Any, use_pbc: bool = True) -> Tensor:
    """[N, N] distances between the atoms of a row: see `periodic.nearest_images`. Without `use_pbc` without images."""
    cell = row.cell.view(3, 3) if getattr(row, "cell", None) is not None else torch.zeros(3, 3)
    return periodic.nearest_images(row.pos, cell, _periodic(row, use_pbc))


def neighbours(row: Any, cutoff: float, use_pbc: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of an atom and a neighbour or image within a cutoff (Å), in cells of any size.

    Returns:
        [pairs] index of the atom, and [pairs] distance in Å.
    """
    cell = row.cell.view(3, 3).numpy() if getattr(row, "cell", None) is not None else None
    periodic = _periodic(row, use_pbc).bool().numpy() if cell is not None else False
    atoms = Atoms(row.atomic_numbers.view(-1).numpy(), row.pos.numpy(), cell=cell, pbc=periodic)
    return neighbor_list("id", atoms, cutoff)


def _periodic(row: Any, use_pbc: bool) -> Tensor:
    pbc = getattr(row, "pbc", None) if use_pbc else (False, False, False)
    return torch.as_tensor(pbc).view(-1)[:3].to(row.pos) if pbc is not None else torch.ones(3)
