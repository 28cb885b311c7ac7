"""A checkpoint works as it is in every mode of the host's command line, where this package is installed."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from fairchem.core._cli import main
from fairchem.core.common import distutils
from fairchem.core.common.flags import flags
from fairchem.core.models.equiformer_v2.equiformer_v2 import EquiformerV2Backbone
from fairchem.core.models.escn.escn import eSCN

from fairchem_scd.fairchem1 import checkpoint
from fairchem_scd.fairchem1.data.emt_slabs import EmtSlabsDataset
from fairchem_scd.testing import collate
from tests.support.configs import tiny_config
from tests.support.models import fixed_edge_frames

RUNS = {"dens": ("equiformer_v2", {"dens": {}}), "scd": ("escn", {"scd": {"prob": 1.0}})}


def fairchem(mode, config, folder, *arguments):
    """The host's command line, in this process."""
    folder.mkdir()
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    command = ["--mode", mode, "--config-yml", str(folder / "config.yml"), "--run-dir", str(folder), "--cpu"]
    with mock.patch.dict(os.environ):  # the host sets variables for its processes
        try:
            main(*flags.get_parser().parse_known_args([*command, *arguments]))
        finally:
            distutils.cleanup()


@pytest.fixture(scope="module", params=RUNS)
def run(request, data, tmp_path_factory):
    """A finished run: its config, with data for every mode, and its checkpoint."""
    folder = tmp_path_factory.mktemp("use") / "train"
    config = tiny_config(data, *RUNS[request.param])
    fairchem("train", config, folder)
    config["dataset"]["test"] = dict(config["dataset"]["val"])
    config["dataset"]["relax"] = dict(config["dataset"]["val"])
    config["task"].update(
        prediction_dtype="float32", relaxation_steps=2, relax_opt={"maxstep": 0.04, "memory": 5}, write_pos=True
    )
    return config, next(folder.glob("checkpoints/*/checkpoint.pt"))


@pytest.fixture(autouse=True)
def _edge_frames_without_chance(monkeypatch):
    monkeypatch.setattr(EquiformerV2Backbone, "_init_edge_rot_mat", fixed_edge_frames)
    monkeypatch.setattr(eSCN, "_init_edge_rot_mat", fixed_edge_frames)


def averaged_model(path: Path):
    stored = checkpoint.read(path)
    model = checkpoint.build(stored).eval()
    model.load_state_dict(checkpoint.inference_weights(stored))
    return model


def test_predictions_are_those_of_the_averaged_model(run, tmp_path):
    config, path = run
    fairchem("predict", config, tmp_path / "predict", "--checkpoint", str(path))
    with np.load(next(tmp_path.glob("predict/results/*/ocp_predictions.npz"))) as file:
        predicted = dict(zip(file["ids"].tolist(), file["energy"], strict=True))
    model = averaged_model(path)
    rows = EmtSlabsDataset({**config["dataset"]["train"], **config["dataset"]["test"]})
    assert len(predicted) == len(rows)
    normal = config["dataset"]["train"]["transforms"]["normalizer"]["energy"]
    for row in (rows[i] for i in range(len(rows))):
        energy = float(model(collate([row]))["energy"]) * normal["stdev"] + normal["mean"]
        assert float(predicted[f"{row.sid}_{row.fid}"]) == pytest.approx(energy, rel=1e-5)


def test_validation_never_corrupts(run, tmp_path, caplog):
    config, path = run
    with caplog.at_level("INFO"):
        fairchem("validate", config, tmp_path / "validate", "--checkpoint", str(path))
    assert "energy_mae" in caplog.text
    assert "denoising_" not in caplog.text.split("Evaluating on val")[-1].split("Total time")[0]


def test_relaxations_run(run, tmp_path):
    config, path = run
    fairchem("run-relaxations", config, tmp_path / "relax", "--checkpoint", str(path))
    with np.load(next(tmp_path.glob("relax/results/*/relaxed_positions.npz"))) as file:
        # The host keeps one of each sid.
        systems = EmtSlabsDataset({**config["dataset"]["train"], **config["dataset"]["relax"]})
        assert set(file["ids"]) == {str(systems[i].sid) for i in range(len(systems))}
        assert np.isfinite(file["pos"]).all()


def test_training_goes_on(run, tmp_path):
    config, path = run
    config = {**config, "optim": {**config["optim"], "max_epochs": 2}}
    fairchem("train", config, tmp_path / "resume", "--checkpoint", str(path))
    assert checkpoint.read(next(tmp_path.glob("resume/checkpoints/*/checkpoint.pt")))["step"] == 4
    assert torch.load(path, weights_only=False)["step"] == 2
