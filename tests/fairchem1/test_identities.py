"""No two rows of a data set have the same noise, however they are named and wherever they are read."""

from __future__ import annotations

import logging
import pickle
import re

import ase.db
import lmdb
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator

from fairchem_scd.commands.embed.judgement import judge
from fairchem_scd.denoising.structures import structures_of
from fairchem_scd.fairchem1.data.emt_slabs import emt_slabs, write_emt_slabs
from fairchem_scd.fairchem1.data.split import load_split
from fairchem_scd.testing import make_trainer, on_ranks, stirred
from tests.support.configs import pretraining, tiny_config
from tests.support.models import edge_frames_without_chance

ROWS = 12
DENOISING = {"dens": {"prob": 1.0}}


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """An ASE database of two systems' frames: sid is the system, as if each were a trajectory, and all fid are 0."""
    path = tmp_path_factory.mktemp("frames") / "frames.db"
    with ase.db.connect(path) as db:
        for atoms, sid, _ in emt_slabs(ROWS, seed=0, num_systems=2):
            results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(apply_constraint=False)}
            atoms.calc = SinglePointCalculator(atoms, **results)
            db.write(atoms, data={"sid": f"trajectory {sid}"})
    return path


def ase_config(folder, database, make=tiny_config, **optim):
    config = make(folder, denoising={**DENOISING} if make is tiny_config else None, optim=optim)
    transforms = config["dataset"]["train"]["transforms"]
    a2g = {"r_energy": True, "r_forces": True}
    config["dataset"] = {
        "train": {"format": "ase_db", "src": str(database), "a2g_args": a2g, "transforms": transforms},
        "val": {"src": str(database)},
    }
    return config


def noise_of_rows(trainer, loader, step=7):
    """The noise of a step on each row, by number, as one tensor each."""
    found = {}
    trainer.model.train()
    trainer.step = step
    for batch in loader:
        noise = trainer._begin(batch).corruption.noise.split(batch.natoms.tolist())
        assert not set(batch.row_number.tolist()) & found.keys()
        found.update(zip(batch.row_number.tolist(), noise, strict=True))
    return found


def assert_same_noise(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[row], expected[row]) for row in expected)


def test_frames_of_one_trajectory_get_masks_and_noise_of_their_own(frames, tmp_path):
    trainer = make_trainer(ase_config(tmp_path, frames, batch_size=ROWS), tmp_path)
    (batch,) = trainer.train_loader
    structures = structures_of(batch)
    assert sorted(set(batch.sid)) == ["trajectory 0", "trajectory 125"]
    assert len(set(structures.ids)) == ROWS
    noise = noise_of_rows(trainer, [batch])
    masks = {tuple((of != 0).any(dim=1).tolist()) for of in noise.values()}
    assert len({tuple(of.flatten().tolist()) for of in noise.values()}) == len(masks) == ROWS


def test_the_noise_of_a_row_depends_on_neither_batch_nor_worker_nor_start(frames, tmp_path):
    expected = noise_of_rows(first := make_trainer(ase_config(tmp_path, frames), tmp_path), first.train_loader)
    assert sorted(expected) == list(range(ROWS))
    first.train_sampler.sampler.set_epoch(1)
    assert_same_noise(noise_of_rows(first, first.train_loader), expected)
    others = ase_config(tmp_path, frames, batch_size=3, num_workers=2)
    second = make_trainer(others, tmp_path, identifier="second")
    assert_same_noise(noise_of_rows(second, second.train_loader), expected)


def test_two_ranks_draw_the_noise_of_one(frames, tmp_path):
    def one(rank):
        trainer = make_trainer(ase_config(tmp_path, frames, batch_size=2), tmp_path, identifier=f"rank{rank}")
        return noise_of_rows(trainer, trainer.train_loader)

    both = on_ranks(2, tmp_path / "ranks", one)
    assert not both[0].keys() & both[1].keys()
    assert_same_noise({**both[0], **both[1]}, one(2))


def test_the_noise_of_validation_is_told_apart_too(frames, tmp_path):
    trainer = make_trainer(ase_config(tmp_path, frames, pretraining, eval_batch_size=ROWS), tmp_path)
    (batch,) = trainer.val_loader
    trainer.model.eval()
    with trainer.validating():
        noise = trainer._begin(batch).corruption.noise.split(batch.natoms.tolist())
    assert len({tuple(of.flatten().tolist()) for of in noise}) == ROWS


