"""A real SLURM of one machine: a job that is preempted and requeued goes on where it was."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support import tiny_config

ROOT = Path(__file__).parent.parent
SLURM = ROOT / "benchmarks" / "slurm"
CLUSTER = SLURM / "cluster"
PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
MISSING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name, path=PATH) is None]
needs_slurm = pytest.mark.skipif(
    bool(MISSING), reason=f"no {', '.join(MISSING)}: apt-get install slurmctld slurmd slurm-client munge"
)

EVERY, LAST = 5, 60  # a checkpoint every so many steps; the last step
DAEMONS = ("munged", "slurmctld", "slurmd.node1")


def call(*words: Any, **variables: str) -> str:
    """What a command prints, in an environment with the tests' Python and some variables of SLURM's.

    Raises:
        AssertionError: it failed.
    """
    # Where the tests run inside a job themselves, that job is none of theirs.
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env={**outer, "PATH": PATH, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout.strip()


def until(reached: Callable[[], Any], what: Callable[[], str], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, f"not within {seconds} s: {what()}"
        time.sleep(0.2)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Path]:
    """Folder of a SLURM of two nodes that runs for as long as the test does."""
    folder = tmp_path / "slurm"
    try:
        # A grace period that a busy machine needs; the job leaves as soon as it can.
        assert call(CLUSTER, "start", folder, NODES="2", CPUS="1", GRACE="120") == str(folder / "slurm.conf")
        yield folder
    finally:
        call(CLUSTER, "stop", folder)


def running(folder: Path) -> dict[str, int]:
    """The daemons' process ids, of those that run."""
    found = {}
    for name in DAEMONS:
        file = folder / f"{name}.pid"
        number = int(file.read_text() or 0) if file.exists() else 0
        command = Path(f"/proc/{number}/cmdline")
        if command.exists() and command.read_bytes():
            found[name] = number
    return found


class Job:
    """A submitted job, its log, and what the cluster says of it."""

    def __init__(self, cluster: Path, log: Path, *words: Any) -> None:
        self.cluster, self.log = cluster, log
        self.id = self.slurm("sbatch", "--parsable", f"--output={log}", *words)

    def slurm(self, *words: Any) -> str:
        return call(*words, SLURM_CONF=str(self.cluster / "slurm.conf"))

    def says(self, key: str) -> str:
        return re.search(rf"\b{key}=(\S*)", self.slurm("scontrol", "show", "job", self.id))[1]

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def starts(self) -> list[str]:
        """What each start wrote."""
        return re.split(r"^\S+ start \d+ of job ", self.text(), flags=re.MULTILINE)[1:]

    def steps(self, start: int) -> list[int]:
        """The steps that a start has done, the first start being 0."""
        starts = self.starts()
        text = starts[start] if start < len(starts) else ""
        return [int(float(step)) for step in re.findall(r"\(INFO\).*[ ,]step: ([\d.e+]+)", text)]

    def wait(self, reached: Callable[[], Any]) -> None:
        def over() -> bool:
            done = reached()
            assert done or self.says("JobState") not in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), self.end()
            return bool(done)

        until(over, self.end)

    def end(self) -> str:
        return f"{self.slurm('scontrol', 'show', 'job', self.id)}\n{self.text()[-3000:]}"

    def wait_until_requeued(self) -> None:
        self.wait(lambda: self.says("JobState") == "PENDING")

    def start_again(self) -> None:
        # SLURM itself lets two minutes pass.
        self.slurm("scontrol", "update", f"JobId={self.id}", "StartTime=now")


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=False)


