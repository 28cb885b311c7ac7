"""New heads of scalars start at zero in fine-tuning, on every backbone, and wherever they are asked to."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from fairchem_scd.denoising.quiet_heads import quieten
from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1.backbones import adapter_for
from fairchem_scd.fairchem1.checkpoint import read
from fairchem_scd.testing import collate, make_trainer, on_ranks, slabs
from tests.support import claims
from tests.support.configs import pretraining, tiny_config
from tests.support.models import edge_frames_without_chance
from tests.support.runs import assert_same, batch_of, folder_of, state_of, step_of, stopped_at, weights_of

BACKBONES = [value for value in vars(claims).values() if isinstance(value, type) and hasattr(value, "backbone")]
BACKBONES = [value for value in BACKBONES if value is not claims.BackboneClaims]


@pytest.fixture(autouse=True)
def _edge_frames_without_chance():
    with edge_frames_without_chance():
        yield


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    """Checkpoints of one step of pre-training, by backbone."""
    made = {}

    def of(name="equiformer_v2"):
        if name not in made:
            config = pretraining(data, denoising={"scd": {"judge_condition": False}}, optim={"max_epochs": 1})
            with_backbone(config, name)
            trainer = make_trainer(config, tmp_path_factory.mktemp(name))
            trainer.train(disable_eval_tqdm=True)
            made[name] = folder_of(trainer) / "checkpoint.pt"
        return made[name]

    return of


def with_backbone(config, name):
    """The config with another backbone of `claims`, and its heads where it has any."""
    if name != "equiformer_v2":
        config["model"]["backbone"] = copy.deepcopy(dict(getattr(claims, name).backbone))
        if "heads" in config["model"]:
            config["model"]["heads"] = copy.deepcopy(dict(getattr(claims, name).heads))


def finetuning(data, start, block, **changes):
    config = tiny_config(data, denoising=block, **changes)
    config["model"].pop("backbone")
    config["model"]["finetune_config"] = {"starting_checkpoint": str(start)}
    return config


def outputs_of(trainer, batch=None):
    """What its model predicts for the first batch of its training data, in eval mode."""
    trainer.model.eval()
    torch.manual_seed(0)
    return {key: value.detach() for key, value in trainer._forward(batch or batch_of(trainer)).items()}


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda backbone: backbone.__name__)
def test_on_every_backbone_a_quiet_head_predicts_zero_and_direct_forces_stay(backbone):
    model = backbone().plain().train()
    batch = collate(slabs(2))
    with backbone().without_chance():
        torch.manual_seed(0)
        before = model(copy.deepcopy(batch))
        quiet = quieten(model.output_heads, adapter_for(model.backbone), readout=True)
        torch.manual_seed(0)
        after = model(copy.deepcopy(batch))
    (name,) = quiet
    assert name in ("energy", "both")  # eSEN's head that predicts the energy and its gradient
    assert before["energy"].abs().min() > 0
    assert not after["energy"].any()
    if "forces" in model.output_heads:
        assert before["forces"].any()
        assert torch.equal(before["forces"], after["forces"])
    (after["energy"] - 1).square().sum().backward()
    layers = adapter_for(model.backbone).scalar_layers(model.output_heads[name])
    assert any(p.grad.any() for layer in layers for p in layer.parameters()), "the head learns from the first step on"


@pytest.mark.parametrize(
    ("block", "fine_tunes", "quiet"),
    [
        ({"noisy_nodes": {}}, True, True),
        ({"noisy_nodes": {}, "quiet_heads": False}, True, False),
        ({}, True, False),
        ({"quiet_heads": True}, True, True),
        ({"scd": {}}, False, False),
        ({"scd": {}, "quiet_heads": True}, False, True),
    ],
    ids=["fine-tuning", "off", "without a task", "without a task, on", "from scratch", "from scratch, on"],
)
def test_new_heads_start_quietly_in_fine_tuning_and_where_asked(block, fine_tunes, quiet, data, pretrained, tmp_path):
    config = finetuning(data, pretrained(), block) if fine_tunes else tiny_config(data, denoising=block)
    config["optim"]["max_epochs"] = 1
    trainer = make_trainer(config, tmp_path)
    loud = copy.deepcopy(config)
    loud["task"]["denoising"]["quiet_heads"] = False
    other = make_trainer(loud, tmp_path, identifier="loud")
    batch = batch_of(trainer)
    found, expected = outputs_of(trainer, batch), outputs_of(other, batch)
    assert bool(found["energy"].any()) != quiet
    assert torch.equal(found["forces"], expected["forces"])
    assert expected["energy"].any()
    last = {f"output_heads.energy.energy_block.so3_linear_2.{part}" for part in ("weight", "bias")}
    for key, value in weights_of(other).items():
        assert torch.equal(weights_of(trainer)[key], value) != (quiet and key in last and bool(value.any())), key
    denormalised = trainer._denorm_preds("energy", found["energy"], batch)
    assert not quiet or torch.equal(denormalised, torch.full_like(denormalised, 5.5)), "the normaliser's mean"
    shadows = dict(zip((name for name, _ in trainer.model.named_parameters()), trainer.ema.shadow_params, strict=False))
    assert len(shadows) == len(trainer.ema.shadow_params)
    assert any(shadows[key].any() for key in last) != quiet, "the average starts there too"
    trainer.train(disable_eval_tqdm=True)
    assert weights_of(trainer)["output_heads.energy.energy_block.so3_linear_2.weight"].any()


def test_a_run_that_goes_on_keeps_its_trained_heads(data, pretrained, tmp_path):
    config = finetuning(data, pretrained(), {"noisy_nodes": {}}, optim={"max_epochs": 2, "checkpoint_every": 1})
    whole = make_trainer(config, tmp_path / "whole")
    whole.train(disable_eval_tqdm=True)
    first = make_trainer(config, tmp_path / "first")
    stopped_at(first, 3)
    second = make_trainer(config, tmp_path / "second")
    second.load_checkpoint(str(folder_of(first) / "checkpoint.pt"))
    assert outputs_of(second)["energy"].any()
    second.train(disable_eval_tqdm=True)
    assert_same(state_of(second), state_of(whole))


def test_heads_that_come_from_the_checkpoint_stay_as_they_are(data, tmp_path):
    trainer = make_trainer(tiny_config(data, denoising={"scd": {}}), tmp_path / "start")
    trainer.ema = None
    trainer.save()
    for asked in (None, True):
        config = finetuning(data, folder_of(trainer) / "checkpoint.pt", {"scd": {}, "quiet_heads": asked})
        config["model"].pop("heads")
        config["model"]["heads"] = None
        other = weights_of(make_trainer(config, tmp_path / f"{asked}"))
        for key, value in weights_of(trainer).items():
            assert torch.equal(other[key], value), key


@pytest.mark.parametrize("from_pretraining", [True, False])
def test_a_readout_in_the_backbone_starts_quietly_unless_it_was_trained(from_pretraining, data, pretrained, tmp_path):
    if from_pretraining:
        start = pretrained("GemNetT")
    else:
        config = tiny_config(data, denoising={"scd": {}})
        with_backbone(config, "GemNetT")
        trainer = make_trainer(config, tmp_path / "start")
        trainer.save()
        start = folder_of(trainer) / "checkpoint.pt"
    config = finetuning(data, start, {"noisy_nodes": {}})
    config["model"]["heads"] = copy.deepcopy(claims.GEMNET_T_HEADS)
    trainer = make_trainer(config, tmp_path / "run")
    energy = outputs_of(trainer)["energy"]
    assert bool(energy.any()) != from_pretraining
    kept = read(start)["state_dict"]["backbone.out_blocks.0.out_energy.linear.weight"]
    assert torch.equal(weights_of(trainer)["backbone.out_blocks.0.out_energy.linear.weight"], kept) != from_pretraining


def test_ranks_start_and_stay_alike(data, pretrained, tmp_path):
    start = pretrained()

    def ended(rank):
        config = finetuning(data, start, {"noisy_nodes": {}}, optim={"batch_size": 2})
        trainer = make_trainer(config, tmp_path / "run")
        quiet = not outputs_of(trainer)["energy"].any()
        step_of(trainer, batch_of(trainer))[1].backward()
        without = [name for name, p in trainer.model.named_parameters() if p.requires_grad and p.grad is None]
        trainer._step = None
        trainer.optimizer.step()
        return quiet, without, weights_of(trainer)

    logging.disable(logging.WARNING)
    try:
        one, two = on_ranks(2, tmp_path / "ranks", ended)
    finally:
        logging.disable(logging.NOTSET)
    for quiet, without, _ in (one, two):
        assert quiet
        assert without == []
    assert all(torch.equal(value, two[2][key]) for key, value in one[2].items())
    assert one[2]["output_heads.energy.energy_block.so3_linear_2.weight"].any()


def test_a_model_without_a_known_head_of_scalars_is_told_so_where_it_was_asked(data, tmp_path):
    config = tiny_config(data, denoising={"noisy_nodes": {}, "quiet_heads": True})
    config["model"]["heads"] = {"forces": config["model"]["heads"]["forces"]}
    config.update(outputs={"forces": config["outputs"]["forces"]}, loss_functions=[config["loss_functions"][1]])
    config["evaluation_metrics"]["metrics"] = {"forces": ["mae"]}
    with pytest.raises(ConfigError, match=r"task\.denoising\.quiet_heads: none of model\.heads is .*: forces; leave"):
        make_trainer(config, tmp_path)
