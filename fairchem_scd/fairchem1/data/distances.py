"""Distances between the atoms of a row, with their periodic images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.neighborlist import neighbor_list
from torch import Tensor


def nearest_images(row: Any, use_pbc: bool = True) -> Tensor:
    """[N, N] distances by the minimum image convention in fractional coordinates, Å; infinite on the diagonal.

    Exact where they are small against the cell, and never too small. Without `use_pbc` there are no images.
    """
    vectors = row.pos[:, None] - row.pos[None]
    cell = row.cell.view(3, 3).to(row.pos) if getattr(row, "cell", None) is not None else None
    if cell is not None and float(torch.linalg.det(cell).abs()) > 0:
        fractional = vectors @ torch.linalg.inv(cell)
        vectors = (fractional - fractional.round() * _periodic(row, use_pbc)) @ cell
    return vectors.norm(dim=-1).fill_diagonal_(torch.inf)


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
