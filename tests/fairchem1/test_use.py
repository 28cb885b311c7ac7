"""A checkpoint works as it is in every mode of the host's command line, where this package is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fairchem_scd.fairchem1 import checkpoint
from fairchem_scd.fairchem1.data.emt_slabs import EmtSlabsDataset
from fairchem_scd.testing import collate
from tests.support.command_line import fairchem_on
from tests.support.configs import tiny_config
from tests.support.models import edge_frames_without_chance

RUNS = {"dens": ("equiformer_v2", {"dens": {}}), "scd": ("escn", {"scd": {"prob": 1.0}})}


@pytest.fixture(scope="module", params=RUNS)
def finished(request, data, tmp_path_factory):
    """A finished run: its config, with data for every mode, and its checkpoint."""
    folder = tmp_path_factory.mktemp("use") / "train"
    config = tiny_config(data, *RUNS[request.param])
    fairchem_on(config, folder, "--mode", "train")
    config["dataset"]["test"] = dict(config["dataset"]["val"])
    config["dataset"]["relax"] = dict(config["dataset"]["val"])
    config["task"].update(
        prediction_dtype="float32", relaxation_steps=2, relax_opt={"maxstep": 0.04, "memory": 5}, write_pos=True
    )
    return config, next(folder.glob("checkpoints/*/checkpoint.pt"))


@pytest.fixture(autouse=True)
def _edge_frames_without_chance():
    with edge_frames_without_chance():
        yield


def averaged_model(path: Path):
    stored = checkpoint.read(path)
    model = checkpoint.build(stored).eval()
    model.load_state_dict(checkpoint.inference_weights(stored))
    return model


def test_predictions_are_those_of_the_averaged_model(finished, tmp_path):
    config, path = finished
    fairchem_on(config, tmp_path / "predict", "--mode", "predict", "--checkpoint", path)
    with np.load(next(tmp_path.glob("predict/results/*/ocp_predictions.npz"))) as file:
        predicted = dict(zip(file["ids"].tolist(), file["energy"], strict=True))
    model = averaged_model(path)
    rows = EmtSlabsDataset({**config["dataset"]["train"], **config["dataset"]["test"]})
    assert len(predicted) == len(rows)
    normal = config["dataset"]["train"]["transforms"]["normalizer"]["energy"]
    for row in (rows[i] for i in range(len(rows))):
        energy = float(model(collate([row]))["energy"]) * normal["stdev"] + normal["mean"]
        assert float(predicted[f"{row.sid}_{row.fid}"]) == pytest.approx(energy, rel=1e-5)


def test_validation_never_corrupts(finished, tmp_path, caplog):
    config, path = finished
    with caplog.at_level("INFO"):
        fairchem_on(config, tmp_path / "validate", "--mode", "validate", "--checkpoint", path)
    assert "energy_mae" in caplog.text
    assert "denoising_" not in caplog.text.split("Evaluating on val")[-1].split("Total time")[0]


def test_relaxations_run(finished, tmp_path):
    config, path = finished
    fairchem_on(config, tmp_path / "relax", "--mode", "run-relaxations", "--checkpoint", path)
    with np.load(next(tmp_path.glob("relax/results/*/relaxed_positions.npz"))) as file:
        # The host keeps one of each sid.
        systems = EmtSlabsDataset({**config["dataset"]["train"], **config["dataset"]["relax"]})
        assert set(file["ids"]) == {str(systems[i].sid) for i in range(len(systems))}
        assert np.isfinite(file["pos"]).all()


def test_training_goes_on(finished, tmp_path):
    config, path = finished
    config = {**config, "optim": {**config["optim"], "max_epochs": 2}}
    fairchem_on(config, tmp_path / "resume", "--mode", "train", "--checkpoint", path)
    assert checkpoint.read(next(tmp_path.glob("resume/checkpoints/*/checkpoint.pt")))["step"] == 4
    assert torch.load(path, weights_only=False)["step"] == 2
