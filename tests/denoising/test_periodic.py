"""Atoms that noise has moved out of a periodic cell are put back, and nothing else changes."""

from __future__ import annotations

import numpy as np
import torch

from fairchem_scd.denoising.periodic import wrapped
from fairchem_scd.denoising.structures import Structures

CELL = torch.tensor([[4.0, 0.0, 0.0], [1.0, 3.0, 0.0], [0.5, -0.4, 5.0]])


def _fractional(pos, cell):
    return np.linalg.solve(cell.numpy().astype(float).T, pos.numpy().astype(float).T).T


def test_atoms_come_back_into_the_cell_by_whole_lattice_vectors_along_periodic_directions():
    generator = torch.Generator().manual_seed(0)
    cell = torch.stack([CELL, 2 * CELL])
    pbc = torch.tensor([[True, True, False], [True, True, True]])
    batch = torch.tensor([0] * 40 + [1] * 40)
    pos = 12 * (torch.rand(80, 3, generator=generator) - 0.5)
    found = wrapped(pos, cell, pbc, batch)
    for b in range(2):
        rows = batch == b
        inside = _fractional(found[rows], cell[b])
        images = _fractional(pos[rows], cell[b]) - inside
        np.testing.assert_allclose(images, np.round(images), atol=1e-5)
        periodic = pbc[b].numpy()
        assert (inside[:, periodic] > -1e-6).all()
        assert (inside[:, periodic] < 1 + 1e-6).all()
        assert (images[:, ~periodic].round() == 0).all()
        assert np.abs(images).max() > 0.5  # some atoms were outside


def test_atoms_inside_and_structures_without_a_cell_keep_their_positions_to_the_last_bit():
    inside = torch.rand(30, 3, generator=torch.Generator().manual_seed(1)) @ CELL
    outside = inside + 100.0
    pos, batch = torch.cat([inside, outside]), torch.tensor([0] * 30 + [1] * 30)
    found = wrapped(pos, torch.stack([CELL, torch.zeros(3, 3)]), torch.ones(2, 3, dtype=torch.bool), batch)
    assert torch.equal(found, pos)


def test_displaced_positions_of_structures_without_periodic_directions_are_a_plain_sum():
    pos, noise = torch.randn(4, 3), 50 * torch.randn(4, 3)
    fields = {"ids": ["a"], "natoms": torch.tensor([4]), "pos": pos, "fixed": torch.zeros(4, dtype=torch.bool)}
    for extra in ({}, {"cell": CELL[None]}, {"cell": CELL[None], "pbc": torch.zeros(1, 3, dtype=torch.bool)}):
        assert torch.equal(Structures(**fields, **extra).displaced(noise), pos + noise)
    periodic = Structures(**fields, cell=CELL[None], pbc=torch.ones(1, 3, dtype=torch.bool))
    assert not torch.equal(periodic.displaced(noise), pos + noise)
