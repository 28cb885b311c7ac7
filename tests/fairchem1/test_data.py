"""The data: sample slabs that write themselves, MD marks, names for the nameless, ASE databases."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import signal
import threading
import time
from pathlib import Path

import ase.db
import lmdb
import numpy as np
import pytest
import torch
from ase.calculators.emt import EMT
from fairchem.core.common.registry import registry
from tqdm import tqdm

from fairchem_scd.denoising.structures import structures_of
from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1.data.emt_slabs import emt_slabs, write_emt_slabs
from fairchem_scd.fairchem1.data.md_marks import read_md_marks
from fairchem_scd.testing import make_trainer
from tests.support.configs import tiny_config

SETTINGS = {"num_structures": 12, "num_systems": 3, "seed": 0}


def rows_of(folder: Path) -> list[bytes]:
    with lmdb.open(str(folder / "data.0000.lmdb"), subdir=False, readonly=True, lock=False) as db, db.begin() as view:
        return [view.get(f"{i}".encode()) for i in range(db.stat()["entries"] - 1)]


def test_sample_rows_are_oc20s(tmp_path):
    dataset = registry.get_dataset_class("emt_slabs")({"src": str(tmp_path / "slabs"), **SETTINGS})
    assert len(dataset) == 12
    kinds = set()
    for index in range(12):
        row = dataset[index]
        n = row.natoms
        assert row.pos.shape == row.force.shape == (n, 3)
        assert row.cell.shape == (1, 3, 3)
        assert isinstance(row.y, float)
        assert row.tags.unique().tolist() == [0, 1, 2]
        fixed = row.fixed == 1
        assert fixed.any()
        assert (row.tags[fixed] == 0).all()
        assert row.pos[fixed, 2].max() < row.pos[row.tags == 1, 2].min()
        assert row.fid == index
        kinds.add(row.sid)
    assert 1 < len(kinds) <= 3


def test_labels_are_emts_and_forces_are_far_from_zero():
    forces = []
    for atoms, _, _ in emt_slabs(12, seed=0, num_systems=3):
        again = atoms.copy()
        again.calc = EMT()
        assert atoms.get_potential_energy() == again.get_potential_energy()
        forces.append(again.get_forces(apply_constraint=False))
    assert 0.3 < np.sqrt(np.mean(np.concatenate(forces) ** 2)) < 5


def same(a: list[bytes], b: list[bytes]) -> list[bool]:
    """Row by row, whether two stored rows hold the same structure and labels."""
    pairs = [(pickle.loads(x).to_dict(), pickle.loads(y).to_dict()) for x, y in zip(a, b, strict=True)]
    return [all(torch.equal(torch.as_tensor(x[k]), torch.as_tensor(y[k])) for k in x | y) for x, y in pairs]


def test_same_settings_give_the_same_rows_and_another_seed_others(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_emt_slabs(tmp_path / name, **{**SETTINGS, "seed": seed})
    assert all(same(rows_of(tmp_path / "a"), rows_of(tmp_path / "b")))
    assert not any(same(rows_of(tmp_path / "a"), rows_of(tmp_path / "c")))


def write_alone(folder: Path, settings: dict[str, int]) -> None:
    tqdm.set_lock(threading.RLock())  # not the one shared with the process this is a fork of
    write_emt_slabs(folder, **settings)


def writer(folder: Path, **settings: int) -> mp.Process:
    process = mp.get_context("fork").Process(target=write_alone, args=(folder, {**SETTINGS, **settings}), daemon=True)
    process.start()
    return process


def test_two_writers_at_once_and_one_killed_leave_whole_data(tmp_path):
    """A killed writer leaves nothing that counts; of two more, one writes and the other finds it done."""
    folder = tmp_path / "slabs"
    killed = writer(folder, num_structures=5000, num_systems=126)
    while not list(tmp_path.glob(".slabs.tmp-*/data.0000.lmdb")):
        assert killed.is_alive()
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert not folder.exists()
    both = [writer(folder), writer(folder)]
    for process in both:
        process.join(timeout=60)
        assert process.exitcode == 0
    write_emt_slabs(tmp_path / "alone", **SETTINGS)
    assert all(same(rows_of(folder), rows_of(tmp_path / "alone")))
    assert not list(tmp_path.glob(".slabs.tmp-*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 1}, "was written with seed 0 instead of 1"),
        ({"num_structures": 13}, "num_structures 12 instead of 13"),
        ({"num_structures": 0}, r"num_structures: expected a whole number of at least 1 \(got 0\)"),
        ({"num_structures": True}, "expected a whole number"),
        ({"seed": -1}, "seed: expected"),
    ],
)
def test_other_settings_for_the_same_folder_are_an_error(settings, message, tmp_path):
    write_emt_slabs(tmp_path / "slabs", **SETTINGS)
    with pytest.raises(ConfigError, match=message):
        write_emt_slabs(tmp_path / "slabs", **{**SETTINGS, **settings})


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("…")
    with pytest.raises(ConfigError, match="was not written by emt_slabs"):
        write_emt_slabs(tmp_path / "mine", **SETTINGS)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    with pytest.raises(ConfigError, match="needs src"):
        registry.get_dataset_class("emt_slabs")({})


# Names of OC20's own kind: a frame of a relaxation, of dynamics, and of a rattled structure.
LINES = [
    "/data/relaxations/bulkadsorbate/restart/random1331004.traj,258,365",
    "/data/md/adslab/random20.traj,3,100",
    "/data/rattled/random7.traj,1,2",
    "/data/relaxations/md/random9.traj,1,2",
]


def marked(folder: Path, name: str = "oc20_md_lmdb"):
    """A dataset of two LMDB files, with fewer lines than structures, in two logs."""
    folder.mkdir(parents=True)
    write_emt_slabs(folder / "source", **SETTINGS)
    rows = rows_of(folder / "source")
    for number, part in enumerate((rows[:2], rows[2:6])):
        with lmdb.open(str(folder / f"data.{number:04d}.lmdb"), subdir=False, map_size=2**24) as db:
            with db.begin(write=True) as transaction:
                for i, row in enumerate(part):
                    transaction.put(f"{i}".encode(), row)
                transaction.put(b"length", pickle.dumps(len(part)))
    (folder / "data_log.0000.txt").write_text("\n".join(LINES[:1]) + "\n")
    (folder / "data_log.0001.txt").write_text("\n".join(LINES[1:]) + "\n")
    return registry.get_dataset_class(name)({"src": str(folder)})


def test_md_marks_count_lines_through_the_sorted_logs(tmp_path):
    dataset = marked(tmp_path / "md")
    assert [int(dataset[i].md) for i in range(6)] == [0, 1, 0, 0, 0, 0]
    assert read_md_marks(tmp_path / "md").tolist() == [False, True, False, False]


def test_md_marks_follow_the_structures_into_shards(tmp_path):
    marked(tmp_path / "md")
    sharded = registry.get_dataset_class("dens_lmdb")({"src": str(tmp_path / "md"), "shard": 0, "total_shards": 2})
    other = registry.get_dataset_class("dens_lmdb")({"src": str(tmp_path / "md"), "shard": 1, "total_shards": 2})
    assert [int(sharded[i].md) for i in range(3)] == [0, 1, 0]
    assert [int(other[i].md) for i in range(3)] == [0, 0, 0]
    assert int(sharded[1].fid) == 1


def test_md_frames_are_never_corrupted_in_training(tmp_path):
    marked(tmp_path / "md")
    config = tiny_config(tmp_path, denoising={"dens": {"prob": 1.0, "corrupt_ratio": None}})
    config["dataset"]["train"].update(format="oc20_md_lmdb", src=str(tmp_path / "md"))
    config["dataset"]["val"] = {}
    trainer = make_trainer(config, tmp_path)
    trainer.model.train()
    seen = {}
    for batch in trainer.train_loader:
        fids = batch.fid.tolist()
        trainer._forward(batch)
        seen.update(zip(fids, trainer._step.corruption.corrupted.tolist(), strict=True))
    assert seen == {fid: fid != 1 for fid in range(6)}


def test_logs_that_do_not_tell_are_refused(tmp_path):
    """The host's own preprocessing writes such lines; taken as relaxations, MD frames would be corrupted unseen."""
    (tmp_path / "data_log.0000.txt").write_text("random123,frame4\nrandom7,frame1\n")
    with pytest.raises(ConfigError, match="none of their 2 lines names 'relaxations' or 'md'"):
        read_md_marks(tmp_path)


