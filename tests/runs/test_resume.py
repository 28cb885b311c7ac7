"""A run that stops, anywhere, goes on as if it had not."""

from __future__ import annotations

import os
import signal
import sys

import pytest
import torch

from fairchem_scd.fairchem1 import checkpoint
from fairchem_scd.testing import make_trainer
from tests.support.configs import pretraining, tiny_config
from tests.support.runs import StoppedError, assert_same, folder_of, state_of, stopped_at

# Dropout and drop path, and the host's random edge frames.
DROPOUT = {
    "alpha_drop": 0.2,
    "drop_path_rate": 0.2,
    "lmax_list": [1],
    "mmax_list": [1],
    "num_layers": 1,
    "num_distance_basis": 16,
}
SCHEDULE = {"num_steps": 3, "std_low": 0.01, "std_high": 0.1}
RUNS = {
    "dens": lambda data: tiny_config(data, denoising={"dens": {"prob": 0.5}}),
    "scd": lambda data: tiny_config(data, denoising={"scd": {"prob": 1.0, "noise_scale": "running"}}),
    "pre-training": lambda data: pretraining(data, denoising={"scd": SCHEDULE}),
    "noisy nodes": lambda data: tiny_config(data, denoising={"noisy_nodes": {}, "drop_path": {"steps": 5}}),
}


def config_of(data, name="scd", **optim):
    """Two epochs of four steps, a checkpoint every step and validation every third."""
    config = RUNS[name](data)
    config["model"]["backbone"].update(DROPOUT)
    config["optim"].update(batch_size=2, max_epochs=2, checkpoint_every=1, eval_every=3, **optim)
    return config


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The end of uninterrupted runs."""
    ends = {}

    def get(name):
        if name not in ends:
            trainer = make_trainer(config_of(data, name), tmp_path_factory.mktemp("whole"))
            trainer.train(disable_eval_tqdm=True)
            ends[name] = state_of(trainer)
        return ends[name]

    return get


def resumed(config, folder, path):
    trainer = make_trainer(config, folder)
    torch.manual_seed(1)  # whatever the random state was
    trainer.load_checkpoint(str(path))
    return trainer


@pytest.mark.parametrize("name", RUNS)
def test_stopping_and_resuming_is_never_having_stopped(name, whole, data, tmp_path):
    """Bit for bit: within an epoch, and just after a validation, of which the checkpoint knows nothing."""
    trainer = make_trainer(config_of(data, name), tmp_path / "start")
    for stop in (3, 7):
        stopped_at(trainer, stop)
        path = folder_of(trainer) / "checkpoint.pt"
        assert checkpoint.read(path)["step"] == stop - 1
        trainer = resumed(config_of(data, name), tmp_path / str(stop), path)
    trainer.train(disable_eval_tqdm=True)
    assert trainer.step == 8
    assert_same(state_of(trainer), whole(name))
    if name == "pre-training":  # the scale of whose noise is the running one, since it has a schedule
        assert 0.01 < float(trainer.model.denoising["scd"]["scale"].scale) < 0.1


PLACES = {
    "before the forward": ("_forward", "before", 5),
    "after the forward": ("_compute_loss", "before", 5),
    "before the update": ("_backward", "before", 5),
    "after the update": ("_backward", "after", 5),
    "in validation": ("_aggregate_metrics", "before", 6),
    "while the average stands in": ("_compute_metrics", "validating", 6),
    "while the best is written": ("update_best", "before", 6),
}


def call_at(trainer, place, action, step=None):
    """Have a trainer do something at a place in its run, and stop there."""
    name, when, usual = PLACES[place]
    step = step or usual
    original = getattr(trainer, name)

    def method(*args, **kwargs):
        here = trainer.step == step and (when != "validating" or trainer._validating)
        if here and when != "after":
            action()
            raise StoppedError
        out = original(*args, **kwargs)
        if here:
            action()
            raise StoppedError
        return out

    setattr(trainer, name, method)
    with pytest.raises(StoppedError):
        trainer.train(disable_eval_tqdm=True)


@pytest.mark.parametrize("place", PLACES)
def test_a_checkpoint_asked_for_anywhere_is_of_a_whole_step(place, whole, data, tmp_path):
    """As preemption does: the host's Runner saves from a signal handler, wherever training is."""
    trainer = make_trainer(config_of(data), tmp_path / "first")
    call_at(trainer, place, lambda: trainer.save(checkpoint_file="checkpoint.pt", training_state=True))
    stored = checkpoint.read(folder_of(trainer) / "checkpoint.pt")
    assert stored["step"] == PLACES[place][2] - (
        place in ("before the forward", "after the forward", "before the update")
    )
    again = resumed(config_of(data), tmp_path / "second", folder_of(trainer) / "checkpoint.pt")
    again.train(disable_eval_tqdm=True)
    assert_same(state_of(again), whole("scd"))


