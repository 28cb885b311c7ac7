"""Positions in periodic cells."""

from __future__ import annotations

import torch
from torch import Tensor

from fairchem_scd.errors import DataError

_SAME_SPOT = 0.01
"""Å. Atoms closer than this are one atom listed twice. Hosts would leave out their edge and train on the labels."""

_SMALLEST_VOLUME = 1e-6  # Å³; below it a cell has no inverse to speak of, as that of a molecule


def wrapped(pos: Tensor, cell: Tensor, pbc: Tensor, batch: Tensor) -> Tensor:
    """Put atoms that are outside their cell back into it, along its periodic directions.

    No distance between periodic images changes. It is needed because hosts search for neighbours on the assumption
    that all atoms are inside: an atom that noise has moved out would lose some of its edges. Atoms that are inside
    keep their positions to the last bit, and so do all atoms of a structure whose cell has no volume.

    Args:
        pos: [N, 3] Å.
        cell: [B, 3, 3] lattice vectors in rows, Å.
        pbc: [B, 3] bool, the directions in which a structure repeats.
        batch: [N] the structure of each atom.

    Returns:
        [N, 3] Å.
    """
    repeats = pbc & (torch.linalg.det(cell.double()).abs() > _SMALLEST_VOLUME)[:, None]
    if not bool(repeats.any()):
        return pos
    invertible = torch.where(repeats.any(dim=1)[:, None, None], cell.double(), torch.eye(3, dtype=torch.float64))
    fractional = torch.einsum("ni,nij->nj", pos.double(), torch.linalg.inv(invertible)[batch])
    images = torch.floor(fractional) * repeats[batch]
    shift = torch.einsum("ni,nij->nj", images, cell.double()[batch])
    return torch.where(images.any(dim=1)[:, None], (pos.double() - shift).to(pos), pos)


def nearest_images(pos: Tensor, cell: Tensor, pbc: Tensor) -> Tensor:
    """Distances between the atoms of one structure, by the minimum image convention in fractional coordinates.

    Exact where they are small against the cell, and never too small.

    Args:
        pos: [N, 3] Å.
        cell: [3, 3] lattice vectors in rows, Å. One without a volume has no images.
        pbc: [3], the directions in which the structure repeats.

    Returns:
        [N, N] Å; infinite on the diagonal.
    """
    vectors, cell = pos[:, None] - pos[None], cell.to(pos)
    if float(torch.linalg.det(cell).abs()) > 0:
        fractional = vectors @ torch.linalg.inv(cell)
        vectors = (fractional - fractional.round() * pbc.to(pos)) @ cell
    return vectors.norm(dim=-1).fill_diagonal_(torch.inf)


def check_spots(distance: Tensor) -> None:
    """Raise DataError where two atoms are on the same spot. `distance`: [N, N] Å, from `nearest_images`."""
    if len(distance) > 1 and float(distance.min()) < _SAME_SPOT:
        first, second = divmod(int(distance.argmin()), len(distance))
        raise DataError(f"atoms {min(first, second)} and {max(first, second)} are on the same spot")
