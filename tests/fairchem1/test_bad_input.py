"""Bad input ends in one clear message, before training wherever the config or a sample of the data tells."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import lmdb
import pytest
import torch
from fairchem.core.common.registry import registry
from fairchem.core.models.equiformer_v2.equiformer_v2 import EquiformerV2Backbone

from fairchem_scd.errors import ConfigError, DataError
from fairchem_scd.fairchem1.data.distances import nearest_images
from fairchem_scd.fairchem1.data.emt_slabs import write_emt_slabs
from fairchem_scd.fairchem1.data.rows import check_periodicity
from fairchem_scd.fairchem1.data.sources import check_whole
from fairchem_scd.testing import make_trainer, slabs
from tests.support.claims import PaiNN
from tests.support.configs import tiny_config


@cache
def sample() -> list[bytes]:
    """Eight rows of sample data as they are stored."""
    with TemporaryDirectory() as folder:
        write_emt_slabs(Path(folder) / "source", num_structures=8, num_systems=2, seed=0)
        path = f"{folder}/source/data.0000.lmdb"
        with lmdb.open(path, subdir=False, readonly=True, lock=False) as source, source.begin() as view:
            return [view.get(f"{i}".encode()) for i in range(8)]


def rewritten(folder, change):
    """Sample data with every row changed; returns the folder."""
    target = folder / "changed"
    target.mkdir(parents=True)
    with lmdb.open(str(target / "data.lmdb"), subdir=False, map_size=2**24) as db, db.begin(write=True) as transaction:
        for i, stored in enumerate(sample()):
            row = pickle.loads(stored)
            change(i, row)
            transaction.put(f"{i}".encode(), pickle.dumps(row))
    return target


def config_on(tmp_path, source, **dens):
    config = tiny_config(tmp_path, denoising={"dens": {"prob": 1.0, **dens}})
    config["dataset"]["train"].update(format="lmdb", src=str(source))
    config["dataset"]["val"] = {}
    return config


@registry.register_model("strange_backbone")
class StrangeBackbone(EquiformerV2Backbone):
    """One that this package does not know."""


def set_fixed(i, row):
    row.fixed[:] = 1


def drop_forces(i, row):
    del row.force


def drop_fixed(i, row):
    del row.fixed


def heavy_atom(i, row):
    if i == 5:
        row.atomic_numbers[3] = 95


def nan_force(i, row):
    if i == 2:
        row.force[4, 1] = float("nan")


def infinite_position(i, row):
    if i == 7:
        row.pos[0, 0] = float("inf")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (set_fixed, ConfigError, r"dens: every atom of the 8 structures .* is fixed.*all_atoms: true"),
        (drop_forces, ConfigError, r"dens needs the label 'forces'.*its keys: .*key_mapping"),
        (drop_fixed, ConfigError, r"does not say which atoms are fixed"),
        (
            heavy_atom,
            DataError,
            r"structure sid/fid \d+/5: element 95 \(Am\) is beyond.*ends at 89 \(Ac\); .*num_elements",
        ),
        (nan_force, DataError, r"structure sid/fid \d+/2: forces of an atom is not finite: \[.*nan.*\]"),
        (infinite_position, DataError, r"structure sid/fid \d+/7: pos of an atom is not finite"),
    ],
)
def test_a_sample_of_the_data_tells_before_the_first_step(change, error, message, tmp_path):
    with pytest.raises(error, match=message):
        make_trainer(config_on(tmp_path, rewritten(tmp_path, change)), tmp_path)


@pytest.mark.parametrize("change", [heavy_atom, nan_force, infinite_position])
def test_a_row_the_sample_missed_is_named_when_it_comes(change, tmp_path, monkeypatch):
    monkeypatch.setattr("fairchem_scd.fairchem1.data.guarded._SAMPLE", 2)
    source = rewritten(tmp_path, lambda i, row: change(i, row) if i not in (0, 7) else None)
    if change is infinite_position:
        source = rewritten(tmp_path / "other", lambda i, row: row.pos.fill_(float("inf")) if i == 3 else None)
    trainer = make_trainer(config_on(tmp_path, source), tmp_path)
    with pytest.raises(DataError, match=r"structure sid/fid \d+/[235]:"):
        trainer.train(disable_eval_tqdm=True)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


# --- rows: what counts as bad, and what the setting does ------------------------------------------------------------


def nan_position(row):
    row.pos[0, 2] = float("nan")


def infinite_force(row):
    row.force[1, 0] = float("-inf")


def nan_energy(row):
    row.y = float("nan")


def same_spot(row):
    row.pos[3] = row.pos[7] + 0.001


def no_atoms(row):
    for key in ("pos", "force", "atomic_numbers", "tags", "fixed"):
        row[key] = row[key][:0]
    row.natoms = 0


BAD = {
    "NaN force": (lambda row: nan_force(2, row), "forces of an atom is not finite"),
    "infinite force": (infinite_force, "forces of an atom is not finite"),
    "NaN position": (nan_position, "pos of an atom is not finite"),
    "NaN energy": (nan_energy, "energy is not finite"),
    "two atoms on one spot": (same_spot, "atoms 3 and 7 are on the same spot"),
    "no atoms": (no_atoms, "a structure without atoms"),
    "no pickle": (None, "cannot be read: UnpicklingError"),
}


def with_a_bad_row(folder, kind):
    """Sample data of eight rows, one of a kind of BAD where the sample before training misses it."""
    change = BAD[kind][0]
    source = rewritten(folder, lambda i, row: change(row) if i == 3 and change else None)
    if change is None:
        with lmdb.open(str(source / "data.lmdb"), subdir=False) as db, db.begin(write=True) as transaction:
            transaction.put(b"3", b"no pickle")
    return source


def small(config):
    config["model"]["backbone"].update(num_layers=1, lmax_list=[1], mmax_list=[1], num_distance_basis=16)
    return config


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_stops_the_run_with_its_name_before_the_weights_are_touched(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("fairchem_scd.fairchem1.data.guarded._SAMPLE", 2)
    config = small(config_on(tmp_path, with_a_bad_row(tmp_path, kind)))
    config["optim"]["batch_size"] = 8
    trainer = make_trainer(config, tmp_path)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    with pytest.raises(DataError, match=rf"dataset\.train, row 3: .*{BAD[kind][1]}.*on_bad_data: skip"):
        trainer.train(disable_eval_tqdm=True)
    assert trainer.step == 1
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_left_out_and_counted_at_the_end(kind, tmp_path, caplog):
    config = small(config_on(tmp_path, with_a_bad_row(tmp_path, kind)))
    config["task"]["denoising"]["on_bad_data"] = "skip"
    trainer = make_trainer(config, tmp_path)
    trainer.train(disable_eval_tqdm=True)
    assert trainer.step == 2
    assert re.search(rf"left out: dataset\.train, row 3: .*{BAD[kind][1]}", caplog.text)
    assert "1 times a bad row was left out, and the next good one stood in for it" in caplog.text
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())


def one_atom(row):
    for key in ("pos", "force", "atomic_numbers", "tags", "fixed"):
        row[key] = row[key][-1:]
    row.natoms = 1


def apart(row):
    row.cell = row.cell * 20
    row.pos = row.pos * 20


@pytest.mark.parametrize("change", [lambda row: row.fixed.fill_(1), one_atom, apart], ids=["fixed", "atom", "apart"])
@pytest.mark.parametrize("setting", ["stop", "skip"])
def test_no_free_atom_one_atom_and_no_neighbour_are_not_bad(setting, change, tmp_path, caplog):
    """They train what they have: energy, and forces where atoms are free. What cannot be denoised is counted."""
    source = rewritten(tmp_path, lambda i, row: change(row) if i in (2, 5) else None)
    config = small(config_on(tmp_path, source))
    config["task"]["denoising"] = {"scd": {}, "on_bad_data": setting}
    trainer = make_trainer(config, tmp_path)
    trainer.train(disable_eval_tqdm=True)
    assert trainer.step == 2
    assert "bad row" not in caplog.text
    assert ("2 structures had nothing to denoise" in caplog.text) == (change is not apart)
    assert "not finite" not in caplog.text
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())


@pytest.mark.parametrize("name", ["equiformer_v2", "escn"])
@pytest.mark.parametrize("denoising", [{"dens": {"prob": 0.0}}, {"scd": {}}], ids=["ordinary", "scd"])
def test_a_batch_without_any_neighbours_names_its_structures(denoising, name, tmp_path):
    source = rewritten(tmp_path, lambda i, row: apart(row))
    config = config_on(tmp_path, source)
    config["model"] = tiny_config(tmp_path, name)["model"]
    config["task"]["denoising"] = denoising
    trainer = make_trainer(config, tmp_path)
    with pytest.raises(DataError, match=r"structure sid/fid \d+/\d, .*: no atom has a neighbour .*4\); .*batch_size"):
        trainer.train(disable_eval_tqdm=True)


def test_parts_without_any_neighbours_name_their_structures(data, tmp_path):
    """The batch as a whole has edges."""
    config = tiny_config(data, denoising={"scd": {"embed_tags": [0, 1], "denoise_tags": [2]}})
    config["model"]["backbone"]["max_radius"] = 0.9  # within it only an adsorbate's atoms
    trainer = make_trainer(config, tmp_path)
    with pytest.raises(DataError, match=r"structure sid/fid \d+/\d.*: no atom has a neighbour"):
        trainer.train(disable_eval_tqdm=True)


# --- backbones that run no structure without neighbours --------------------------------------------------------------


def painn(tmp_path, change, denoising):
    """A run on PaiNN whose rows 2 and 5 are changed."""
    config = config_on(tmp_path, rewritten(tmp_path, lambda i, row: change(row) if i in (2, 5) else None))
    config["model"] = {"name": "hydra", "otf_graph": True, **PaiNN().arguments()}
    config["task"]["denoising"] = denoising
    return config


def test_a_lone_structure_is_bad_data_where_the_host_runs_none(tmp_path, caplog):
    for setting in ("stop", "skip"):
        folder = tmp_path / setting
        folder.mkdir()
        config = painn(folder, apart, {"scd": {}, "on_bad_data": setting})
        if setting == "stop":
            with pytest.raises(
                DataError, match=r"row 2: no atom has a neighbour.*painn_backbone runs no structure without"
            ):
                make_trainer(config, folder)
            continue
        trainer = make_trainer(config, folder)
        trainer.train(disable_eval_tqdm=True)
        assert trainer.step == 2
        assert re.search(r"\d times a bad row was left out", caplog.text)


def test_a_lone_part_is_named_where_the_host_runs_none(tmp_path):
    def spread(row):
        distance = nearest_images(row)
        row.tags.fill_(1)
        row.tags[list(divmod(int(distance.nan_to_num(posinf=0).argmax()), len(distance)))] = 2

    config = painn(tmp_path, spread, {"scd": {"embed_tags": [1], "denoise_tags": [2], "all_atoms": True}})
    config["model"]["backbone"]["cutoff"] = 3.2
    trainer = make_trainer(config, tmp_path)
    with pytest.raises(DataError, match=r"^structure sid/fid \d+/\d: no atom.*runs no structure without any"):
        trainer.train(disable_eval_tqdm=True)


def test_an_element_beyond_the_table_names_the_key_of_the_backbone(tmp_path):
    config = painn(tmp_path, lambda row: None, {"scd": {}})
    config["model"]["backbone"]["num_elements"] = 10
    with pytest.raises(DataError, match=r"is beyond.*ends at 10 \(Ne\); raise model\.backbone\.num_elements"):
        make_trainer(config, tmp_path)


def test_periodic_and_other_structures_in_one_data_set_are_refused(tmp_path):
    rows = slabs(3)
    check_periodicity("train", rows)
    rows[1].pbc = torch.tensor([True, True, False])
    with pytest.raises(ConfigError, match=r"dataset\.train: structures are not periodic in the same directions"):
        check_periodicity("train", rows)

    def change(i, row):
        row.pbc = torch.tensor([True, True, i not in (2, 5)])

    config = config_on(tmp_path, rewritten(tmp_path, change))
    with pytest.raises(ConfigError, match="not periodic in the same directions"):
        make_trainer(config, tmp_path)
    config["model"]["backbone"]["use_pbc_single"] = True
    make_trainer(small(config), tmp_path).train(disable_eval_tqdm=True)


def test_where_graphs_are_not_periodic_a_cell_makes_no_images():
    row = slabs(1)[0]
    row.pos, row.atomic_numbers = torch.tensor([[0.0, 0, 0], [1.0, 0, 0]]), torch.tensor([6.0, 8.0])
    row.cell = torch.eye(3)[None]
    del row.pbc
    assert float(nearest_images(row).min()) == 0
    assert float(nearest_images(row, use_pbc=False).min()) == 1


def test_another_error_of_the_model_stays_what_it_is(data, tmp_path, monkeypatch):
    trainer = make_trainer(small(tiny_config(data)), tmp_path)
    monkeypatch.setattr(trainer._unwrapped_model, "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train(disable_eval_tqdm=True)


@pytest.mark.parametrize("setting", ["stop", "skip"])
@pytest.mark.parametrize("place", ["a file", "the middle of a folder"])
def test_an_lmdb_that_was_cut_short_is_named_before_training(place, setting, tmp_path):
    """Reading it would end the process by SIGBUS."""
    source = rewritten(tmp_path, lambda i, row: None)
    if place == "a file":
        source = broken = source / "data.lmdb"
    else:
        for name in ("a.lmdb", "b.lmdb", "c.lmdb"):
            shutil.copy(source / "data.lmdb", source / name)
        broken = source / "b.lmdb"
    config = config_on(tmp_path, source)
    config["task"]["denoising"]["on_bad_data"] = setting
    for size in (broken.stat().st_size // 2, 4096, 0):
        os.truncate(broken, size)
        with pytest.raises(DataError, match=rf"dataset\.train\.src: .*{broken.name}.*\W{size} (of \d+ )?bytes"):
            make_trainer(config, tmp_path)


def test_an_lmdb_that_lacks_free_pages_alone_is_whole(tmp_path):
    """As files end up in which rows were deleted while they were written."""
    path = tmp_path / "data.lmdb"
    with lmdb.open(str(path), subdir=False, map_size=2**24) as db:
        for _ in range(3):
            with db.begin(write=True) as transaction:
                for i in range(40):
                    transaction.put(f"{i}".encode(), bytes(9000))
                for i in range(20, 40):
                    transaction.delete(f"{i}".encode())
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as db:
        assert path.stat().st_size < (db.info()["last_pgno"] + 1) * db.stat()["psize"]
    check_whole("dataset.train", path)


def test_all_atoms_makes_wholly_fixed_data_trainable(tmp_path):
    make_trainer(config_on(tmp_path, rewritten(tmp_path, set_fixed), all_atoms=True), tmp_path)


def test_a_stress_guard_needs_stress(data, tmp_path):
    config = tiny_config(data, denoising={"dens": {"max_stress_norm": 1.0}})
    with pytest.raises(ConfigError, match="dens needs the label 'stress'"):
        make_trainer(config, tmp_path)


@pytest.mark.parametrize(
    ("src", "message"),
    [
        ("nowhere", r"dataset\.train\.src: nowhere: no such file or folder\. .*emt_slabs"),
        (None, r"dataset\.train\.src: empty"),
        (".", r"dataset\.train\.src: \.: holds no \*\.lmdb"),
    ],
)
def test_a_missing_path_is_named_and_says_how_to_get_the_data(src, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        make_trainer(config_on(tmp_path, "x") | {"dataset": {"train": {"format": "lmdb", "src": src}}}, tmp_path)


def test_a_missing_validation_path_is_named_too(data, tmp_path):
    config = tiny_config(data)
    config["dataset"]["val"] = {"src": str(tmp_path / "none"), "format": "oc22_lmdb"}
    with pytest.raises(ConfigError, match=r"dataset\.val\.src: .*none"):
        make_trainer(config, tmp_path)
    config["dataset"]["val"] = {"src": str(tmp_path / "*.db"), "format": "ase_db"}
    with pytest.raises(ConfigError, match=r"dataset\.val\.src: .*\*\.db.*ASE databases"):
        make_trainer(config, tmp_path)


def without(config, block, key):
    if block == "loss_functions":
        config[block] = [loss for loss in config[block] if key not in loss]
    else:
        del config[block][key]
    return config


@pytest.mark.parametrize("block", ["outputs", "loss_functions"])
def test_dens_needs_forces_among_outputs_and_losses(block, data, tmp_path):
    config = without(tiny_config(data), block, "forces")
    if block == "outputs":
        config = without(config, "loss_functions", "forces")
    with pytest.raises(ConfigError, match=f"{block}: no 'forces'"):
        make_trainer(config, tmp_path)


def test_an_unknown_output_in_train_outputs_is_an_error(data, tmp_path):
    config = tiny_config(data, denoising={"dens": {"train_outputs": ["enrgy"]}})
    with pytest.raises(ConfigError, match=r"train_outputs: 'enrgy' is not an output; outputs: energy"):
        make_trainer(config, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"regress_forces": False}, r"regress_forces is false"),
        (
            {"model": "strange_backbone"},
            r"no adapter for .*StrangeBackbone; known backbones: .*equiformer_v2_backbone, escn",
        ),
        ({"model": "equiformerv2"}, r"unknown 'equiformerv2'; known backbones: "),
        ({"otf_graph": False}, r"otf_graph is false"),
        ({"lmax_list": [2, 1], "mmax_list": [2, 1]}, r"one resolution only"),
    ],
)
def test_a_backbone_that_cannot_denoise_is_refused_before_it_is_built(change, message, data, tmp_path):
    config = tiny_config(data)
    config["model"]["backbone"].update(change)
    with pytest.raises(ConfigError, match=message):
        make_trainer(config, tmp_path)


def test_graph_parallelism_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match="--gp-gpus"):
        make_trainer(tiny_config(data), tmp_path, gp_gpus=2)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (
            {},
            "task.denoising turns on no task: this trains as the host's trainer would. New heads start with the host's "
            "random weights; in fine-tuning, quiet_heads: true lets those of energies and other scalars begin by "
            "predicting zero",
        ),
        ({"dens": None, "drop_path": {}}, "turns on no task: no step denoises. Its other settings count: drop_path"),
        ({"on_bad_data": "skip", "repeat_cells": {}}, "other settings count: on_bad_data, repeat_cells"),
    ],
)
def test_no_task_is_said_aloud_with_the_settings_that_count_all_the_same(block, said, data, tmp_path, caplog):
    make_trainer(tiny_config(data, denoising=block), tmp_path)
    assert any(record.message.endswith(said) for record in caplog.records)
