"""The host's Runner under submitit: pickled, run in fresh processes, preempted, resubmitted."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
import yaml
from fairchem.core._cli import Runner
from submitit import LocalExecutor

from benchmarks.soak import RUN, config, train
from fairchem_scd.fairchem1 import checkpoint
from tests.support.configs import host_config


def test_a_preempted_job_is_resubmitted_and_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    """submitit's own executor and signal; the job's `checkpoint()` falls wherever training is."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tiny = config(tmp_path, epochs=12, task={"scd": {"noise_scale": "running", "prob": 0.5}}, every=4)
    (tmp_path / "config.yml").write_text(yaml.safe_dump(tiny))
    # As `fairchem --submit` makes it; without SLURM's own variables the host sets up one local rank.
    options = host_config(tmp_path / "config.yml", timestamp_id=RUN, run_dir=str(tmp_path))
    executor = LocalExecutor(tmp_path / "jobs")
    executor.update_parameters(timeout_min=10)
    job = executor.submit(Runner(), options)
    path = tmp_path / "checkpoints" / RUN / "checkpoint.pt"
    deadline = time.monotonic() + 240
    try:
        while not path.exists() and time.monotonic() < deadline and not job.done():
            time.sleep(0.05)
        # To the task itself, as SLURM does; the controller is submitit's stand-in for SLURM.
        (task,) = Path(f"/proc/{job._process.pid}/task/{job._process.pid}/children").read_text().split()
        os.kill(int(task), signal.SIGUSR2)
        job.result()
    finally:
        job._process.terminate()
    log = job.stdout() + job.stderr()
    assert "Caught signal SIGUSR2" in log
    assert "Checkpointing callback is triggered" in log
    assert log.count("Loading model: ") == 2
    whole = tmp_path / "whole"
    whole.mkdir()
    train(whole, tiny)
    ended, expected = (checkpoint.read(f / "checkpoints" / RUN / "checkpoint.pt") for f in (tmp_path, whole))
    assert ended["step"] == expected["step"] == 48
    for key, value in expected["state_dict"].items():
        assert torch.equal(ended["state_dict"][key], value), key