def test_saving_in_validation_leaves_validation_as_it_was(data, tmp_path):
    trainer = make_trainer(config_of(data), tmp_path)
    trainer.train(disable_eval_tqdm=True)
    torch.manual_seed(0)
    expected = trainer.validate(disable_tqdm=True)
    weights = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    original = trainer._compute_metrics

    def saving(*args, **kwargs):
        trainer.save(checkpoint_file="checkpoint.pt", training_state=True)
        return original(*args, **kwargs)

    trainer._compute_metrics = saving
    torch.manual_seed(0)
    assert trainer.validate(disable_tqdm=True) == expected
    assert all(torch.equal(value, weights[key]) for key, value in trainer.model.state_dict().items())
    stored = checkpoint.read(folder_of(trainer) / "checkpoint.pt")["state_dict"]
    assert all(torch.equal(value, weights[key]) for key, value in stored.items())


def test_a_signal_in_the_middle_of_an_update_waits_for_its_end(data, tmp_path):
    trainer = make_trainer(config_of(data), tmp_path)
    seen = []
    step = trainer.optimizer.step

    def interrupted(*args, **kwargs):
        if trainer.step == 5:
            os.kill(os.getpid(), signal.SIGUSR2)
        return step(*args, **kwargs)

    def preempted(number, frame):
        seen.append(trainer._whole_steps)
        raise StoppedError

    trainer.optimizer.step = interrupted
    before = signal.signal(signal.SIGUSR2, preempted)
    try:
        with pytest.raises(StoppedError):
            trainer.train(disable_eval_tqdm=True)
        assert signal.getsignal(signal.SIGUSR2) is preempted
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert seen == [5]


def test_a_schedule_that_follows_validation_is_where_it_was(data, tmp_path):
    """ReduceLROnPlateau, stopped in a validation and right after one: what was lost of it is made up for."""

    def config():
        # "max": an error that falls is no progress, so that the rate changes.
        config = config_of(data, "dens", scheduler="ReduceLROnPlateau", mode="max", factor=0.5, patience=0)
        config["optim"].pop("scheduler_params")
        config["optim"]["eval_every"] = 2
        return config | {"trainer": "fairchem_scd.DenoisingTrainer"}

    expected = make_trainer(config(), tmp_path / "whole")
    expected.train(disable_eval_tqdm=True)
    assert expected.optimizer.param_groups[0]["lr"] < 1e-3
    trainer = make_trainer(config(), tmp_path / "start")
    call_at(trainer, "in validation", lambda: None, step=4)
    trainer = resumed(config(), tmp_path / "again", folder_of(trainer) / "checkpoint.pt")
    stopped_at(trainer, 7)
    trainer = resumed(config(), tmp_path / "and again", folder_of(trainer) / "checkpoint.pt")
    trainer.train(disable_eval_tqdm=True)
    assert trainer.scheduler.scheduler.state_dict() == expected.scheduler.scheduler.state_dict()
    assert_same(state_of(trainer), state_of(expected))


def test_a_validation_is_not_made_twice(data, tmp_path):
    """A checkpoint asked for after it, as by preemption, knows of it."""
    trainer = make_trainer(config_of(data), tmp_path)
    call_at(trainer, "before the forward", lambda: trainer.save(), step=4)
    again = resumed(config_of(data), tmp_path / "again", folder_of(trainer) / "checkpoint.pt")
    assert again.step == 3
    again.validate = None  # not to be called
    stopped_at(again, 4)


@pytest.mark.parametrize(
    ("batch", "says"), [(4, "epoch 1 (it was 0.5) of 2: 2 steps are left"), (8, "the run is over")]
)
def test_another_batch_says_what_changes_and_goes_on_to_its_end(batch, says, data, tmp_path, caplog):
    trainer = make_trainer(config_of(data), tmp_path)
    stopped_at(trainer, 3)
    assert "the checkpoint is of" not in caplog.text
    again = resumed(config_of(data), tmp_path / "same", folder_of(trainer) / "checkpoint.pt")
    assert "the checkpoint is of" not in caplog.text
    config = config_of(data)
    config["optim"]["batch_size"] = batch
    again = resumed(config, tmp_path / "other", folder_of(trainer) / "checkpoint.pt")
    assert (
        f"is of 1 rank(s) × optim.batch_size 2 = 2 structures a step; this run has 1 × {batch} = {batch}" in caplog.text
    )
    assert f"An epoch has {8 // batch} steps now, so step 2 counts as " in caplog.text
    assert says in caplog.text
    assert "As before it would be with optim.batch_size: 2" in caplog.text
    again.train(disable_eval_tqdm=True)
    assert again.step == (4 if batch == 4 else 2)