def same(one: Any, other: Any, at: str = "") -> None:
    """Whether two nested values are the same to the last bit."""
    assert type(one) is type(other), at
    if torch.is_tensor(one):
        assert torch.equal(one, other), at
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), at
        for key in one:
            same(one[key], other[key], f"{at}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), at
        for i, pair in enumerate(zip(one, other, strict=True)):
            same(*pair, f"{at}[{i}]")
    else:
        assert one == other, at


def write_config(folder: Path) -> Path:
    """Two steps an epoch on two ranks, with all that draws random numbers."""
    optim = {"batch_size": 2, "max_epochs": LAST // 2, "checkpoint_every": EVERY, "eval_every": LAST // 2}
    config = tiny_config(folder / "data", denoising={"dens": {"prob": 0.5}, "scd": {"prob": 0.2}}, optim=optim)
    config["model"]["backbone"].update(alpha_drop=0.1, drop_path_rate=0.1)
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(config))
    return path


@needs_slurm
def test_a_preempted_and_requeued_job_ends_where_an_uninterrupted_run_does(cluster, tmp_path):
    """Once it is told beforehand, and stores the step it is at; once it is killed, and goes back to a checkpoint."""
    config = write_config(tmp_path)
    options = ("--cpu", "--run-dir", tmp_path, "--print-every", 1)
    plain = ("--mode", "train", "--config-yml", config, "--num-gpus", 2, "--timestamp-id", "plain", *options)
    call("fairchem", *plain)

    job = Job(cluster, tmp_path / "job.log", "--nodes=2", SLURM / "train.sbatch", config, *options)
    folder = tmp_path / "checkpoints" / f"slurm-{job.id}"

    # Preempted, by a job of a partition that goes first.
    job.wait(lambda: len(job.steps(0)) > 2)
    Job(cluster, tmp_path / "other.log", "--partition=high", "--ntasks=1", "--wrap", "sleep 1")
    job.wait_until_requeued()
    assert "told to make way" in job.starts()[0]
    stored = checkpoint(folder)["step"]
    done = job.steps(0)[-1]
    assert done <= stored <= done + 1  # a step's line comes after it
    assert stored < LAST
    job.start_again()

    # Killed.
    wanted = (stored // EVERY + 1) * EVERY + 2
    job.wait(lambda: wanted in job.steps(1))
    job.slurm("scontrol", "requeue", job.id)
    job.wait_until_requeued()
    assert job.steps(1)[0] == stored + 1
    assert "told to make way" not in job.starts()[1]
    older = checkpoint(folder)["step"]
    assert older % EVERY == 0
    assert wanted - EVERY < older < LAST
    job.start_again()

    job.wait(lambda: job.says("JobState") == "COMPLETED")
    assert (job.says("Restarts"), job.says("ExitCode")) == ("2", "0:0")
    assert job.steps(2) == list(range(older + 1, LAST + 1))
    once, interrupted = checkpoint(tmp_path / "checkpoints" / "plain"), checkpoint(folder)
    assert interrupted["step"] == LAST
    for key in ("step", "state_dict", "ema", "optimizer", "scheduler", "best_val_metric"):
        same(once[key], interrupted[key], key)


@needs_slurm
def test_a_cluster_stops_what_it_started_and_no_more(tmp_path):
    folder = tmp_path / "slurm"
    try:
        conf = call(CLUSTER, "start", folder)
        first = running(folder)
        assert set(first) == set(DAEMONS)
        assert call(CLUSTER, "start", folder) == conf
        assert running(folder) == first
        Job(folder, tmp_path / "job.log", "--ntasks=1", "--wrap", "sleep 1000")
    finally:
        call(CLUSTER, "stop", folder)
    assert not running(folder)
    call(CLUSTER, "stop", folder)

    # An id that another process has by now.
    other = subprocess.Popen(["sleep", "1000"])
    try:
        (folder / "slurmd.node1.pid").write_text(str(other.pid))
        call(CLUSTER, "stop", folder)
        assert other.poll() is None
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()


def test_a_cluster_says_which_packages_it_needs(tmp_path):
    bin = tmp_path / "bin"
    bin.mkdir()
    for name in ("bash", "mkdir", "cat", "hostname", "id"):
        (bin / name).symlink_to(shutil.which(name))
    script = CLUSTER.read_text().replace(":/usr/sbin:/sbin", "")
    done = subprocess.run(
        ["bash", "-c", script, "cluster", "start", tmp_path / "slurm"],
        env={"PATH": str(bin)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "apt-get install slurmctld slurmd slurm-client munge" in done.stderr
    assert not list((tmp_path / "slurm").iterdir())


@pytest.mark.parametrize("option", ["--submit", "--num-gpus=2", "--num-nodes=2"])
def test_a_rank_leaves_the_number_of_ranks_to_slurm(option, monkeypatch):
    words = [str(SLURM / "rank.py"), "--mode", "train", "--config-yml", "none.yml", option]
    monkeypatch.setattr(sys, "argv", words)
    before = signal.getsignal(signal.SIGUSR2)
    try:
        with pytest.raises(SystemExit, match="--ntasks-per-node"):
            runpy.run_path(words[0], run_name="__main__")
    finally:
        signal.signal(signal.SIGUSR2, before)
