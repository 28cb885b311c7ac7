"""One number for each structure, without energies or forces: every command works on it."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.db import connect
from fairchem.core.datasets.ase_datasets import AseDBDataset

from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1 import checkpoint
from fairchem_scd.testing import collate
from tests.support.claims import PAINN
from tests.support.command_line import fairchem_on, fairchem_scd
from tests.support.configs import tiny_config
from tests.support.models import edge_frames_without_chance

MEAN, STDEV = 5.0, 2.0
# How a head of each backbone says which output it has: see docs/properties.md.
GAP_HEAD = {
    "equiformer_v2": {"module": "equiformerV2_scalar_head", "output_name": "gap"},
    "painn": {"module": "painn_energy_head"},
}


@pytest.fixture(autouse=True)
def _edge_frames_without_chance():
    with edge_frames_without_chance():
        yield


@pytest.fixture(scope="module")
def gaps(tmp_path_factory) -> Path:
    """Databases of molecules with a `gap` in their data, and no other label."""
    folder, rng = tmp_path_factory.mktemp("gaps"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        with connect(folder / f"{split}.db") as rows:
            for i in range(count):
                atoms = molecule(("CH3OH", "C6H6", "CH3CHO")[i % 3])
                atoms.rattle(0.05, seed=i)
                rows.write(atoms, data={"gap": float(MEAN + rng.standard_normal())})
    return folder


def config_of(gaps: Path, backbone: str, denoising: dict) -> dict:
    config = tiny_config(gaps, "equiformer_v2", denoising)
    if backbone == "painn":
        config["model"]["backbone"] = dict(PAINN)
    a2g = {"r_energy": False, "r_forces": False, "r_data_keys": ["gap"], "molecule_cell_size": 8.0}
    split = {"format": "ase_db", "a2g_args": a2g}
    config["dataset"] = {name: {**split, "src": str(gaps / f"{name}.db")} for name in ("train", "val")}
    config["task"]["prediction_dtype"] = "float32"
    config["dataset"]["test"] = dict(config["dataset"]["val"])
    config["dataset"]["train"]["transforms"] = {"normalizer": {"gap": {"mean": MEAN, "stdev": STDEV}}}
    named = "output_name" in GAP_HEAD[backbone]
    config["outputs"] = {"gap": {"level": "system"} if named else {"level": "system", "property": "energy"}}
    config["loss_functions"] = [{"gap": {"fn": "mae", "coefficient": 1}}]
    config["evaluation_metrics"] = {"primary_metric": "gap_mae", "metrics": {"gap": ["mae"]}}
    config["model"]["heads"] = {"gap": GAP_HEAD[backbone]}
    config["model"]["pass_through_head_outputs"] = named
    return config


@pytest.fixture(scope="module", params=GAP_HEAD)
def finished(request, gaps, tmp_path_factory):
    """Config and checkpoint of a finished run with noisy nodes beside the property, and what it said at its end."""
    folder = tmp_path_factory.mktemp("properties") / request.param
    config = config_of(gaps, request.param, {"noisy_nodes": {}})
    return config, *train(config, folder)


def train(config: dict, folder: Path) -> tuple[Path, str]:
    with mock.patch.object(logging, "info") as said:
        fairchem_on(config, folder, "--mode", "train")
    words = [str(call.args[0]) for call in said.call_args_list]
    return next(folder.glob("checkpoints/*/best_checkpoint.pt")), "\n".join(words)


def predictions(config: dict, path: Path, folder: Path) -> dict[str, float]:
    fairchem_on(config, folder, "--mode", "predict", "--checkpoint", path)
    with np.load(next(folder.glob("results/*/ocp_predictions.npz"))) as file:
        return dict(zip(file["ids"].tolist(), file["gap"].ravel().tolist(), strict=True))


def computed(config: dict, path: Path) -> dict[str, float]:
    """The property by the model itself."""
    stored = checkpoint.read(path)
    model = checkpoint.build(stored).eval()
    model.load_state_dict(checkpoint.inference_weights(stored))
    rows = AseDBDataset(config["dataset"]["test"])
    found = {}
    for i in range(len(rows)):
        row = rows[i]
        out = model(collate([row]))["gap"]
        out = out["energy"] if isinstance(out, dict) else out
        found[f"{row.sid}_{int(row.fid)}"] = float(out) * STDEV + MEAN
    return found


def test_predictions_are_those_of_the_model_and_of_its_export(finished, tmp_path):
    config, path, _ = finished
    found, expected = predictions(config, path, tmp_path / "predict"), computed(config, path)
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(found) == 4
    plain = tmp_path / "plain.pt"
    assert "fairchem --mode predict" in fairchem_scd("export", path, plain).output
    assert predictions(config, plain, tmp_path / "plain") == pytest.approx(found, rel=1e-5)


def test_the_plain_trainer_goes_on_from_an_export_with_training_state(finished, tmp_path):
    config, path, _ = finished
    if config["model"]["backbone"]["model"] == "painn_backbone":
        pytest.skip("fairchem's own trainers do not train PaiNN without a force head: DDP misses gradients")
    plain = tmp_path / "plain.pt"
    fairchem_scd("export", path.with_name("checkpoint.pt"), plain, "--training-state")
    host = copy.deepcopy(config)
    host["trainer"] = "equiformerv2_forces"
    del host["task"]["denoising"]
    host["optim"]["max_epochs"] += 1
    fairchem_on(host, tmp_path / "on", "--mode", "train", "--checkpoint", plain)
    before, after = (torch.load(p, weights_only=False) for p in (plain, next(tmp_path.glob("on/**/checkpoint.pt"))))
    assert after["step"] == before["step"] + 2
    weights, trained = ({k.removeprefix("module."): v for k, v in c["state_dict"].items()} for c in (before, after))
    assert weights.keys() == trained.keys()
    assert not all(torch.equal(weights[key], trained[key]) for key in weights)


def test_the_end_of_a_run_names_the_command_that_predicts_and_no_calculator(finished):
    _, path, said = finished
    assert f"fairchem --mode predict --config-yml YOUR.yml --checkpoint {path}" in said
    assert "OCPCalculator" not in said


def test_scd_beside_a_property_and_fine_tuning_from_pre_training(gaps, tmp_path):
    start = config_of(gaps, "equiformer_v2", {"scd": {}})
    start.update(outputs={}, loss_functions=[], evaluation_metrics={})
    start["model"].pop("heads")
    path, _ = train(start, tmp_path / "pretrain")
    config = config_of(gaps, "equiformer_v2", {"scd": {"prob": 1.0}})
    config["model"]["backbone"] = None
    config["model"]["finetune_config"] = {"starting_checkpoint": str(path)}
    tuned, _ = train(config, tmp_path / "finetune")
    assert predictions(config, tuned, tmp_path / "predict") == pytest.approx(computed(config, tuned), rel=1e-5)


def test_an_output_that_no_head_returns_is_named_with_what_to_write(gaps, tmp_path):
    config = config_of(gaps, "painn", {"scd": {"prob": 1.0}})
    config["model"]["pass_through_head_outputs"] = True
    with pytest.raises(ConfigError, match=r"'gap', not found.*\['energy'.*pass_through_head_outputs: false"):
        train(config, tmp_path / "through")
    config["model"]["pass_through_head_outputs"] = False
    del config["outputs"]["gap"]["property"]
    with pytest.raises(ConfigError, match=r"outputs: one has no `property`.*energy head's is `energy`"):
        train(config, tmp_path / "apart")
