"""What a run logs: to the console, and to Weights & Biases, which writes to a file here."""

from __future__ import annotations

import json
import struct
import time

import pytest
import wandb
from fairchem.core.common.logger import WandBSingletonLogger
from wandb.proto import wandb_internal_pb2

from tests.fairchem2.support import model_config, run, run_config, sample_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sample_data(tmp_path_factory.mktemp("logging"))


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # it reads the environment once, and an earlier test may have made it do so
    yield
    wandb.finish()
    WandBSingletonLogger._instance = None


def with_wandb(config):
    config["job"]["debug"] = False
    config["job"]["logger"] = {
        "_target_": "fairchem.core.common.logger.WandBSingletonLogger.init_wandb",
        "_partial_": True,
        "entity": "none",
        "project": "tests",
    }
    return config


def recorded(folder):
    """The records of a run of Weights & Biases, from its file."""
    wandb.finish()
    wandb.teardown()  # its service has written all only then
    (path,) = folder.rglob("*.wandb")
    found = []
    for _ in range(300):  # its own process writes it
        found = [_parsed(data) for data in _chunks(path.read_bytes())]
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            break
        time.sleep(0.1)
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.WhichOneof("record_type") == "history"
    ]


def _parsed(data):
    record = wandb_internal_pb2.Record()
    record.ParseFromString(data)
    return record


def _chunks(data, block=32768):
    """The records of a file in LevelDB's log format, behind a header of seven bytes."""
    position, whole = 7, b""
    while position < len(data):
        if block - position % block < 7:
            position += block - position % block
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last part
            yield whole
            whole = b""


def test_errors_of_denoising_steps_stand_in_the_hosts_own_records(folder, offline):
    config = with_wandb(run_config(folder, denoising={"scd": {"prob": 0.5}, "dens": {}}, steps=4, print_every=2))
    finished = run(config, "supervised")
    records = [record for record in recorded(finished.folder) if "train/loss" in record]
    assert [record["train/step"] for record in records] == [0, 1, 2, 3]
    for record in records:
        assert record["train/denoising_pos_mae"] > 0
        terms = sum(value for name, value in record.items() if name.endswith("_loss"))
        assert terms == pytest.approx(record["train/loss"], rel=1e-5)
    lines = [line for line in finished.lines if isinstance(line, dict) and "train/denoising_pos_mae" in line]
    assert [line["train/step"] for line in lines] == [0, 2], "as often as the host prints"
    between = [record["train/denoising_pos_mae"] for record in records]
    atoms = [record["train/num_atoms_on_rank"] for record in records]
    assert between[1] != between[2]
    assert min(between[1:3]) < lines[1]["train/denoising_pos_mae"] < max(between[1:3]), f"a mean over both: {atoms}"


def test_pre_training_is_judged_by_the_noise_of_its_validation(folder, offline):
    model = model_config(heads={})
    block = {"scd": {"num_steps": 2, "std_low": 0.02, "std_high": 0.1}}
    config = with_wandb(run_config(folder, tasks=[], model=model, denoising=block, evaluate_every=2))
    finished = run(config, "pretraining")
    records = recorded(finished.folder)
    logged = [record["val/denoising_pos_mae"] for record in records if "val/denoising_pos_mae" in record]
    assert logged == finished.logged("val/denoising_pos_mae")[: len(logged)]
    assert len(logged) >= 1
    assert "Validation after 2 steps" in finished.lines
    losses = [record["val/loss"] for record in records if "val/loss" in record]
    assert losses
    assert min(losses) > 0, "the host would log zero"


def test_the_noise_of_validation_is_the_same_in_every_run(folder):
    """So that its error compares: here of models whose average has not moved."""
    values = []
    for seed in (0, 1):
        config = run_config(
            folder, tasks=[], model=model_config(heads={}), denoising={"scd": {}}, steps=1, evaluate_every=1,
            checkpoint_every=None, ema_decay=1.0,
        )  # fmt: skip
        config["runner"]["train_eval_unit"]["model"]["backbone"]["num_layers"] = 1
        finished = run(config, f"seed {seed}", f"job.seed={seed}")
        values.append(finished.logged("val/denoising_pos_mae")[0])
    # Other weights, but the same noise: an untrained model predicts next to nothing, so the error is the noise's size.
    assert values[0] == pytest.approx(values[1], rel=0.05)
    assert values[0] == pytest.approx(0.04 * 0.8, rel=0.1)
