"""A real SLURM of one machine: a job that is preempted and requeued goes on where it was."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from submitit.slurm.slurm import _make_sbatch_string

from fairchem_scd.testing import make_trainer, on_ranks
from tests.support.configs import host_config, tiny_config

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "slurm"
CLUSTER = Path(__file__).parent / "slurm_cluster"
PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
MISSING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name, path=PATH) is None]
needs_slurm = pytest.mark.skipif(
    bool(MISSING), reason=f"no {', '.join(MISSING)}: apt-get install slurmctld slurmd slurm-client munge"
)

EVERY, LAST = 5, 80  # a checkpoint every so many steps; the last step
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
def folder() -> Iterator[Path]:
    """For a SLURM, the names of whose sockets are to be short; pytest's folders have long ones."""
    with tempfile.TemporaryDirectory(prefix="slurm") as made:
        yield Path(made) / "one"


@pytest.fixture
def cluster(folder: Path) -> Iterator[Path]:
    """Folder of a SLURM of two nodes that runs for as long as the test does."""
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
            assert "launch_failed" not in self.says("Reason"), self.end()
            assert done or self.says("JobState") not in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), self.end()
            return bool(done)

        until(over, self.end)

    def end(self) -> str:
        return f"{self.slurm('scontrol', 'show', 'job', self.id)}\n{self.text()[-3000:]}"

    def process(self, rank: int) -> int:
        """The id of a rank's process."""
        wanted = {f"SLURM_JOB_ID={self.id}", f"SLURM_PROCID={rank}", f"SLURM_CONF={self.cluster / 'slurm.conf'}"}
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # of another user, or gone
                command = (path / "cmdline").read_text().split("\0")
                variables = set((path / "environ").read_text().split("\0"))
                if str(SLURM.relative_to(ROOT) / "rank.py") in command and wanted <= variables:
                    found.append(int(path.name))
        return min(found)  # the others are its loader's workers

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


def uninterrupted(config: Path, folder: Path) -> dict[str, Any]:
    """Where the run ends on two ranks without SLURM."""
    on_ranks(2, folder, lambda _: make_trainer(host_config(config), folder, identifier="plain").train(True))
    (run,) = (folder / "checkpoints").iterdir()
    return checkpoint(run)


@needs_slurm
@pytest.mark.slow  # minutes, most of them for starting Python
@pytest.mark.parametrize("events", [["preempted"], ["killed", "preempted", "requeued"]], ids="-".join)
def test_a_job_that_is_interrupted_ends_where_an_uninterrupted_run_does(events, cluster, tmp_path):
    """Killed without notice it goes back to a checkpoint; preempted or requeued, it stores the step it is at."""
    config = write_config(tmp_path)
    once = uninterrupted(config, tmp_path / "plain")
    options = ("--cpu", "--run-dir", tmp_path, "--print-every", 1)
    job = Job(cluster, tmp_path / "job.log", "--nodes=2", SLURM / "train.sbatch", config, *options)
    folder = tmp_path / "checkpoints" / f"slurm-{job.id}"

    stored = 0
    for start, event in enumerate(events):
        job.wait(lambda start=start: len(job.steps(start)) > EVERY + 1)
        assert job.steps(start)[0] == stored + 1
        if event == "killed":  # a rank dies: the job is over at once, and says so
            os.kill(job.process(rank=0), signal.SIGKILL)
            until(lambda: job.says("JobState") == "FAILED", job.end, seconds=60)
            job.slurm("scontrol", "requeue", job.id)
        elif event == "preempted":  # by a job of a partition that goes first
            Job(cluster, tmp_path / "other.log", "--partition=high", "--ntasks=1", "--wrap", "sleep 1")
            job.wait_until_requeued()
        else:  # by hand: SLURM sends SIGTERM, and soon after SIGKILL
            job.slurm("scontrol", "requeue", job.id)
            job.wait_until_requeued()
        assert ("told to make way" in job.starts()[start]) == (event == "preempted")
        stored, done = checkpoint(folder)["step"], job.steps(start)[-1]
        assert stored < LAST
        if event == "killed":
            assert stored % EVERY == 0
            assert done - EVERY < stored
        else:
            assert 0 <= stored - done <= 1  # a step's line comes after it
        job.start_again()

    job.wait(lambda: job.says("JobState") == "COMPLETED")
    assert (job.says("Restarts"), job.says("ExitCode")) == (str(len(events)), "0:0")
    assert job.steps(len(events)) == list(range(stored + 1, LAST + 1))
    interrupted = checkpoint(folder)
    assert interrupted["step"] == LAST
    for key in ("step", "state_dict", "ema", "optimizer", "scheduler", "best_val_metric"):
        same(once[key], interrupted[key], key)


@needs_slurm
def test_a_cluster_stops_what_it_started_and_no_more(folder, tmp_path):
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


@needs_slurm
def test_sbatch_takes_the_slurm_block_of_the_example(folder, tmp_path):
    """The job that `--submit` would submit, as its header says, up to where it would be queued."""
    config = host_config(ROOT / "configs" / "slurm.yml")
    text = _make_sbatch_string(
        command="true",
        folder=tmp_path / "%j",
        nodes=2,
        ntasks_per_node=8,
        gpus_per_node=8,
        cpus_per_task=config["optim"]["num_workers"] + 1,
        time=60,
        mem="80GB",
        additional_parameters=config["slurm"],
    )
    for line in ("--requeue", "--exclusive", "--mem=0", "--signal=USR2@300"):
        assert f"#SBATCH {line}\n" in text
    script = tmp_path / "job.sh"
    script.write_text(text)
    try:
        conf = call(CLUSTER, "start", folder, NODES="2", CPUS="80", GPUS="8")
        call("sbatch", "--test-only", script, SLURM_CONF=conf)
    finally:
        call(CLUSTER, "stop", folder)


def test_a_cluster_says_which_packages_it_needs(folder, tmp_path):
    bin = tmp_path / "bin"
    bin.mkdir()
    for name in ("bash", "mkdir", "cat", "hostname", "id"):
        (bin / name).symlink_to(shutil.which(name))
    script = CLUSTER.read_text().replace(":/usr/sbin:/sbin", "")
    done = subprocess.run(
        ["bash", "-c", script, "cluster", "start", folder],
        env={"PATH": str(bin)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "apt-get install slurmctld slurmd slurm-client munge" in done.stderr
    assert not list(folder.iterdir())


@pytest.mark.parametrize("option", ["--submit", "--num-gpus=2", "--num-nodes=2"])
def test_a_rank_leaves_the_number_of_ranks_to_slurm(option, monkeypatch):
    words = [str(SLURM / "rank.py"), "--mode", "train", "--config-yml", "none.yml", option]
    monkeypatch.setattr(sys, "argv", words)
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit, match="--ntasks-per-node"):
            runpy.run_path(words[0], run_name="__main__")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