@pytest.mark.parametrize("scheduler", ["LambdaLR", "MultiStepLR"])
def test_a_resumed_schedule_is_where_it_was(scheduler, data, tmp_path):
    """Also from a checkpoint of the host's own trainer, which is a step behind."""

    def config(trainer):
        config = config_of(data, "dens", scheduler=scheduler)
        if scheduler == "MultiStepLR":
            config["optim"]["scheduler_params"] = {"milestones": [2, 3], "gamma": 0.3}
        if trainer is not None:
            config.update(trainer=trainer, task={})
        return config

    rates = []
    for trainer in (None, "equiformerv2_forces"):
        first = make_trainer(config(trainer), tmp_path / f"{trainer}")
        stopped_at(first, 3)
        again = make_trainer(config(None), tmp_path / f"{trainer} again")
        again.load_checkpoint(str(folder_of(first) / "checkpoint.pt"))
        rates.append(again.optimizer.param_groups[0]["lr"])
        assert again.optimizer.param_groups[0]["lr"] == first.optimizer.param_groups[0]["lr"]
    assert rates[0] == rates[1]


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(data, tmp_path, monkeypatch):
    trainer = make_trainer(config_of(data), tmp_path)
    stopped_at(trainer, 3)
    path = folder_of(trainer) / "checkpoint.pt"
    before = path.read_bytes()
    save = torch.save

    def full(state, target, *args, **kwargs):
        save({"half": 1}, target)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"checkpoint\.pt could not be written .*No space left.* the one before is whole"):
        trainer.save(checkpoint_file="checkpoint.pt", training_state=True)
    assert path.read_bytes() == before
    assert {file.name for file in path.parent.iterdir()} <= {"checkpoint.pt", "best_checkpoint.pt", "normalizers.pt"}


def test_what_killed_processes_left_is_removed(data, tmp_path):
    trainer = make_trainer(config_of(data), tmp_path)
    left = folder_of(trainer) / ".checkpoint.pt.part-1234"
    left.write_bytes(b"half")
    stopped_at(trainer, 3)
    assert not left.exists()


@pytest.mark.parametrize("name", ["dens", "pre-training"])
def test_gradients_that_are_not_finite_never_reach_the_optimiser(name, data, tmp_path, caplog):
    trainer = make_trainer(config_of(data, name), tmp_path)
    compute, states = trainer._compute_loss, {}

    def poisoned(out, batch):
        loss = compute(out, batch)
        if trainer.model.training and trainer.step in (5, 6):
            states[trainer.step] = {
                part: {k: v.clone() for k, v in values.items()}
                for part, values in state_of(trainer).items()
                if part != "rate"
            }
            return loss * (torch.nan if trainer.step == 5 else torch.inf)
        if trainer.model.training and trainer.step == 7:
            now = state_of(trainer)
            for part in ("model", "optimizer"):
                for key, value in states[5][part].items():
                    if "scale" not in key:  # of the noise, which is sound
                        assert torch.equal(now[part][key], value), key
        return loss

    trainer._compute_loss = poisoned
    trainer.train(disable_eval_tqdm=True)
    assert trainer.step == 8
    assert "step 5: gradients that are not finite" in caplog.text
    assert "2 steps had gradients that are not finite and changed nothing; the first was step 5" in caplog.text
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())


def test_a_run_that_has_diverged_ends(data, tmp_path, monkeypatch):
    monkeypatch.setattr("fairchem_scd.fairchem1.trainer.resume._PATIENCE", 3)
    trainer = make_trainer(config_of(data), tmp_path)
    trainer._patience = 3
    compute = trainer._compute_loss
    trainer._compute_loss = lambda out, batch: compute(out, batch) * torch.nan
    with pytest.raises(RuntimeError, match=r"3 steps in a row, up to step 3, .* diverged"):
        trainer.train(disable_eval_tqdm=True)


def test_a_checkpoint_asked_for_while_one_is_written_is_whole(data, tmp_path):
    """A signal's handler stores one and ends the process, in the middle of writing another to the same file."""

    class Signalled:
        """What pickling comes across half-way."""

        def __reduce__(self):
            os.kill(os.getpid(), signal.SIGUSR2)
            return int, ()

    trainer = make_trainer(config_of(data), tmp_path)
    trainer.step = trainer._whole_steps = 3

    def stop(*_):
        trainer.save(checkpoint_file="checkpoint.pt")
        sys.exit(75)

    before = signal.signal(signal.SIGUSR2, stop)
    try:
        with pytest.raises(SystemExit):
            trainer.save(metrics={"": Signalled()}, checkpoint_file="checkpoint.pt")
    finally:
        signal.signal(signal.SIGUSR2, before)
    stored = checkpoint.read(folder_of(trainer) / "checkpoint.pt")
    assert stored["step"] == 3
    assert stored["state_dict"].keys() == trainer.model.state_dict().keys()
    assert not [path.name for path in folder_of(trainer).iterdir() if ".part-" in path.name]
