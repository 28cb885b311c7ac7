"""What SCD's condition is worth, measured by the host's trainers in validation."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from fairchem_scd.denoising.condition_judge import ConditionJudge
from fairchem_scd.fairchem1.checkpoint import read
from fairchem_scd.testing import make_trainer, stirred
from tests.support.claims import ConservativeESEN, ConservativeGemNetT, GemNetOC, PaiNN
from tests.support.configs import pretraining, tiny_config
from tests.support.models import edge_frames_without_chance
from tests.support.runs import folder_of, weights_of

ERRORS = ["denoising_pos_mae", "denoising_pos_mae_other", "denoising_pos_mae_none", "denoising_pos_mae_zero"]
GAINS = [f"denoising_condition_{name}{error}" for name in ("gain", "gain_over_none") for error in ("", "_error")]
JUDGED = {*ERRORS, *GAINS, "denoising_condition_dimensions", "denoising_condition_spread"}


@pytest.fixture(autouse=True)
def _edge_frames_without_chance():
    with edge_frames_without_chance():
        yield


def values(metrics):
    return {name: found["metric"] for name, found in metrics.items()}


def by_hand(trainer):
    """The metrics of a judge that runs all passes itself, on the moving average of the weights."""
    trainer.model.eval()
    if trainer.ema:
        trainer.ema.store()
        trainer.ema.copy_to()
    model = trainer._unwrapped_model
    with torch.no_grad():
        judge = ConditionJudge(model, trainer.tasks["scd"], model)
        for batch in trainer.val_loader:
            judge.first(batch)
        judge.pair()
        for batch in trainer.val_loader:
            judge.second(batch)
        found = judge.report().metrics()
    if trainer.ema:
        trainer.ema.restore()
    return found


@pytest.mark.parametrize("supervised", [False, True])
def test_validation_reports_what_a_judge_finds_with_the_averaged_weights(supervised, data, tmp_path):
    block = {"scd": {"judge_condition": True} if supervised else {}}
    config = (tiny_config if supervised else pretraining)(data, denoising=block)
    trainer = make_trainer(config, tmp_path)
    stirred(trainer._unwrapped_model)  # the average is still that of the first weights, which are deaf
    found = values(trainer.validate(disable_tqdm=True))
    assert {"energy_mae", "forces_mae"} <= set(found) if supervised else set(found) >= {"loss"}
    for name, value in by_hand(trainer).items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    assert found["denoising_pos_mae"] == found["denoising_pos_mae_other"]
    trainer.ema = None
    found = values(trainer.validate(disable_tqdm=True))
    for name, value in by_hand(trainer).items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    assert found["denoising_pos_mae"] != found["denoising_pos_mae_other"]
    assert set(found) >= JUDGED


def test_the_judge_takes_nothing_from_what_validation_said_without_it(data, tmp_path):
    found = {}
    for judge in (None, False):
        trainer = make_trainer(pretraining(data, denoising={"scd": {"judge_condition": judge}}), tmp_path / f"{judge}")
        trainer.ema = None
        stirred(trainer._unwrapped_model)
        found[judge] = values(trainer.validate(disable_tqdm=True))
    assert set(found[None]) - set(found[False]) == JUDGED - {"denoising_pos_mae", "denoising_pos_mae_zero"}
    for name, value in found[False].items():
        assert found[None][name] == pytest.approx(value, rel=1e-5), name


def test_outputs_are_judged_as_without_the_judge(data, tmp_path):
    found = {}
    for judge in (True, False):
        config = tiny_config(data, denoising={"scd": {"judge_condition": judge}})
        found[judge] = values(make_trainer(config, tmp_path / f"{judge}").validate(disable_tqdm=True))
    assert found[False] == {name: found[True][name] for name in ("energy_mae", "forces_mae", "loss")}


def test_training_is_bit_for_bit_the_same_with_the_judge(data, tmp_path):
    ends = []
    for judge in (True, False):
        block = {"scd": {"judge_condition": judge, "noise_scale": "running"}}
        trainer = make_trainer(pretraining(data, denoising=block, optim={"max_epochs": 3}), tmp_path / f"{judge}")
        trainer.train(disable_eval_tqdm=True)
        ends.append(weights_of(trainer))
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_run_ends_with_a_sentence_on_what_the_condition_was_worth(data, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        trainer = make_trainer(pretraining(data), tmp_path)
        trainer.train(disable_eval_tqdm=True)
    report = trainer.condition_report
    assert report.structures == 4
    said = [record.getMessage() for record in caplog.records if "The condition" in record.getMessage()]
    assert said == [f"{report.sentence(supervised=False)}\n{report.numbers()}"]
    best = read(folder_of(trainer) / "best_checkpoint.pt")
    assert best["val_metrics"]["denoising_condition_gain"]["metric"] == report.gain.value
    assert best["val_metrics"]["denoising_pos_mae"]["metric"] == trainer.best_val_metric


def test_a_run_without_a_condition_says_nothing_of_one(data, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        trainer = make_trainer(pretraining(data, denoising={"scd": {"condition": []}}), tmp_path)
        trainer.train(disable_eval_tqdm=True)
    assert trainer.condition_report is None
    assert "condition carried" not in caplog.text.lower()
    found = set(trainer.validate(disable_tqdm=True))
    assert found == {"denoising_pos_mae", "denoising_pos_mae_zero", "denoising_left_out", "denoising_pos_loss", "loss"}


@pytest.mark.parametrize("claims", [PaiNN, GemNetOC, ConservativeGemNetT, ConservativeESEN])
def test_other_backbones_are_judged_too(claims, data, tmp_path):
    config = tiny_config(data, denoising={"scd": {"judge_condition": True}})
    config["model"].update(backbone=copy.deepcopy(claims.backbone), heads=copy.deepcopy(claims.heads))
    config.update(trainer="fairchem_scd.DenoisingTrainer", optim={**config["optim"], "scheduler": "Null"})
    if "Conservative" in claims.__name__:
        config["outputs"]["forces"]["property"] = config["outputs"]["energy"]["property"] = None
    trainer = make_trainer(config, tmp_path)
    trainer.ema = None
    stirred(trainer._unwrapped_model)
    found = values(trainer.validate(disable_tqdm=True))
    assert found["denoising_pos_mae"] != found["denoising_pos_mae_other"]
    assert found["denoising_pos_mae"] != found["denoising_pos_mae_none"]
    assert found["denoising_condition_dimensions"] > 1
