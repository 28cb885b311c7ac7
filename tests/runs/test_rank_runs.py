"""Whole runs on several gloo ranks: as one process on the same global batches, and all together where data is bad."""

from __future__ import annotations

import gc
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fairchem.core._cli import main
from fairchem.core.common.flags import flags
from torch.distributed.launcher.api import LaunchConfig

from fairchem_scd.errors import DataError
from fairchem_scd.fairchem1 import checkpoint
from fairchem_scd.testing import make_trainer, on_ranks
from tests.support.configs import pretraining, tiny_config
from tests.support.models import edge_frames_without_chance
from tests.support.runs import folder_of, stopped_at, weights_of

CASES = {
    "dens": {"dens": {"prob": 0.5}},
    "scd": {"scd": {"noise_scale": "running", "prob": 0.75}},
    "pre-training": {"scd": {"noise_scale": "running"}},
    "noisy nodes": {"noisy_nodes": {"coefficient": 5}},
    "both": {"dens": {"prob": 0.5}, "scd": {"condition": ["self", "forces"]}},
}
FOUR = ("pre-training", "both")  # on four ranks; between them they use all that ranks exchange
BAD = 5


class Spoilt:
    """A dataset one row of which cannot be read, as a broken file's."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if index == BAD:
            raise EOFError("ran out of input")
        return self.dataset[index]


def config_of(data: Path, case: str, ranks: int) -> dict[str, Any]:
    """Four steps of four structures, by plain gradient descent: AdamW makes much of the smallest differences."""
    config = (pretraining if case == "pre-training" else tiny_config)(data, denoising=CASES[case])
    config["model"]["backbone"].update(lmax_list=[1], mmax_list=[1], num_layers=1, num_distance_basis=16)
    optim = config["optim"]
    optim.update(batch_size=4 // ranks, eval_batch_size=1, max_epochs=2, optimizer="SGD", optimizer_params={})
    optim.update(lr_initial=1e-4, ema_decay=None, load_balancing="atoms", eval_every=4)
    return config


def train(ranks: int, folder: Path, data: Path, cases: dict[str, str | None], path: Path | None = None) -> Any:
    """Each case's run, from a checkpoint if there is one; the setting of `on_bad_data` goes with a broken row."""
    results = {}
    for case, on_bad_data in cases.items():
        config = config_of(data, case, ranks)
        if on_bad_data is not None:
            config["task"]["denoising"] = {**config["task"]["denoising"], "on_bad_data": on_bad_data}
        with edge_frames_without_chance():
            trainer = make_trainer(config, folder / case.replace(" ", "_"))
            if on_bad_data is not None:
                trainer.train_loader.dataset.dataset = Spoilt(trainer.train_loader.dataset.dataset)
            if path is not None:
                trainer.load_checkpoint(str(path))
            start, error = weights_of(trainer), None
            try:
                trainer.train(disable_eval_tqdm=True)
            except DataError as raised:
                error = str(raised)
        ended = {"start": start, "state": weights_of(trainer), "error": error}
        results[case] = {**ended, "step": trainer.step, "bad": trainer.data_faults.left_out}
    return results


def on_each_rank(ranks: int, folder: Path, *arguments: Any) -> list[dict[str, Any]]:
    """What `train` returns on each rank, forked from here."""
    logging.disable(logging.WARNING)
    try:
        return on_ranks(ranks, folder, lambda rank: train(ranks, folder, *arguments))
    finally:
        logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    # In this very process, so that what is compiled once is so before ranks are forked.
    return train(1, tmp_path_factory.mktemp("alone"), data, dict.fromkeys(CASES))


@pytest.fixture(scope="module")
def two(alone, data, tmp_path_factory):
    return on_each_rank(2, tmp_path_factory.mktemp("two") / "run", data, dict.fromkeys(CASES))


def assert_same_end(results, alone, case):
    """But for the order of sums; all ranks to the last bit, the running noise scale too."""
    expected, first = alone[case]["state"], results[0][case]["state"]
    assert alone[case]["step"] == results[0][case]["step"] == 4
    moved = 0.0
    for key, value in expected.items():
        for other in results[1:]:
            assert torch.equal(other[case]["state"][key], first[key]), f"{case}: {key} differs between ranks"
        if value.is_floating_point():
            change = (value - alone[case]["start"][key]).abs().max()
            moved = max(moved, float(change))
            assert (first[key] - value).abs().max() <= 1e-3 * change + 1e-6, f"{case}: {key}"
    assert moved > 1e-5, f"{case}: nothing was trained"


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_end_where_one_process_does(case, two, alone):
    """After steps on the same global batches."""
    assert_same_end(two, alone, case)


def test_four_ranks_end_where_one_process_does(alone, data, tmp_path):
    results = on_each_rank(4, tmp_path / "run", data, dict.fromkeys(FOUR))
    for case in FOUR:
        assert_same_end(results, alone, case)


def test_a_run_goes_on_on_more_ranks(alone, data, tmp_path):
    """With the same product of ranks and batch it ends where it would have."""
    with edge_frames_without_chance():
        config = config_of(data, "scd", 1)
        config["optim"]["checkpoint_every"] = 1
        trainer = make_trainer(config, tmp_path / "start")
        stopped_at(trainer, 3)
    path = folder_of(trainer) / "checkpoint.pt"
    assert checkpoint.read(path)["step"] == 2
    results = on_each_rank(2, tmp_path / "run", data, {"scd": None}, path)
    assert_same_end(results, alone, "scd")


def test_the_hosts_command_does_the_same_on_its_ranks(two, data, tmp_path, monkeypatch):
    """`fairchem --num-gpus 2 --cpu`, its ranks forked from here instead of started afresh."""
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config_of(data, "scd", 2)))
    words = ["--mode", "train", "--config-yml", str(tmp_path / "config.yml"), "--run-dir", str(tmp_path)]
    words += ["--timestamp-id", "run", "--cpu", "--num-gpus", "2"]
    monkeypatch.setattr("fairchem.core._cli.LaunchConfig", partial(LaunchConfig, start_method="fork"))
    gc.freeze()  # as in rank_main
    try:
        with edge_frames_without_chance():
            main(*flags.get_parser().parse_known_args(words))
    finally:
        gc.unfreeze()
    ended = checkpoint.read(tmp_path / "checkpoints" / "run" / "checkpoint.pt")
    assert ended["step"] == 4
    assert ended["config"]["cmd"]["world_size"] == 2
    for key, value in two[0]["scd"]["state"].items():
        assert torch.equal(ended["state_dict"][f"module.{key}"], value), key


def test_a_bad_row_on_one_rank_stops_all_of_them_before_the_weights_are_touched(alone, data, tmp_path):
    results = on_each_rank(2, tmp_path / "run", data, {"scd": "stop"})
    for result in results:
        assert "EOFError: ran out of input" in result["scd"]["error"]
        assert "dataset.train, row " in result["scd"]["error"]
        assert result["scd"]["step"] == results[0]["scd"]["step"] <= 2
    for key, value in results[0]["scd"]["state"].items():
        assert torch.equal(results[1]["scd"]["state"][key], value), key
        assert torch.isfinite(value).all()


def test_a_bad_row_on_one_rank_is_left_out_and_counted(data, tmp_path):
    results = on_each_rank(2, tmp_path / "run", data, {"scd": "skip", "dens": "skip"})
    for case in ("scd", "dens"):
        assert [result[case]["error"] for result in results] == [None, None]
        assert sum(result[case]["bad"] for result in results) == 2  # epochs
        assert results[0][case]["step"] == 4
