"""DeNS on plain structures: what it corrupts, what it tells the model, what it trains."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fairchem_scd.denoising.settings import DensSettings
from fairchem_scd.denoising.tasks import Dens
from fairchem_scd.errors import ConfigError
from tests.denoising.support import structures


def dens(**settings):
    return Dens(DensSettings(**settings))


# --- the noise --------------------------------------------------------------------------------------------------------


def test_what_did_not_move_is_not_in_the_mask():
    """Fixed atoms neither move nor count as corrupted, unlike in the authors' code."""
    fixed = torch.tensor([True, False] * 20)
    task = Dens(DensSettings(corrupt_ratio=None))
    corruption = task.corrupt(structures([20, 20], fixed=fixed), seed=0, step=1)
    assert torch.equal(corruption.mask, ~fixed)
    assert torch.equal((corruption.noise != 0).any(dim=1), corruption.mask)
    everything = Dens(DensSettings(corrupt_ratio=None, all_atoms=True))
    assert everything.corrupt(structures([20, 20], fixed=fixed), seed=0, step=1).mask.all()


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


def test_strict_max_ratio_counts_fixed_atoms_too_as_equiformer_v3_does():
    """The share that was drawn among all atoms decides. What moves are the free ones of these."""
    natoms, count = 4, 500
    fixed = torch.tensor([True, True, False, False] * count)
    drawn = dens(corrupt_ratio=0.5, all_atoms=True).corrupt(structures([natoms] * count), seed=0, step=1)
    strict = dens(corrupt_ratio=0.5, strict_max_ratio=0.75).corrupt(
        structures([natoms] * count, fixed=fixed), seed=0, step=1
    )
    too_many = drawn.mask.view(count, natoms).sum(dim=1) > 0.75 * natoms
    expected = drawn.mask.view(count, natoms) & ~fixed.view(count, natoms) & ~too_many[:, None]
    assert too_many.any()
    assert torch.equal(strict.mask.view(count, natoms), expected)


def test_strict_max_ratio_where_every_atom_is_drawn_would_leave_nothing_and_is_refused():
    names = {"energy", "forces"}
    with pytest.raises(ConfigError, match=r"dens\.strict_max_ratio: with corrupt_ratio: null every atom is drawn"):
        dens(corrupt_ratio=None, strict_max_ratio=0.75).check(names, names)
    dens(corrupt_ratio=None, strict_max_ratio=1.0).check(names, names)


# --- what the model is told -------------------------------------------------------------------------------------------


def test_one_pass_sees_the_corrupted_structure_and_the_forces_of_the_original():
    batch = structures([6, 9], forces=torch.randn(15, 3))
    task = dens()
    corruption = task.corrupt(batch, seed=0, step=1)
    (only,) = task.passes(batch, corruption, seed=0, step=1)
    assert torch.equal(only.pos, batch.pos + corruption.noise)
    forces, mask, sigma = only.encoding
    assert torch.equal(forces, batch.forces)
    assert torch.equal(mask, corruption.mask)
    assert sigma.tolist() == pytest.approx([0.1] * 15)
    assert only.outputs
    assert only.noise
    assert not only.embed
    assert only.conditioned is None
    assert only.subset is None


def test_sigma_is_told_per_atom_and_is_zero_in_a_structure_left_alone():
    batch = structures([4, 20, 3], md=torch.tensor([False, True, False]))
    task = dens(num_steps=3, std_low=0.01, std_high=0.1, sigma_encoding=True, corrupt_ratio=None)
    corruption = task.corrupt(batch, seed=0, step=1)
    (only,) = task.passes(batch, corruption, seed=0, step=1)
    first, second, third = only.encoding[2].split([4, 20, 3])
    assert not second.any()
    assert set(first.tolist()) == {float(corruption.sigma[0])}
    assert set(third.tolist()) == {float(corruption.sigma[2])}


@pytest.mark.parametrize(
    ("settings", "heard"),
    [
        ({}, True),
        ({"force_encoding": False}, False),
        ({"force_encoding": False, "sigma_encoding": True, "num_steps": 2, "std_low": 0.1, "std_high": 0.2}, True),
    ],
)
def test_without_either_encoding_nothing_is_told(settings, heard):
    batch, task = structures([5]), dens(**settings)
    (only,) = task.passes(batch, task.corrupt(batch, seed=0, step=1), seed=0, step=1)
    assert (only.encoding is not None) == heard == task.conditions_on_forces


def test_data_without_the_labels_it_needs_is_one_clear_error():
    batch, task = structures([5], forces=None), dens()
    corruption = task.corrupt(batch, seed=0, step=1)
    with pytest.raises(ConfigError, match=r"task\.denoising\.dens needs 'forces', which the data does not have"):
        task.passes(batch, corruption, seed=0, step=1)
    with pytest.raises(ConfigError, match="needs 'forces'"):
        dens(max_force_norm=1.0).corrupt(batch, seed=0, step=1)
    with pytest.raises(ConfigError, match="needs 'stress'"):
        dens(max_stress_norm=1.0).corrupt(structures([5]), seed=0, step=1)
    assert dens().labels == {"forces"}
    assert dens(max_stress_norm=1.0).labels == {"forces", "stress"}


# --- what is trained --------------------------------------------------------------------------------------------------


def test_noise_takes_the_place_of_forces_and_its_unit_is_sigma():
    objective = dens(std=0.15, coefficient=25).objective(0.3)
    assert (objective.coefficient, objective.scale, objective.loss, objective.clean) == (25, 0.15, None, False)
    assert objective.outputs == {"energy"}
    assert dens(train_outputs=()).objective(0).outputs == frozenset()
    assert dens(num_steps=3, std_low=0.01, std_high=0.3).objective(0).scale == 0.3


def test_the_coefficient_falls_linearly_to_a_share_of_itself():
    task = dens(coefficient=20, coefficient_decay=0.25)
    assert [task.objective(progress).coefficient for progress in (0, 0.5, 1)] == [20, 12.5, 5]


@pytest.mark.parametrize(
    ("outputs", "trained", "message"),
    [
        (("energy",), ("energy",), "outputs: no 'forces'"),
        (("energy", "forces"), ("energy",), "loss_functions: no 'forces'"),
        (("forces",), ("forces",), r"train_outputs: 'energy' is not an output; outputs: $"),
    ],
)
def test_outputs_it_cannot_train_are_refused(outputs, trained, message):
    with pytest.raises(ConfigError, match=message):
        dens(train_outputs=("energy",)).check(outputs, trained)


def test_its_default_outputs_need_not_all_be_there():
    dens().check(("forces",), ("forces",))
