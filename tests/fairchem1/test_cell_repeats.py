"""Repeats of small cells: the same crystal, with everything it carries."""

from __future__ import annotations

import copy
import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.emt import EMT
from fairchem.core.preprocessing import AtomsToGraphs
from hypothesis import given
from hypothesis import strategies as st

from fairchem_scd.denoising.settings import CellRepeatSettings
from fairchem_scd.denoising.tasks import build_tasks
from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1.data.cell_repeats import check_outputs, draw_repeats, repeat
from fairchem_scd.testing import collate, make_trainer
from tests.support.configs import tiny_config
from tests.support.models import plain_and_denoising


def alloy(natoms=4, tags=(0, 1, 2, 1)):
    """A strained, rattled alloy with labels of EMT."""
    rng = np.random.default_rng(0)
    scaled = np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]) + 0.03 * rng.standard_normal((4, 3))
    cell = [[3.8, 0.1, 0], [0, 3.7, 0.2], [0.1, 0, 3.9]]
    atoms = Atoms("Cu3Au", scaled_positions=scaled, cell=cell, pbc=True, tags=tags)[:natoms]
    atoms.calc = EMT()
    return atoms


def row_of(atoms, **keys):
    converter = AtomsToGraphs(r_energy=True, r_forces=True, r_stress=True, r_edges=False, r_pbc=True)
    row = converter.convert(atoms)
    row.sid, row.fid, row.natoms = 3, 0, len(atoms)
    for key, value in keys.items():
        row[key] = value
    return row


@pytest.mark.parametrize("repeats", [(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 1)])
def test_a_repeated_row_is_that_of_ases_repeated_structure(repeats):
    """Labels are what EMT says of the repeated crystal itself."""
    atoms = alloy()
    found = repeat(row_of(atoms), repeats)
    larger = atoms.repeat(repeats)
    larger.calc = EMT()
    expected = row_of(larger)
    # Which atom is which, up to whole cells.
    apart = np.linalg.solve(np.array(larger.cell).T, (found.pos.numpy()[:, None] - larger.positions).reshape(-1, 3).T).T
    distance = np.abs(apart - apart.round()).max(axis=1).reshape(len(larger), -1)
    order = distance.argmin(axis=1)
    assert sorted(order) == list(range(len(larger)))
    assert distance.min(axis=1).max() < 1e-5
    for key in ("atomic_numbers", "tags", "fixed"):
        assert torch.equal(found[key], expected[key][order])
    torch.testing.assert_close(found.forces, expected.forces[order], atol=1e-4, rtol=1e-4)
    assert float(found.energy) == pytest.approx(float(expected.energy), abs=1e-4)
    torch.testing.assert_close(found.stress, expected.stress, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.cell, expected.cell)
    assert (found.natoms, found.sid, found.fid) == (len(larger), 3, 0)


def test_relaxed_positions_and_energies_go_along_and_edges_do_not():
    row = row_of(alloy())
    extra = {"pos_relaxed": row.pos + 0.1, "y_relaxed": -1.5, "edge_index": torch.zeros(2, 7), "md": torch.tensor([1])}
    original = row_of(alloy(), **extra)
    before = copy.deepcopy(original)
    found = repeat(original, (1, 1, 2))
    torch.testing.assert_close(found.pos_relaxed, found.pos + 0.1)
    assert found.y_relaxed == -3.0
    assert "edge_index" not in found
    assert int(found.md) == 1
    assert original.keys() == before.keys(), "the dataset's own row stays as it is"
    assert torch.equal(original.pos, before.pos)


def test_rows_have_the_same_keys_whatever_their_size():
    two, four = (row_of(alloy(n), magmoms=torch.ones(n), edge=torch.zeros(n)) for n in (2, 4))
    assert not {"magmoms", "edge"} & set(repeat(two, (1, 1, 1)).keys()) | {"magmoms"} & set(
        repeat(four, (1, 1, 1)).keys()
    )
    for row in (two, four):
        found = repeat(row, (2, 1, 1), {"magmoms"})
        assert "edge" not in found
        assert len(found.magmoms) == len(found.pos) == 2 * len(row.pos)


