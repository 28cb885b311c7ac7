"""A config is read once, and all that follows from it agrees."""

from __future__ import annotations

import copy

import pytest
import yaml

from fairchem_scd import ConfigError
from fairchem_scd.fairchem1.checkpoint import read as read_checkpoint
from fairchem_scd.fairchem1.config import read
from fairchem_scd.fairchem1.hydra import DenoisingHydra
from fairchem_scd.testing import make_trainer, self_supervised
from tests.support.configs import tiny_config

BLOCK = {"scd": {"prob": 0.75}, "noisy_nodes": {}}


def config_of(data, pretraining=False, denoising=BLOCK):
    config = tiny_config(data, denoising=denoising)
    return self_supervised(config) if pretraining else config


@pytest.mark.parametrize("pretraining", [False, True])
def test_a_setup_says_what_the_trainer_and_its_model_go_by(pretraining, data, tmp_path):
    setup = read(config_of(data, pretraining))
    assert setup.shares == {"scd": 0.75, "noisy_nodes": 0.25}
    assert setup.self_supervised == pretraining
    assert all(task.supervised != pretraining for task in setup.tasks.values())
    trainer = make_trainer(config_of(data, pretraining), tmp_path)
    assert trainer.config["model"] == setup.model
    assert trainer.self_supervised == trainer.model.self_supervised == pretraining
    assert {name: task.settings for name, task in trainer.tasks.items()} == setup.settings.tasks


def test_the_model_block_is_plain_values_that_make_the_same_model_from_a_checkpoint(data, tmp_path):
    trainer = make_trainer(config_of(data, pretraining=True), tmp_path)
    trainer.train(disable_eval_tqdm=True)
    block = read_checkpoint(f"{trainer.config['cmd']['checkpoint_dir']}/checkpoint.pt")["config"]["model"]
    assert yaml.safe_load(yaml.safe_dump(block)) == block
    assert DenoisingHydra(**{k: v for k, v in block.items() if k != "name"}).self_supervised


def test_a_pre_training_checkpoint_of_before_the_model_knew_of_it_goes_on(data, tmp_path):
    first = make_trainer(config_of(data, pretraining=True), tmp_path, identifier="first")
    first.train(disable_eval_tqdm=True)
    path = f"{first.config['cmd']['checkpoint_dir']}/checkpoint.pt"
    checkpoint = read_checkpoint(path)
    del checkpoint["config"]["model"]["self_supervised"]
    again = make_trainer(config_of(data, pretraining=True), tmp_path, identifier="again")
    again.load_checkpoint(path, checkpoint)
    assert again.step == first.step == 2
    assert again.optimizer.state_dict()["state"].keys() == first.optimizer.state_dict()["state"].keys()


def test_a_model_block_copied_from_a_checkpoint_follows_the_config_it_stands_in(data):
    pretrained = read(config_of(data, pretraining=True)).model
    config = config_of(data, denoising={"dens": {}})
    config["model"] = {**copy.deepcopy(pretrained), "heads": config["model"]["heads"]}
    setup = read(config)
    assert "self_supervised" not in setup.model
    assert list(setup.model["denoising"]) == ["dens"]


def test_a_config_without_a_model_is_refused():
    with pytest.raises(ConfigError, match="model: missing"):
        read({"task": {"denoising": {"scd": {}}}, "model": None})