def test_a_folder_without_logs_says_so(tmp_path):
    write_emt_slabs(tmp_path / "slabs", **SETTINGS)
    with pytest.raises(ConfigError, match=r"no \*.txt files"):
        registry.get_dataset_class("oc20_md_lmdb")({"src": str(tmp_path / "slabs")})


def test_structures_without_a_name_are_known_by_their_place(tmp_path):
    """The place in the data, not in the host's shuffled subset of it."""
    write_emt_slabs(tmp_path / "slabs", **SETTINGS)
    (tmp_path / "nameless").mkdir()
    with lmdb.open(str(tmp_path / "nameless" / "data.lmdb"), subdir=False, map_size=2**24) as db:
        with db.begin(write=True) as transaction:
            for i, content in enumerate(rows_of(tmp_path / "slabs")):
                row = pickle.loads(content)
                del row.sid, row.fid
                row.place = i
                transaction.put(f"{i}".encode(), pickle.dumps(row))
    config = tiny_config(tmp_path)
    config["dataset"]["train"].update(format="lmdb", src=str(tmp_path / "nameless"))
    config["dataset"]["val"] = {}
    trainer = make_trainer(config, tmp_path)
    for batch in trainer.train_loader:
        assert structures_of(batch).ids == [str(place) for place in batch.place.tolist()]
    trainer.train(disable_eval_tqdm=True)


@pytest.fixture
def database(tmp_path):
    """An ASE database of labelled slabs."""
    path = tmp_path / "slabs.db"
    with ase.db.connect(path) as db:
        for atoms, _, _ in emt_slabs(6, seed=0, num_systems=2):
            atoms.get_forces()
            db.write(atoms)
    return path


def ase_config(folder: Path, database: Path, **a2g: bool):
    config = tiny_config(folder)
    transforms = config["dataset"]["train"]["transforms"]
    config["dataset"] = {
        "train": {"format": "ase_db", "src": str(database), "a2g_args": a2g, "transforms": transforms},
        "val": {"src": str(database)},
    }
    return config


def test_ase_databases_train_through_the_hosts_loader(database, tmp_path):
    trainer = make_trainer(ase_config(tmp_path, database, r_energy=True, r_forces=True), tmp_path)
    trainer.train(disable_eval_tqdm=True)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    ids = [name for batch in trainer.train_loader for name in structures_of(batch).ids]
    assert len(set(ids)) == 6


def test_a_database_read_without_forces_is_told_how_to(database, tmp_path):
    with pytest.raises(ConfigError, match=r"dens needs the label 'forces'.*a2g_args\.r_forces: true"):
        make_trainer(ase_config(tmp_path, database, r_energy=True), tmp_path)
