"""The SCD configs: what each of them says, what it adds to the model, and that it trains.

Expected values are the paper's (arXiv 2603.17196) where it has one, and otherwise what the headers say is ours.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fairchem_scd import DenoisingHydra
from fairchem_scd.fairchem1.legacy import to_hydra
from fairchem_scd.testing import make_trainer
from tests.support.config_files import count, load, oc22_data, sample_data, settings_of, small, train
from tests.support.configs import CONFIGS, tiny_config

SCD = {
    "std": 0.04,
    "condition_drop": 0.2,
    "loss": "mse",
    "condition": {"self"},
    "null_condition": "identity",
    "corrupt_ratio": None,
    "all_atoms": False,
}
# The DeNS run each goes beside.
RUN_OF = {
    "scd_oc20": "dens_oc20_2m_12epochs",
    "scd_dens_oc20": "dens_oc20_2m_12epochs",
    "scd_oc22": "dens_oc22",
    "scd_escn_oc20": "dens_escn_oc20_2m",
}


@pytest.mark.parametrize("name", RUN_OF)
def test_config_is_the_dens_runs_with_scd(name):
    """All that is not the task is as published for that run."""
    config = load(name)
    assert {**config, "task": None} == {**load(RUN_OF[name]), "task": None}
    settings = settings_of(config)
    assert settings["scd"].items() >= SCD.items()
    assert ("dens" in settings) == (name == "scd_dens_oc20")
    assert settings["scd"]["prob"] == (0.5 if "dens" in settings else 1.0)
    header = (CONFIGS / f"{name}.yml").read_text()
    assert "ublished" in header, "what there is to compare with, or that there is nothing"
    per_gpu = config["optim"]["batch_size"]
    assert f"{per_gpu} on each of " in header


def test_pre_training_is_the_papers():
    config = load("scd_pretrain_oc20")
    assert (config["outputs"], config["loss_functions"]) == ({}, [])
    assert settings_of(config)["scd"].items() >= {**SCD, "std_reg": 0.005, "prob": 1.0}.items()
    optim = config["optim"]
    expected = {
        "lr_initial": 2e-4 * 40 / 64,  # EquiformerV2's on OC20, for the batch below
        "optimizer": "AdamW",
        "optimizer_params": {"betas": [0.9, 0.999], "weight_decay": 0.05},
        "clip_grad_norm": 1.0,
        "ema_decay": None,
    }
    assert {key: optim[key] for key in expected} == expected
    assert config["model"]["backbone"]["drop_path_rate"] == 0.1
    # 800 000 steps with 10 000 of warm-up, by the batch that the header says and the 2 000 000 structures of OC20 2M.
    header = (CONFIGS / "scd_pretrain_oc20.yml").read_text()
    assert f"Global batch 40: {optim['batch_size']} on each of 8 GPUs, float32" in header
    assert optim["batch_size"] * 8 == 40
    steps_per_epoch = 2_000_000 // 40
    assert optim["max_epochs"] * steps_per_epoch == 800_000
    assert optim["scheduler_params"]["warmup_epochs"] * steps_per_epoch == 10_000
    assert (optim["scheduler_params"]["lambda_type"], optim["scheduler_params"]["warmup_factor"]) == ("cosine", 0)


def test_fine_tuning_is_the_papers():
    config = load("finetune_oc20")
    optim, block = config["optim"], config["task"]["denoising"]
    assert optim["optimizer_params"] == {"betas": [0.995, 0.999], "weight_decay": 0.01}
    # Not the paper's clipping, which belongs to a loss of weight 1, nor its noise on the input beside force labels.
    assert optim["clip_grad_norm"] == load("dens_oc20_2m_12epochs")["optim"]["clip_grad_norm"]
    assert set(block) == {"drop_path", "quiet_heads"}
    assert 8e-5 <= optim["lr_initial"] <= 5e-4
    # Warm-up and 2000 steps more, of 31 250 an epoch.
    warmup = 2_000_000 / 64 * optim["scheduler_params"]["warmup_epochs"]
    assert block["drop_path"] == {"start": 0.15, "end": 0.05, "steps": int(warmup + 2000)}
    start = config["model"]["finetune_config"]["starting_checkpoint"]
    assert f"--timestamp-id {start.split('/')[1]}" in (CONFIGS / "scd_pretrain_oc20.yml").read_text()


def test_quick_starts_agree_with_each_other():
    first, pretrain, finetune = (load(name) for name in ("quickstart", "quickstart_pretrain", "quickstart_finetune"))
    assert first["model"]["backbone"] == pretrain["model"]["backbone"]
    for split in ("train", "val"):
        for key in ("src", "num_structures"):
            assert first["dataset"][split][key] == pretrain["dataset"][split][key] == finetune["dataset"][split][key]
    start = finetune["model"]["finetune_config"]["starting_checkpoint"]
    assert start == "checkpoints/pretrain/best_checkpoint.pt"
    assert "--timestamp-id pretrain" in (CONFIGS / "quickstart_pretrain.yml").read_text()


@pytest.mark.parametrize("name", ["scd_oc20", "scd_escn_oc20", "scd_pretrain_oc20"])
def test_full_size_model_is_the_dens_runs_and_scd_adds_what_its_parts_say(name, sizes_only):
    """A noise head; the condition head; and for each block an MLP and α, of C l = 0 channels."""
    config = load(name)
    arguments, _ = to_hydra(config["model"])
    del arguments["name"]
    arguments["heads"] = arguments.get("heads") or {}
    model = DenoisingHydra(denoising=config["task"]["denoising"], **arguments)
    channels, blocks = 128, 11 if "escn" in name else 12
    linear = lambda inputs, outputs: inputs * outputs + outputs  # noqa: E731
    norm = 2 * channels
    condition_head = 5 * norm + 3 * linear(channels, channels)
    modulation = blocks * (linear(2 * channels, channels) + norm + linear(channels, 3 * channels) + 1)
    parts = {part: count(module.parameters()) for part, module in model.denoising["scd"].items()}
    assert parts["condition_head"] == condition_head
    assert parts["modulation"] == modulation
    assert set(parts) == {"noise_head", "condition_head", "modulation"}
    if "pretrain" not in name:
        assert parts["noise_head"] == count(model.output_heads["forces"].parameters())
    # In the order of a tenth of the host's own, and gone at inference.
    assert sum(parts.values()) < 0.15 * count(model.backbone.parameters())


@pytest.mark.parametrize("name", ["scd_oc20", "scd_escn_oc20", "scd_dens_oc20", "add_scd"])
def test_config_trains(name, data, tmp_path):
    trainer, steps = train(small(load(name), *sample_data(data)), tmp_path)
    assert all(corruption.mask.any() for _, corruption, _ in steps)
    assert "scd" in trainer.tasks


def test_oc22_config_trains(rows, tmp_path):
    config = small(load("scd_oc22"), *oc22_data(tmp_path, rows))
    references = config["dataset"]["train"]["transforms"]["element_references"]["energy"]
    references["file"] = str(tmp_path / "references.npz")
    trainer, _ = train(config, tmp_path)
    assert np.isfinite(trainer.metrics["denoising_pos_mae"]["metric"])


def test_pre_training_and_fine_tuning_configs_train_one_after_the_other(data, tmp_path):
    """With this package's trainer, and with the host's as the header says."""
    trainer, _ = train(small(load("scd_pretrain_oc20"), *sample_data(data)), tmp_path / "pretrain")
    start = str(tmp_path / f"pretrain/checkpoints/{trainer.timestamp_id}/best_checkpoint.pt")
    config = small(load("finetune_oc20"), *sample_data(data))
    config["model"]["finetune_config"]["starting_checkpoint"] = start
    tuned, _ = train(config, tmp_path / "finetune")
    assert tuned.model.backbone.blocks[0].drop_path.drop_prob == pytest.approx(0.15, abs=1e-4)
    weight = tuned.model.backbone.blocks[0].norm_1.norm_l0.weight
    assert weight.shape == trainer.model.backbone.blocks[0].norm_1.norm_l0.weight.shape

    config["trainer"] = "equiformerv2_forces"
    del config["task"]
    config["optim"]["scheduler_params"]["warmup_epochs"] = 0.5  # less than a step here, by which the host divides
    plain = make_trainer(config, tmp_path / "plain")
    loaded = plain.model.backbone.state_dict()
    source = torch.load(start, weights_only=False)["state_dict"]
    assert all(torch.equal(value, source[f"backbone.{key}"]) for key, value in loaded.items())
    plain.train(disable_eval_tqdm=True)


def test_a_setting_that_is_no_more_is_warned_of_once_and_not_stored(data, tmp_path, caplog):
    trainer = make_trainer(tiny_config(data, denoising={"scd": {"pool": "mean", "std": 0.05}}), tmp_path)
    assert caplog.text.count("task.denoising.scd.pool has no effect") == 1
    assert trainer.config["model"]["denoising"] == {"scd": {"std": 0.05}}
