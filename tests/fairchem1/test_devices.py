"""No tensor is on the wrong device in a step of any task, on a device that only pretends to be another."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks import stand_ins
from fairchem_scd.denoising.plan import Plan
from fairchem_scd.testing import collate, gradients, make_trainer, plan_of
from tests.support import claims
from tests.support.configs import pretraining, tiny_config
from tests.support.models import hydra_arguments
from tests.support.other_device import DEVICE, other_device
from tests.support.waits import PACKAGE, assert_few_waits

SCHEDULE = {"num_steps": 3, "std_low": 0.01, "std_high": 0.1}
TAGS = {"embed_tags": [0, 1], "denoise_tags": [2]}
TASKS = {
    "none": ({"dens": {"prob": 0}}, tiny_config),
    "dens": ({"dens": {"prob": 1.0}}, tiny_config),
    "dens with a schedule": ({"dens": {"prob": 1.0, **SCHEDULE, "sigma_encoding": True}}, tiny_config),
    "dens on all atoms": ({"dens": {"prob": 1.0, "all_atoms": True, "train_outputs": []}}, tiny_config),
    "scd": ({"scd": {}}, tiny_config),
    "scd, recomputed": ({"scd": {"recompute_clean_pass": True}}, tiny_config),
    "scd with forces": ({"scd": {"condition": ["self", "forces"], "noise_scale": "running"}}, tiny_config),
    "scd with a mask token": ({"scd": {"null_condition": "mask_token", "pool": "mean"}}, tiny_config),
    "scd of subsets": ({"scd": TAGS}, tiny_config),
    "noisy nodes": ({"noisy_nodes": {"loss": "l2mae"}}, tiny_config),
    "scd, pre-training": ({"scd": SCHEDULE}, pretraining),
    "scd of subsets, pre-training": ({"scd": {**TAGS, "stop_gradient_condition": True}}, pretraining),
    "noisy nodes, pre-training": ({"noisy_nodes": {}}, pretraining),
}

BACKBONES = sorted(name for name, each in vars(claims).items() if getattr(each, "__module__", "") == claims.__name__)
BACKBONES = [name for name in BACKBONES if hasattr(getattr(claims, name), "heads")]


def step(trainer, batch):
    """What the host's loop does with a batch, but for the optimiser."""
    out = trainer._forward(batch)
    loss = trainer._compute_loss(out, batch)
    trainer._compute_metrics(out, batch, trainer.evaluator, {})
    return loss


def moved(config, folder):
    """A trainer and its model on the other device."""
    config["model"].update(hydra_arguments("equiformer_v2", num_layers=1, lmax_list=[1], mmax_list=[1]))
    trainer = make_trainer(config, folder)
    trainer.device = DEVICE
    trainer.model.to(DEVICE)
    return trainer


@pytest.mark.parametrize(("block", "config"), TASKS.values(), ids=TASKS)
def test_a_step_has_all_its_tensors_on_the_models_device_and_waits_once(block, config, rows, data, tmp_path):
    with other_device() as waits:
        trainer = moved(config(data, denoising=block), tmp_path)
        trainer.model.train()
        trainer.step = 1
        waits.clear()
        loss = step(trainer, collate(rows[:2]))
        loss.backward()
        # For the log, one transfer; else nothing of this package lets the CPU wait for the device.
        assert [Path(name).name for name in waits if name.startswith(PACKAGE)] == ["step.py"]
        assert loss.device.type == DEVICE.type
        assert loss.isfinite().item()
        assert all(p.grad is not None for p in trainer.model.parameters() if p.requires_grad)
        trainer.model.eval()
        with torch.no_grad(), trainer.validating():
            step(trainer, collate(rows[:2]))


@pytest.mark.parametrize("name", BACKBONES)
def test_a_pass_of_every_backbone_has_all_its_tensors_on_the_models_device(name):
    made = getattr(claims, name)()
    blocks = [{"scd": TAGS}, *[{"dens": {}}] * made.conditions_on_forces()]
    with stand_ins.host_with(stand_ins.stand_ins().host_names()), other_device():  # compiled ones read storages
        for block in blocks:
            model, batch = made.ours(block).to(DEVICE), made.batch(2)
            plan, _ = plan_of(batch, block, step=1)
            batch = batch.to(DEVICE)
            out, slopes = gradients(model, batch, plan.to(DEVICE))
            assert all(value.device.type == DEVICE.type for value in out.values())
            assert all(slopes[key] is not None for key, p in model.named_parameters() if p.requires_grad)
        model = made.ours({"scd": TAGS}).to(DEVICE)
        assert model.embed(batch).isfinite().all().item()
        assert model.features(batch).isfinite().all().item()


@pytest.mark.parametrize("block", [{"dens": {"prob": 0.5}}, {"scd": {"prob": 0.5}}, {"noisy_nodes": {"prob": 0.5}}])
def test_a_denoising_step_waits_no_more_than_the_documentation_says(block, rows, data, tmp_path):
    with other_device() as waits:
        trainer = moved(tiny_config(data, denoising=block), tmp_path)
        assert_few_waits(trainer, lambda: collate(rows[:2]), waits)


def test_it_finds_a_plan_that_was_not_moved(rows, data, tmp_path):
    with other_device():
        trainer = moved(tiny_config(data), tmp_path)
        trainer.model.train()
        with mock.patch.object(Plan, "to", lambda plan, device: plan), pytest.raises(RuntimeError, match="same device"):
            trainer._forward(collate(rows[:2]))