@pytest.mark.parametrize("make", [tiny_config, pretraining])
def test_a_condition_is_judged_on_the_noise_of_each_row_in_validation_and_afterwards_alike(make, frames, tmp_path):
    config = ase_config(tmp_path, frames, make, eval_batch_size=ROWS)
    config["task"]["denoising"] = {"scd": {"judge_condition": True}}
    with edge_frames_without_chance():
        trainer = make_trainer(config, tmp_path)
        trainer.ema = None
        stirred(trainer._unwrapped_model)
        metrics = trainer.validate(disable_tqdm=True)
        saved = torch.load(trainer.save(checkpoint_file="checkpoint.pt", training_state=True), weights_only=False)
        for batch_size in (5, ROWS):
            report, _ = judge(saved, load_split(config, "val"), batch_size=batch_size)
            for name, value in report.metrics().items():
                assert value == pytest.approx(metrics[name]["metric"], rel=1e-4, abs=1e-6), name


def test_frames_that_share_a_name_are_repeated_each_by_itself(frames, tmp_path):
    config = ase_config(tmp_path, frames, batch_size=ROWS)
    config["task"]["denoising"]["repeat_cells"] = {"tries": 2, "prob": 0.5, "max_atoms": 1000}
    (batch,) = make_trainer(config, tmp_path).train_loader
    cells = {}
    for sid, cell in zip(batch.sid, batch.cell.tolist(), strict=True):
        cells.setdefault(sid, []).append(cell)
    assert all(any(cell != of[0] for cell in of) for of in cells.values()), cells


@pytest.mark.parametrize(("make", "splits"), [(tiny_config, ["train"]), (pretraining, ["train", "val"])])
def test_a_name_that_repeats_is_said_once_for_each_split_that_is_corrupted(make, splits, frames, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    make_trainer(ase_config(tmp_path, frames, make), tmp_path)
    said = [record.message for record in caplog.records if "have the same name" in record.message]
    assert [
        re.match(r"dataset\.(\w+): rows \d+ and \d+ have.*\(sid/fid trajectory \d+/0\)", text)[1] for text in said
    ] == splits


def lmdb_config(folder, change):
    """A config over sample rows whose names were changed, in an LMDB."""
    write_emt_slabs(folder / "slabs", num_structures=ROWS, num_systems=3, seed=0)
    (folder / "changed").mkdir()
    with (
        lmdb.open(str(folder / "slabs" / "data.0000.lmdb"), subdir=False, readonly=True, lock=False) as source,
        source.begin() as view,
        lmdb.open(str(folder / "changed" / "data.lmdb"), subdir=False, map_size=2**24) as target,
        target.begin(write=True) as transaction,
    ):
        for i in range(ROWS):
            row = pickle.loads(view.get(f"{i}".encode()))
            change(row, i)
            transaction.put(f"{i}".encode(), pickle.dumps(row))
    config = tiny_config(folder, denoising=DENOISING, optim={"batch_size": ROWS})
    config["dataset"]["train"].update(format="lmdb", src=str(folder / "changed"))
    config["dataset"]["val"] = {}
    return config


def sid_alone(row, i):
    row.sid = i // 3  # neighbours share it
    del row.fid


def test_rows_of_an_lmdb_that_share_names_are_told_apart_by_their_numbers(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    (batch,) = make_trainer(lmdb_config(tmp_path, sid_alone), tmp_path).train_loader
    numbers = batch.row_number.tolist()
    assert structures_of(batch).ids == [f"{number // 3}/{number}" for number in numbers]
    assert any("dataset.train: rows 0 and 1 have the same name (sid/fid 0)" in r.message for r in caplog.records)


def test_names_that_are_unique_stay_the_keys_of_the_noise(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    (batch,) = make_trainer(lmdb_config(tmp_path, lambda row, i: None), tmp_path).train_loader
    expected = [f"{sid}/{fid}" for sid, fid in zip(batch.sid.tolist(), batch.fid.tolist(), strict=True)]
    assert structures_of(batch).ids == expected
    assert not any("have the same name" in record.message for record in caplog.records)


@pytest.mark.parametrize("change", [None, sid_alone])
def test_a_row_and_its_stand_in_get_noise_of_their_own(change, tmp_path):
    def spoilt(row, i):
        if change is not None:
            change(row, i)
        if i == 5:
            row.force[0] = float("nan")

    config = lmdb_config(tmp_path, spoilt)
    config["task"]["denoising"] = {**DENOISING, "on_bad_data": "skip"}
    trainer = make_trainer(config, tmp_path)
    (batch,) = trainer.train_loader
    ids = structures_of(batch).ids
    assert len(set(ids)) == ROWS
    (stand_in,) = (i for i, name in enumerate(ids) if name.endswith(" for row 5"))
    (original,) = (i for i, name in enumerate(ids) if name == ids[stand_in].removesuffix(" for row 5"))
    parts = batch.pos.split(batch.natoms.tolist())
    assert torch.equal(parts[stand_in], parts[original])
    trainer.model.train()
    noise = trainer._begin(batch).corruption.noise.split(batch.natoms.tolist())
    assert not torch.equal(noise[stand_in], noise[original])
