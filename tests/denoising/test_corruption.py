"""Corruption: who moves, how far, and that it depends on nothing but seed, step and structure."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairchem_scd.denoising.corruption import corrupt
from fairchem_scd.denoising.random import stream
from fairchem_scd.denoising.settings import DensSettings
from fairchem_scd.denoising.structures import Structures
from fairchem_scd.denoising.tasks import Dens, NoisyNodes, TaskDraw


def structures(natoms, *, fixed=None, **labels):
    total = sum(natoms)
    return Structures(
        ids=[f"{i}/0" for i in range(len(natoms))],
        natoms=torch.tensor(natoms),
        pos=torch.zeros(total, 3),
        fixed=torch.zeros(total, dtype=torch.bool) if fixed is None else fixed,
        forces=labels.pop("forces", torch.ones(total, 3)),
        **labels,
    )


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


def test_what_did_not_move_is_not_in_the_mask():
    """Fixed atoms neither move nor count as corrupted, unlike in the authors' code."""
    fixed = torch.tensor([True, False] * 20)
    task = Dens(DensSettings(corrupt_ratio=None))
    corruption = task.corrupt(structures([20, 20], fixed=fixed), seed=0, step=1)
    assert torch.equal(corruption.mask, ~fixed)
    assert torch.equal((corruption.noise != 0).any(dim=1), corruption.mask)
    everything = Dens(DensSettings(corrupt_ratio=None, all_atoms=True))
    assert everything.corrupt(structures([20, 20], fixed=fixed), seed=0, step=1).mask.all()


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


def test_schedule_draws_one_sigma_a_structure_evenly_in_log():
    settings_ = DensSettings(num_steps=4, std_low=0.01, std_high=0.08)
    np.testing.assert_allclose(settings_.schedule, [0.01, 0.02, 0.04, 0.08])
    corruption = Dens(settings_).corrupt(structures([40] * 400), seed=0, step=1)
    drawn, counts = corruption.sigma.unique(return_counts=True)
    np.testing.assert_allclose(drawn, [0.01, 0.02, 0.04, 0.08], rtol=1e-6)
    assert counts.min() > 60
    for sigma in drawn:
        moved = corruption.mask & (corruption.sigma[corruption.batch] == sigma)
        assert abs(float(corruption.noise[moved].std() / sigma) - 1) < 0.05
    assert Dens(settings_).objective(0).scale == 0.08


def test_a_guard_changes_nothing_for_the_structures_it_lets_pass():
    whole = Dens(DensSettings()).corrupt(structures([6, 12]), seed=0, step=1)
    guarded = Dens(DensSettings(min_num_atoms=10)).corrupt(structures([6, 12]), seed=0, step=1)
    assert not guarded.mask[:6].any()
    assert torch.equal(guarded.noise[6:], whole.noise[6:])
    assert guarded.sigma.tolist() == [0.0, pytest.approx(0.1)]


@pytest.mark.parametrize(
    ("guard", "labels"),
    [
        ({}, {"md": torch.tensor([True, False])}),
        ({}, {"skip_dens": torch.tensor([True, False])}),
        ({"max_force_norm": 2.5}, {"forces": torch.cat([torch.full((8, 3), 2.0), torch.ones(8, 3)])}),
        ({"max_stress_norm": 0.5}, {"stress": torch.stack([torch.ones(3, 3), torch.zeros(3, 3)])}),
    ],
    ids=["md", "skip_dens", "max_force_norm", "max_stress_norm"],
)
def test_marks_and_guards_leave_a_structure_alone(guard, labels):
    corruption = Dens(DensSettings(corrupt_ratio=None, **guard)).corrupt(structures([8, 8], **labels), seed=0, step=1)
    assert corruption.corrupted.tolist() == [False, True]


def test_marks_can_be_ignored():
    labels = {"md": torch.tensor([True]), "skip_dens": torch.tensor([True])}
    task = Dens(DensSettings(corrupt_ratio=None, exclude_md=False, honour_skip_dens=False))
    assert task.corrupt(structures([8], **labels), seed=0, step=1).mask.all()


def test_strict_max_ratio_leaves_alone_what_would_move_too_much():
    natoms = [4] * 500
    free = Dens(DensSettings(corrupt_ratio=0.5)).corrupt(structures(natoms), seed=0, step=1)
    strict = Dens(DensSettings(corrupt_ratio=0.5, strict_max_ratio=0.75)).corrupt(structures(natoms), seed=0, step=1)
    whole = free.mask.view(-1, 4).all(dim=1)
    assert whole.any()
    assert torch.equal(strict.corrupted, free.corrupted & ~whole)


def test_task_of_a_step_comes_from_seed_and_step_alone():
    tasks = {"dens": Dens(DensSettings(prob=0.3)), "noisy_nodes": NoisyNodes(NoisyNodes.Settings(prob=0.2))}
    one, other = TaskDraw(tasks, seed=5), TaskDraw(tasks, seed=5)
    forward = [one(step) for step in range(200)]
    backward = [other(step) for step in reversed(range(200))]
    assert forward == backward[::-1]
    assert [TaskDraw(tasks, seed=6)(step) for step in range(200)] != forward


def test_tasks_take_their_shares_and_exclude_each_other():
    tasks = {"dens": Dens(DensSettings(prob=0.3)), "noisy_nodes": NoisyNodes(NoisyNodes.Settings(prob=0.2))}
    n = 6000
    drawn = [TaskDraw(tasks, seed=1)(step) for step in range(n)]
    for task, share in ((tasks["dens"], 0.3), (tasks["noisy_nodes"], 0.2), (None, 0.5)):
        assert abs(drawn.count(task) / n - share) < 4 * math.sqrt(share * (1 - share) / n)
    assert all(TaskDraw({"dens": Dens(DensSettings(prob=1.0))}, seed=1)(step) is not None for step in range(500))
    assert all(TaskDraw({"dens": Dens(DensSettings(prob=0.0))}, seed=1)(step) is None for step in range(500))


def test_streams_of_different_names_differ_and_repeat():
    assert stream(0, 0, "a").random() == stream(0, 0, "a").random()
    assert len({float(stream(0, 0, str(i)).random()) for i in range(1000)}) == 1000
