"""Bad input ends in one clear message, before training wherever the config or a sample of the data tells."""

from __future__ import annotations

import pickle
import re

import lmdb
import pytest
import torch

from fairchem_scd.config import ConfigError, DataError
from fairchem_scd.data.emt_slabs import write_emt_slabs
from tests.support import make_trainer, tiny_config


def rewritten(folder, change):
    """Sample data with every row changed; returns the folder."""
    write_emt_slabs(folder / "source", num_structures=8, num_systems=2, seed=0)
    target = folder / "changed"
    target.mkdir()
    with lmdb.open(str(folder / "source" / "data.0000.lmdb"), subdir=False, readonly=True, lock=False) as source:
        with lmdb.open(str(target / "data.lmdb"), subdir=False, map_size=2**24) as db:
            with source.begin() as view, db.begin(write=True) as transaction:
                for i in range(8):
                    row = pickle.loads(view.get(f"{i}".encode()))
                    change(i, row)
                    transaction.put(f"{i}".encode(), pickle.dumps(row))
    return target


def config_on(tmp_path, source, **dens):
    config = tiny_config(tmp_path, denoising={"dens": {"prob": 1.0, **dens}})
    config["dataset"]["train"].update(format="lmdb", src=str(source))
    config["dataset"]["val"] = {}
    return config


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
        (heavy_atom, DataError, r"structure sid/fid \d+/5: element 95 is beyond.*max_num_elements \(now 90\)"),
        (nan_force, DataError, r"structure sid/fid \d+/2: forces of an atom is not finite: \[.*nan.*\]"),
        (infinite_position, DataError, r"structure sid/fid \d+/7: pos of an atom is not finite"),
    ],
)
def test_a_sample_of_the_data_tells_before_the_first_step(change, error, message, tmp_path):
    with pytest.raises(error, match=message):
        make_trainer(config_on(tmp_path, rewritten(tmp_path, change)), tmp_path)


@pytest.mark.parametrize("change", [heavy_atom, nan_force, infinite_position])
def test_a_row_the_sample_missed_is_named_when_it_comes(change, tmp_path, monkeypatch):
    monkeypatch.setattr("fairchem_scd.data.guarded._SAMPLE", 2)
    source = rewritten(tmp_path, lambda i, row: change(i, row) if i not in (0, 7) else None)
    if change is infinite_position:
        source = rewritten(tmp_path / "other", lambda i, row: row.pos.fill_(float("inf")) if i == 3 else None)
    trainer = make_trainer(config_on(tmp_path, source), tmp_path)
    with pytest.raises(DataError, match=r"structure sid/fid \d+/[235]:"):
        trainer.train(disable_eval_tqdm=True)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


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
            {"model": "painn_backbone"},
            r"no adapter for .*PaiNN.*known backbones: equiformer_v2_backbone, escn",
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


def test_no_task_is_said_aloud(data, tmp_path, caplog):
    make_trainer(tiny_config(data, denoising={}), tmp_path)
    assert any(re.search("turns on no task", record.message) for record in caplog.records)
