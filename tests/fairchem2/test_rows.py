"""Rows of data that cannot be trained on: named; the run stops, or leaves them out."""

from __future__ import annotations

import pickle
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator

from fairchem_scd.errors import ConfigError, DataError
from fairchem_scd.fairchem2.rows import Guarded, check_row
from tests.fairchem2.support import UNIT, broken, crystal, crystals, database, model_config, row, run, run_config, write

TASKS = [type("T", (), {"name": name, "datasets": ["mo"]}) for name in ("energy", "forces")]


class Rows(list):
    """Rows of which some cannot be read."""

    def __getitem__(self, index):
        if (row := super().__getitem__(index)) is None:
            raise OSError("damaged")
        return row


def with_label(atoms, **labels):
    """The structure with other labels."""
    atoms.calc = SinglePointCalculator(atoms, **{**atoms.calc.results, **labels})
    return atoms


def folder_with(tmp_path, train=None, val=None):
    write(tmp_path, "train", train or crystals(6))
    write(tmp_path, "val", val or crystals(4, 100))
    return tmp_path


BAD = {
    "a position": (
        lambda data: data.pos.index_put_((torch.tensor(1), torch.tensor(0)), torch.tensor(torch.nan)),
        "pos",
    ),
    "a cell": (lambda data: data.cell.fill_(torch.inf), "cell is not finite"),
    "a label": (
        lambda data: data.forces.index_put_((torch.tensor(2),), torch.tensor(torch.nan)),
        "label 'forces' is not",
    ),
    "a missing label": (lambda data: data.__keys__.discard("energy"), "no label 'energy'"),
    "two atoms on one spot": (
        lambda data: data.pos.index_copy_(0, torch.tensor([3]), data.pos[1:2].clone()),
        "atoms 1 and 3 are",
    ),
    "an element": (lambda data: data.atomic_numbers.fill_(101), r"element 101 \(Md\) is beyond the model's table"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD)
def test_a_bad_row_is_named_with_what_is_wrong_with_it(spoil, message):
    good, bad = row(crystal(0)), row(crystal(1))
    check_row(good, TASKS, 100)
    spoil(bad)
    with pytest.raises(DataError, match=message):
        check_row(bad, TASKS, 100)


@pytest.mark.parametrize(("pbc", "always", "same"), [(True, False, True), (False, False, False), (False, True, True)])
def test_images_of_atoms_are_on_the_same_spot_where_the_model_repeats_the_structure(pbc, always, same):
    data = row(crystal(0))
    data.pbc[:] = pbc
    data.pos[2] = data.pos[0] + data.cell[0, 1] - data.cell[0, 2]
    with pytest.raises(DataError, match=r"^atoms 0 and 2 are on the same spot$") if same else nullcontext():
        check_row(data, TASKS, 100, always_periodic=always)


def test_an_infinite_label_is_one_that_is_missing_as_it_is_to_the_host():
    data = row(crystal(0))
    data.energy.fill_(torch.inf)
    check_row(data, TASKS, 100)


def test_the_next_good_row_takes_the_place_of_bad_ones_and_says_so():
    rows = Rows([row(crystal(i)) for i in range(4)])
    rows[1].energy.fill_(torch.nan)
    list.__setitem__(rows, 2, None)
    guarded = Guarded(rows, "mo.train", lambda data: check_row(data, TASKS, 100))
    assert guarded[0].bad_data == ""
    assert torch.equal(guarded[1].pos, rows[3].pos)
    first, second = guarded[1].bad_data.splitlines()
    assert first == "mo.train, row 1: label 'energy' is not a number: [nan]"
    assert second.startswith("mo.train, row 2: cannot be read: OSError: damaged")
    copied = pickle.loads(pickle.dumps(Guarded(Rows(list(rows)[:1]), "mo.train", check_row)))
    assert len(copied) == 1
    with pytest.raises(DataError, match=r"2 rows one after the other .*; the first: mo\.train, row 0"):
        Guarded(Rows(list(rows)[1:3]), "mo.train", lambda data: check_row(data, TASKS, 100))[0]
    with pytest.raises(DataError, match=r"all 2 rows sampled cannot be trained on; the first: mo\.train, row 0"):
        Guarded(Rows(list(rows)[1:3]), "mo.train", lambda data: check_row(data, TASKS, 100)).keep_spare()


def test_too_many_bad_rows_leave_word_with_a_row_that_was_good_before():
    """For an error in the loader of one rank would leave the other ranks waiting."""
    rows = Rows([row(atoms) for atoms in crystals(3)])
    guarded = Guarded(rows, "mo.train", partial(check_row, host_tasks=(), max_num_elements=100))
    guarded.keep_spare()
    assert guarded[1].no_good_row == ""
    rows[:] = [None] * 3
    given = pickle.loads(pickle.dumps(guarded))[1]
    assert given.no_good_row.startswith("3 rows one after the other cannot be trained on; the first: mo.train, row 1")
    assert torch.equal(given.pos, row(crystals(3)[2]).pos), "three structures of 4, 8 and 4 atoms"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_cannot_be_read_ends_the_run_with_its_number_or_is_left_out(tmp_path, workers):
    folder = folder_with(tmp_path)
    broken(database(folder, "train"), 4)
    for name, block in {"stop": {"scd": {}}, "skip": {"scd": {}, "on_bad_data": "skip"}}.items():
        config = run_config(folder, denoising=block, steps=3, checkpoint_every=None)
        config["runner"]["train_dataloader"]["num_workers"] = workers
        if name == "stop":
            with pytest.raises(DataError, match=r"mo\.train, row 3: cannot be read.*on_bad_data: skip"):
                run(config, name)
            continue
        finished = run(config, name)
        assert any("left out: mo.train, row 3: cannot be read" in str(line) for line in finished.lines)
        assert any("1 times a bad row was left out" in str(line) for line in finished.lines)


def test_a_bad_row_of_the_validation_data_ends_the_run_too(tmp_path):
    bad = with_label(crystal(101), energy=np.nan)
    folder = folder_with(tmp_path, val=[crystal(100), bad])
    config = run_config(folder, denoising={"scd": {}}, steps=3, checkpoint_every=None, evaluate_every=1)
    with pytest.raises(
        DataError, match=r"mo\.val, row 1: label 'energy' .* runner\.train_eval_unit\.denoising\.on_bad"
    ):
        run(config, "val")


def test_data_of_which_nothing_may_move_ends_the_run_before_training(tmp_path):
    train = crystals(3)
    for atoms in train:
        atoms.constraints[0].index = np.arange(len(atoms))
    config = run_config(folder_with(tmp_path, train), denoising={"scd": {}}, checkpoint_every=None)
    with pytest.raises(ConfigError, match=r"runner\.train_eval_unit\.denoising\.scd: every atom of the 3 structures"):
        run(config, "fixed")


def test_pre_training_with_the_collater_for_tasks_is_told_which_one_to_use(tmp_path):
    config = run_config(folder_with(tmp_path), tasks=[], model=model_config(heads={}), denoising={"scd": {}})
    for split in ("train", "eval"):
        config["runner"][f"{split}_dataloader"]["collate_fn"] = {"_target_": f"{UNIT}.mt_collater_adapter", "tasks": []}
    with pytest.raises(ConfigError, match=r"use \{_target_: fairchem\.core\.datasets\.collaters\.simple_collater"):
        run(config, "collater")
