"""Corruption: who moves, how far, and that it depends on nothing but seed, step and structure."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairchem_scd.denoising.corruption import corrupt


def draw(natoms, ids=None, movable=None, **arguments):
    arguments = {"seed": 0, "step": 1, "sigmas": (0.1,), **arguments}
    natoms = torch.tensor(natoms)
    movable = torch.ones(int(natoms.sum()), dtype=torch.bool) if movable is None else movable
    return corrupt(natoms, ids or [str(i) for i in range(len(natoms))], movable, **arguments)


@settings(max_examples=50, deadline=None)
@given(
    natoms=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    order=st.randoms(use_true_random=False),
    seed=st.integers(-5, 2**40),
    step=st.integers(0, 10**7),
    ratio=st.one_of(st.none(), st.floats(0.05, 1.0)),
)
def test_noise_follows_the_structure_whatever_its_company(natoms, order, seed, step, ratio):
    """Any spread of the structures over batches and ranks gives each the same noise."""
    ids = [f"sid{i}/fid{n}" for i, n in enumerate(natoms)]
    together = draw(natoms, ids, seed=seed, step=step, ratio=ratio)
    split = torch.split(together.noise, natoms)
    shuffled = list(range(len(natoms)))
    order.shuffle(shuffled)
    np.random.default_rng().random()  # global random states are of no consequence
    for i in shuffled:
        torch.rand(3)
        alone = draw([natoms[i]], [ids[i]], seed=seed, step=step, ratio=ratio)
        assert torch.equal(alone.noise, split[i])


def test_seed_step_and_identity_each_change_the_noise():
    base = draw([5], ["1/2"])
    for change in ({"seed": 1}, {"step": 2}, {"ids": ["1/3"]}):
        assert not torch.equal(draw([5], **{"ids": ["1/2"], **change}).noise, base.noise)


def test_noise_is_gaussian_of_the_asked_width():
    noise = draw([20000], sigmas=(0.15,)).noise.double().flatten()
    n = len(noise)
    assert abs(float(noise.std()) / 0.15 - 1) < 4 / math.sqrt(2 * n)
    assert abs(float(((noise / 0.15) ** 4).mean()) - 3) < 4 * math.sqrt(96 / n)
    # Neighbouring steps and structures are independent.
    other = draw([20000], sigmas=(0.15,), step=2).noise.double().flatten()
    assert abs(float((noise * other).mean()) / 0.15**2) < 4 / math.sqrt(n)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
def test_share_of_moved_atoms_is_the_corrupt_ratio(ratio):
    n = 40000
    assert abs(float(draw([n], ratio=ratio).mask.double().mean()) - ratio) < 4 * math.sqrt(ratio * (1 - ratio) / n)


def test_mean_displacement_is_removed_where_nothing_anchors_it():
    fixed = torch.zeros(30, dtype=torch.bool)
    fixed[10] = True  # anchors the second structure
    corruption = draw([10, 10, 10], movable=~fixed)
    first, second, third = corruption.noise.split(10)
    assert first.mean(dim=0).abs().max() < 1e-7
    assert third.mean(dim=0).abs().max() < 1e-7
    assert second.mean(dim=0).abs().max() > 1e-3
    partial = draw([10, 10, 10], ratio=0.5).noise
    assert all(part.mean(dim=0).abs().max() > 1e-3 for part in partial.split(10))


def test_a_single_atom_is_left_alone():
    corruption = draw([1, 3])
    assert corruption.mask.tolist() == [False, True, True, True]
    assert corruption.corrupted.tolist() == [False, True]
    assert corruption.noise[0].tolist() == [0, 0, 0]
