"""Training on a GPU by the host's loop: mixed precision, resuming, every config, and how often the CPU waits."""

from __future__ import annotations

import warnings

import pytest
import torch

from fairchem_scd.fairchem1 import checkpoint
from fairchem_scd.testing import collate, make_trainer
from tests.support.config_files import load, oc22_data, sample_data, small, train
from tests.support.configs import CONFIGS, pretraining, tiny_config
from tests.support.runs import folder_of, state_of, step_of, stopped_at
from tests.support.waits import assert_few_waits

# Those that need a checkpoint to start from, or data of their own, have tests of their own.
ALONE = ("finetune_oc20", "quickstart_finetune", "dens_oc22", "scd_oc22", "slurm")
ON_SAMPLES = sorted(path.stem for path in CONFIGS.glob("*.yml") if path.stem not in (*ALONE, "molecules"))


RUNS = {
    "dens": (tiny_config, {"dens": {"prob": 0.5}}),
    "scd": (tiny_config, {"scd": {"prob": 1.0, "noise_scale": "running"}}),
    "pre-training": (pretraining, {"scd": {"num_steps": 3, "std_low": 0.01, "std_high": 0.1}}),
    "noisy nodes": (tiny_config, {"noisy_nodes": {}}),
}


def config_of(data, name):
    """Two epochs of four steps, with dropout and drop path, and a checkpoint every step."""
    config, block = RUNS[name]
    config = config(data, denoising=block)
    config["model"]["backbone"].update(alpha_drop=0.2, drop_path_rate=0.2)
    config["optim"].update(batch_size=2, max_epochs=2, checkpoint_every=1, eval_every=3)
    return config


def is_amp(name):
    """Whether the config's header says to train it in mixed precision."""
    return "--amp" in (CONFIGS / f"{name}.yml").read_text()


@pytest.mark.parametrize("name", RUNS)
def test_mixed_precision_trains_every_task_under_the_hosts_scaler(name, data, tmp_path, device):
    losses = {}
    for amp in (False, True):
        trainer = make_trainer(config_of(data, name), tmp_path / str(amp), cpu=False, amp=amp)
        assert trainer.device == device
        assert (trainer.scaler is not None) == (amp and device.type == "cuda")
        before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
        batch = next(iter(trainer.train_loader))
        torch.manual_seed(3)
        with torch.autocast("cuda", enabled=trainer.scaler is not None):
            losses[amp] = float(step_of(trainer, batch)[1])
        trainer._step, trainer.step = None, 0
        trainer.train(disable_eval_tqdm=True)
        after = trainer.model.state_dict()
        assert all(value.isfinite().all() for value in after.values())
        assert any(not torch.equal(after[key], value) for key, value in before.items())
        if trainer.scaler is not None:
            assert trainer.scaler.get_scale() >= 2**10  # it was 2**16, and is halved after a step that was skipped
    assert losses[True] == pytest.approx(losses[False], rel=0.05)


def test_recomputing_the_clean_pass_is_exact_in_mixed_precision(data, tmp_path, device):
    losses, gradients = [], []
    for number, more in enumerate(({}, {"recompute_clean_pass": True})):
        config = config_of(data, "scd")
        config["task"]["denoising"] = {"scd": more}
        trainer = make_trainer(config, tmp_path / str(number), cpu=False, amp=True)
        torch.manual_seed(3)
        with torch.autocast("cuda", enabled=trainer.scaler is not None):
            _, loss = step_of(trainer, next(iter(trainer.train_loader)))
        loss.backward()
        losses.append(float(loss))
        gradients.append({name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None})
    assert losses[0] == losses[1]
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()) + 1e-12)


@pytest.mark.parametrize("name", ["scd", "dens"])
def test_stopping_and_resuming_in_mixed_precision_is_never_having_stopped(name, data, tmp_path, device):
    def begun(folder):
        return make_trainer(config_of(data, name), tmp_path / folder, cpu=False, amp=True)

    whole = begun("whole")
    whole.train(disable_eval_tqdm=True)
    trainer = begun("start")
    stopped_at(trainer, 5)
    path = folder_of(trainer) / "checkpoint.pt"
    assert (checkpoint.read(path)["amp"] is not None) == (device.type == "cuda")
    trainer = begun("rest")
    torch.manual_seed(1)  # whatever the random state was
    trainer.load_checkpoint(str(path))
    trainer.train(disable_eval_tqdm=True)
    assert trainer.step == 8
    if whole.scaler is not None:
        assert trainer.scaler.state_dict() == whole.scaler.state_dict()
    expected, found = state_of(whole), state_of(trainer)
    for part in ("model", "average", "rate"):
        for key, value in expected[part].items():
            slack = 1e-3 * float(value.abs().max()) if value.is_floating_point() else 0
            torch.testing.assert_close(found[part][key], value, rtol=1e-3, atol=slack, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", ON_SAMPLES)
def test_config_trains(name, data, tmp_path, device):
    trainer, _ = train(small(load(name), *sample_data(data)), tmp_path, cpu=False, amp=is_amp(name))
    assert next(trainer.model.parameters()).device == device


@pytest.mark.parametrize("name", ["dens_oc22", "scd_oc22"])
def test_oc22_config_trains(name, rows, tmp_path, device):
    config = small(load(name), *oc22_data(tmp_path, rows))
    references = config["dataset"]["train"]["transforms"]["element_references"]["energy"]
    references["file"] = str(tmp_path / "references.npz")
    trainer, _ = train(config, tmp_path, cpu=False, amp=is_amp(name))
    assert next(trainer.model.parameters()).device == device


@pytest.mark.parametrize(
    ("first", "second"), [("scd_pretrain_oc20", "finetune_oc20"), ("quickstart_pretrain", "quickstart_finetune")]
)
def test_pre_training_and_fine_tuning_configs_train_one_after_the_other(first, second, data, tmp_path, device):
    trainer, _ = train(small(load(first), *sample_data(data)), tmp_path / "first", cpu=False, amp=is_amp(first))
    config = small(load(second), *sample_data(data))
    config["model"]["finetune_config"]["starting_checkpoint"] = str(folder_of(trainer) / "checkpoint.pt")
    trainer, _ = train(config, tmp_path / "second", cpu=False, amp=is_amp(second))
    assert next(trainer.model.parameters()).device == device


@pytest.mark.parametrize("block", [{"dens": {"prob": 0.5}}, {"scd": {"prob": 0.5}}, {"noisy_nodes": {"prob": 0.5}}])
def test_a_denoising_step_waits_no_more_than_the_documentation_says(block, rows, data, tmp_path, device):
    if device.type != "cuda":
        pytest.skip("torch counts what waits for CUDA alone; tests/fairchem1/test_devices.py does it without a GPU")
    trainer = make_trainer(tiny_config(data, denoising=block), tmp_path, cpu=False)

    class Waits(list):
        """The files from which torch says that the CPU waits for the device."""

        def __len__(self):
            self[:] = [caught.filename for caught in seen if "synchronizing CUDA" in str(caught.message)]
            return super().__len__()

        def clear(self):
            seen.clear()

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            assert_few_waits(trainer, lambda: collate(rows[:2]).pin_memory(), Waits())
        finally:
            torch.cuda.set_sync_debug_mode("default")
