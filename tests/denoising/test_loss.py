"""The loss of a denoising step against the formula, atom by atom, in plain Python."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fairchem_scd.denoising import loss
from fairchem_scd.denoising.corruption import Corruption
from fairchem_scd.denoising.loss import Ranks

FORCE, NOISE = 100.0, 10.0


def norm(prediction, target, natoms):
    return (prediction - target).norm(dim=-1)


def absolute(prediction, target, natoms):
    return (prediction - target).abs()


def squared(prediction, target, natoms):
    return (prediction - target).square()


# Each beside what it makes of one atom, item by item.
LOSSES = {
    "norm": (norm, lambda p, t: [math.dist(p, t)]),
    "absolute": (absolute, lambda p, t: [abs(a - b) for a, b in zip(p, t, strict=True)]),
    "squared": (squared, lambda p, t: [(a - b) ** 2 for a, b in zip(p, t, strict=True)]),
}


@dataclass
class Atoms:
    """What one rank has: n atoms, some fixed, some corrupted, in structures of three atoms."""

    force: Tensor
    force_target: Tensor
    noise: Tensor
    corruption: Corruption
    fixed: Tensor
    scale = 0.1

    @classmethod
    def random(cls, n: int, seed: int, corrupted: float = 0.5) -> Atoms:
        generator = torch.Generator().manual_seed(seed)
        force, target, noise, moved = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for _ in range(4))
        mask, fixed = (torch.rand(n, generator=generator) < share for share in (corrupted, 0.4))
        batch = torch.arange(n) // 3
        sigma = torch.zeros(-(-n // 3)).index_put_((batch[mask],), torch.tensor(0.1))
        return cls(force, target, noise, Corruption(moved * mask[:, None], mask, sigma, batch), fixed)

    def noise_target(self) -> Tensor:
        rows = torch.arange(len(self.fixed))
        return loss.noise_target(self.corruption, rows, self.scale, torch.device("cpu"))

    def trained(self, all_atoms: bool) -> Tensor:
        return loss.trained_atoms(self.fixed, self.corruption, free_only=not all_atoms, noise_for_forces=True)


RANKS = {
    "even": [Atoms.random(12, 0), Atoms.random(12, 1)],
    "one with nothing": [Atoms.random(9, 2), Atoms.random(0, 3)],
    "one uncorrupted": [Atoms.random(6, 4), Atoms.random(15, 5, corrupted=0.0)],
    "all uncorrupted": [Atoms.random(6, 6, corrupted=0.0), Atoms.random(9, 7, corrupted=0.0)],
    "alone": [Atoms.random(10, 8)],
    "nothing anywhere": [Atoms.random(0, 9), Atoms.random(0, 10)],
}
WAYS = ["rows", "mask"]
"""Rows that were selected before, as fairchem 1.x does; all rows and a mask, as fairchem 2.x does."""


def over_ranks(held: list[Atoms], term: Any) -> list[Tensor]:
    """What `term(atoms, ranks)` is on each rank, and that all ranks ask for the same sums."""
    asked: list[list[Any]] = []
    for atoms in held:
        asked.append([])
        term(atoms, Ranks(len(held), lambda count, asked=asked[-1]: asked.append(count) or count))
    assert len({len(counts) for counts in asked}) == 1, "ranks that make different calls wait for ever"
    sums = [sum(counts) for counts in zip(*asked, strict=True)]
    terms = []
    for atoms in held:
        left = iter(sums)
        terms.append(term(atoms, Ranks(len(held), lambda _, left=left: next(left))))
    return terms


def hybrid(fn, way, reduction, all_atoms):
    """The hybrid loss of one rank."""

    def term(atoms: Atoms, ranks: Ranks) -> Tensor:
        mask = atoms.trained(all_atoms)
        rows = mask.nonzero()[:, 0] if way == "rows" else torch.arange(len(mask))
        items = loss.hybrid_items(
            fn,
            atoms.force[rows],
            atoms.force_target[rows],
            atoms.noise[rows],
            atoms.noise_target()[rows],
            atoms.corruption.mask[rows],
            force_coefficient=FORCE,
            noise_coefficient=NOISE,
        )
        return loss.reduce(items, reduction, ranks, None if way == "rows" else mask)

    return term


def naive_hybrid(atoms: Atoms, of_atom, all_atoms: bool) -> list[float]:
    """The items of DeNS's hybrid loss, by the paper: c λ_D L(ε/σ, ε̂) + (1 − c) λ_F L(F, F̂) of atoms that train."""
    items = []
    for i in range(len(atoms.fixed)):
        corrupted = bool(atoms.corruption.mask[i])
        if bool(atoms.fixed[i]) and not corrupted and not all_atoms:
            continue
        if corrupted:
            target = [float(e) / atoms.scale for e in atoms.corruption.noise[i]]
            items += [NOISE * item for item in of_atom(atoms.noise[i].tolist(), target)]
        else:
            items += [FORCE * item for item in of_atom(atoms.force[i].tolist(), atoms.force_target[i].tolist())]
    return items


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("all_atoms", [False, True], ids=["free atoms", "all atoms"])
@pytest.mark.parametrize("fn", LOSSES)
@pytest.mark.parametrize("held", RANKS)
def test_the_hybrid_loss_is_the_papers_formula_over_all_ranks(held, fn, all_atoms, way):
    function, of_atom = LOSSES[fn]
    terms = over_ranks(RANKS[held], hybrid(function, way, "mean", all_atoms))
    items = [item for atoms in RANKS[held] for item in naive_hybrid(atoms, of_atom, all_atoms)]
    expected = sum(items) / max(len(items), 1)
    assert sum(map(float, terms)) / len(terms) == pytest.approx(expected, rel=1e-6)  # DDP averages


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fn", LOSSES)
@pytest.mark.parametrize("held", RANKS)
def test_a_sum_is_of_the_ranks_own_atoms(held, fn, way):
    function, of_atom = LOSSES[fn]
    terms = over_ranks(RANKS[held], hybrid(function, way, "sum", all_atoms=False))
    for term, atoms in zip(terms, RANKS[held], strict=True):
        assert float(term) == pytest.approx(sum(naive_hybrid(atoms, of_atom, all_atoms=False)), rel=1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fn", LOSSES)
@pytest.mark.parametrize("held", RANKS)
def test_the_noise_term_is_the_mean_over_corrupted_atoms_of_all_ranks(held, fn, way):
    function, of_atom = LOSSES[fn]

    def term(atoms: Atoms, ranks: Ranks) -> Tensor:
        mask = atoms.corruption.mask
        rows = mask.nonzero()[:, 0] if way == "rows" else torch.arange(len(mask))
        noise, target = atoms.noise[rows], atoms.noise_target()[rows]
        mask = None if way == "rows" else mask
        return loss.noise_term(function, noise, target, coefficient=NOISE, ranks=ranks, mask=mask)

    items = []
    for atoms in RANKS[held]:
        for i in atoms.corruption.mask.nonzero()[:, 0].tolist():
            target = [float(e) / atoms.scale for e in atoms.corruption.noise[i]]
            items += of_atom(atoms.noise[i].tolist(), target)
    terms = over_ranks(RANKS[held], term)
    expected = NOISE * sum(items) / max(len(items), 1)
    assert sum(map(float, terms)) / len(terms) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("fn", LOSSES)
def test_no_gradient_leads_from_the_noise_into_forces_nor_back(fn):
    atoms = Atoms.random(12, 0)
    force, noise = atoms.force.clone().requires_grad_(), atoms.noise.clone().requires_grad_()
    corrupted = atoms.corruption.mask
    items = loss.hybrid_items(
        LOSSES[fn][0],
        force,
        atoms.force_target,
        noise,
        atoms.noise_target(),
        corrupted,
        force_coefficient=FORCE,
        noise_coefficient=NOISE,
    )
    loss.reduce(items, "mean", Ranks(1, lambda count: count)).backward()
    assert torch.equal(force.grad.any(dim=1), ~corrupted)
    assert torch.equal(noise.grad.any(dim=1), corrupted)


def test_rows_that_a_mask_leaves_out_may_be_anything():
    """Labels that are missing are infinite there, in hosts that mask."""
    items, mask = torch.tensor([1.0, torch.inf, torch.nan, 4.0]), torch.tensor([True, False, False, True])
    assert float(loss.reduce(items, "mean", Ranks(1, lambda count: count), mask)) == 2.5
    assert float(loss.reduce(items, "sum", Ranks(1, lambda count: count), mask)) == 5.0


def test_a_rank_with_nothing_has_a_loss_of_zero_and_gradients():
    noise = torch.zeros(0, 3, requires_grad=True)
    term = loss.noise_term(norm, noise, torch.zeros(0, 3), coefficient=NOISE, ranks=Ranks(2, lambda count: count))
    term.backward()
    assert float(term) == 0
    assert noise.grad is not None


@pytest.mark.parametrize("fn", LOSSES)
def test_the_logged_share_is_that_of_corrupted_atoms(fn):
    atoms = Atoms.random(12, 0)
    items = LOSSES[fn][0](atoms.force, atoms.force_target, None)
    corrupted = atoms.corruption.mask
    expected = float(items[corrupted].sum() / items.sum())
    assert float(loss.corrupted_share(items, corrupted)) == pytest.approx(expected, rel=1e-12)
    assert float(loss.corrupted_share(torch.zeros(3), torch.ones(3, dtype=torch.bool))) == 0


def test_fixed_atoms_train_only_where_noise_that_moved_them_takes_the_place_of_forces():
    fixed, moved = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    corruption = Corruption(torch.zeros(4, 3), moved, torch.ones(1), torch.zeros(4, dtype=torch.long))
    for free_only, noise_for_forces, expected in (
        (True, True, [True, False, True, True]),
        (True, False, [False, False, True, True]),
        (False, True, [True] * 4),
        (False, False, [True] * 4),
    ):
        trained = loss.trained_atoms(fixed, corruption, free_only=free_only, noise_for_forces=noise_for_forces)
        assert trained.tolist() == expected


def test_the_noise_in_angstrom_is_the_target_times_its_unit():
    atoms = Atoms.random(12, 0)
    back = loss.noise_in_angstrom(atoms.noise_target().requires_grad_(), atoms.scale)
    assert not back.requires_grad
    torch.testing.assert_close(back, atoms.corruption.noise)