def test_the_model_sees_the_same_crystal():
    """Forces are copied, the energy grows: by the plain backbone, on a cell and on its repeat."""
    plain, _ = plain_and_denoising("equiformer_v2", {"scd": {}})
    plain.eval()
    row = row_of(alloy())
    with torch.no_grad():
        one, two = plain(collate([row])), plain(collate([repeat(row, (1, 2, 1))]))
    torch.testing.assert_close(two["energy"], 2 * one["energy"], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(two["forces"], one["forces"].repeat(2, 1), rtol=1e-2, atol=1e-5)


@given(
    natoms=st.integers(0, 40),
    periodic=st.lists(st.booleans(), min_size=3, max_size=3),
    tries=st.integers(0, 5),
    least=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_only_periodic_axes_are_repeated_within_bounds_until_there_are_atoms_enough(
    natoms, periodic, tries, least, seed
):
    settings = CellRepeatSettings(tries=tries, prob=0.7, min_atoms=least, max_atoms=64)
    repeats = draw_repeats(natoms, periodic, settings, np.random.default_rng(seed))
    count = natoms * int(np.prod(repeats))
    assert all(n == 1 for n, p in zip(repeats, periodic, strict=True) if not p)
    if any(periodic) and natoms:
        assert count >= least
        if natoms >= least:
            assert max(repeats) <= 2
            assert count <= max(64, natoms)
    else:
        assert repeats == (1, 1, 1)


def chances(natoms, axes, least, tries):
    """Probability of each set of doubled axes by the procedure of SCD's authors, each try doubling with 1 / 2.

    Too small a cell is doubled along ⌈least / natoms⌉ − 1 axes, any set of so many being as likely as any other. Then
    each try picks an axis, doubled already or not.
    """
    forced = min(math.ceil(least / natoms) - 1, len(axes))
    sets = [frozenset(chosen) for chosen in combinations(axes, forced)]
    found = {chosen: 1 / len(sets) for chosen in sets}
    for _ in range(tries):
        after = Counter()
        for chosen, chance in found.items():
            after[chosen] += chance / 2
            for axis in axes:
                after[chosen | {axis}] += chance / 2 / len(axes)
        found = after
    return found


@pytest.mark.parametrize("natoms", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("periodic", [(True, True, True), (True, False, True)])
def test_the_minimum_comes_first_and_the_tries_after_it_as_in_the_authors_code(natoms, periodic):
    settings, count = CellRepeatSettings(tries=2, prob=0.5, min_atoms=4, max_atoms=1000), 4000
    rng = np.random.default_rng(0)
    drawn = Counter(
        frozenset(axis for axis, n in enumerate(draw_repeats(natoms, periodic, settings, rng)) if n == 2)
        for _ in range(count)
    )
    expected = chances(natoms, [axis for axis in range(3) if periodic[axis]], 4, 2)
    assert set(drawn) <= set(expected)
    for doubled, chance in expected.items():
        assert abs(drawn[doubled] / count - chance) <= 5 * (chance * (1 - chance) / count) ** 0.5, set(doubled)


def test_about_half_the_tries_double_an_axis():
    settings = CellRepeatSettings(tries=1, prob=0.5, min_atoms=1, max_atoms=1000)
    rng = np.random.default_rng(0)
    doubled = [np.prod(draw_repeats(4, [True] * 3, settings, rng)) == 2 for _ in range(2000)]
    assert 0.45 < np.mean(doubled) < 0.55


def test_training_repeats_cells_anew_each_epoch_and_the_same_after_a_restart(data, tmp_path):
    block = {"scd": {}, "repeat_cells": {"tries": 2, "prob": 1.0, "max_atoms": 60}}
    config = tiny_config(data, denoising=block, optim={"batch_size": 2})
    trainer, again = (make_trainer(config, tmp_path, identifier=name) for name in "ab")
    sizes = {}
    for each in (trainer, again):
        for epoch in range(3):
            each.train_sampler.set_epoch_and_start_iteration(epoch, 0)
            for batch in each.train_loader:
                for sid, fid, natoms in zip(batch.sid, batch.fid, batch.natoms, strict=True):
                    key = (epoch, int(sid), int(fid))
                    assert sizes.setdefault(key, int(natoms)) == int(natoms)
    assert max(sizes.values()) > 20
    assert len({sizes[key] for key in sizes}) > 1
    assert any(sizes[0, sid, fid] != sizes[1, sid, fid] for epoch, sid, fid in sizes if epoch == 0)
    # The data of validation stay as they are.
    assert max(int(batch.natoms.max()) for batch in trainer.val_loader) <= 14
    trainer.train(disable_eval_tqdm=True)
    assert np.isfinite(trainer.metrics["loss"]["metric"])


def test_an_output_that_may_or_may_not_grow_is_refused():
    check_outputs({"energy": {"level": "system"}, "forces": {"level": "atom"}, "stress": {"level": "system"}})
    with pytest.raises(ConfigError, match=r"repeat_cells: it is not known how the output 'dipole'"):
        check_outputs({"dipole": {"level": "system"}})


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"repeat_cells": {"prob": 2}}, r"task\.denoising\.repeat_cells\.prob"),
        (
            {"repeat_cells": {"max_atom": 2}},
            r"task\.denoising\.repeat_cells\.max_atom: unknown key; did you mean 'max_atoms'",
        ),
        ({"drop_path": {"start": 1.0}}, r"task\.denoising\.drop_path\.start"),
        ({"drop_path": {"step": 5}}, r"task\.denoising\.drop_path\.step: unknown key; did you mean 'steps'"),
    ],
)
def test_a_wrong_key_of_the_block_itself_is_named(block, message):
    with pytest.raises(ConfigError, match=message):
        build_tasks({"scd": {}, **block})
