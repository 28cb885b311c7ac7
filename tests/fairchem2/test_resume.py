"""Runs of the host's own command that stop and go on by its own resume.yaml, and runs that change what they train."""

from __future__ import annotations

import pytest

from fairchem_scd.errors import ConfigError
from tests.fairchem2.support import OURS, differences, model_config, run, run_config, sample_data, tasks_config

# All that draws random numbers in a step, and all that a second pass could disturb.
MODEL = model_config(
    direct=False,
    stress=True,
    experts=4,
    moe_dropout=0.3,
    use_composition_embedding=True,
    composition_dropout=0.2,
    activation_checkpointing=True,
)
TASKS = {"scd": {"prob": 0.5, "num_steps": 3, "std_low": 0.01, "std_high": 0.1}, "dens": {"prob": 0.25}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sample_data(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def plain(folder):
    """A run of the host's own unit."""
    return run(run_config(folder), "plain")


def test_a_resumed_run_ends_where_the_whole_one_did_to_the_last_bit(folder):
    config = run_config(
        folder,
        model=MODEL,
        tasks=tasks_config(stress=True),
        denoising=TASKS,
        steps=6,
        checkpoint_every=3,
        evaluate_every=2,
    )
    whole = run(config, "whole")
    kinds = {"scd" if "denoising_left_out" in line else "dens" for line in _metrics(whole)}
    assert len(kinds) == 2, "the run was to have steps of both tasks"
    assert len(_metrics(whole)) < 6, "and ordinary ones"
    resumed = run(whole.checkpoint("step_3") / "resume.yaml", "resumed")
    assert resumed.logged("train/loss") == whole.logged("train/loss")[3:]
    assert differences(whole.state(), resumed.state()) == []
    scales = [whole.state(name)["model"]["denoising.scd.scale.mean_square"] for name in ("step_0", "final")]
    assert scales[0] != scales[1], "a running scale was to be among what is stored"


def test_the_hosts_own_resumed_run_does_not(folder):
    """It stores no random state: what makes the claim above worth having."""
    whole = run(run_config(folder, model=MODEL), "host")
    resumed = run(whole.checkpoint("step_2") / "resume.yaml", "host-resumed")
    assert differences(whole.state()["model"], resumed.state()["model"]) != []


def test_a_plain_run_goes_on_with_denoising(folder, plain):
    config = run_config(folder, denoising={"scd": {"prob": 1}})
    config["job"]["runner_state_path"] = str(plain.checkpoint("step_2"))
    denoising = run(config, "denoising")
    assert any("start fresh" in str(line) for line in denoising.lines)
    assert denoising.logged("train/step")[0] == 2
    assert denoising.unit.optimizer.state[denoising.unit.model.module.backbone.norm.affine_weight]["step"] == 5
    added = denoising.unit.model.module.denoising["scd"]["noise_head"].linear.weight
    assert denoising.unit.optimizer.state[added]["step"] == 2, "its own two steps"
    # With another task besides, what the first one added keeps what the optimiser knows of it.
    config = run_config(folder, denoising={"scd": {"prob": 0.5}, "dens": {}}, steps=6)
    config["job"]["runner_state_path"] = str(denoising.checkpoint())
    both = run(config, "both")
    of_scd, of_dens = (both.unit.model.module.denoising[name]["noise_head"].linear.weight for name in ("scd", "dens"))
    assert both.unit.optimizer.state[of_scd]["step"] == 4
    assert both.unit.optimizer.state[of_dens]["step"] == 2


def test_the_first_step_after_the_change_starts_from_the_plain_runs_weights(folder, plain):
    """A clean pass is the plain model, so the terms of its loss are those of a plain run at this step."""
    config = run_config(folder, denoising={"scd": {"prob": 1}}, steps=3)
    config["job"]["runner_state_path"] = str(plain.checkpoint("step_2"))
    terms = next(line for line in run(config, "first").lines if isinstance(line, dict) and "train/energy_loss" in line)
    total = terms["train/energy_loss"] + terms["train/forces_loss"]
    assert total == pytest.approx(plain.logged("train/loss")[2], rel=1e-5)


def test_a_denoising_run_goes_on_plain(folder, plain):
    config = run_config(folder, denoising={"scd": {"prob": 1}})
    stored = run(config, "to-be-plain")
    config = run_config(folder, steps=6)
    config["job"]["runner_state_path"] = str(stored.checkpoint())
    dropped = run(config, "dropped")
    assert dropped.logged("train/step") == [4, 5]
    assert set(dropped.state()["model"]) == set(plain.state()["model"])


def test_a_checkpoint_that_lacks_other_weights_is_refused_by_name(folder, plain):
    config = run_config(folder, model=model_config(num_layers=3), denoising={"scd": {"prob": 1}})
    config["job"]["runner_state_path"] = str(plain.checkpoint("step_2"))
    with pytest.raises(ConfigError, match=r"of another model.*blocks\.2"):
        run(config, "other")


def test_the_config_to_resume_from_names_the_hosts_model_and_our_unit(folder):
    stored = run(run_config(folder, denoising={"noisy_nodes": {}}, steps=1), "named")
    text = (stored.checkpoint() / "resume.yaml").read_text()
    assert OURS in text
    assert "fairchem.core.models.base.HydraModel" in text
    assert "Denoising" not in text.replace(OURS, "")


def _metrics(finished):
    """What was logged of denoising steps, a dictionary each."""
    lines = [line for line in finished.lines if isinstance(line, dict) and "train/denoising_pos_mae" in line]
    return [{key.removeprefix("train/"): value for key, value in line.items()} for line in lines]
