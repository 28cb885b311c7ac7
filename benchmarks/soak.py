"""Runs that are killed again and again, and runs that are long.

    python -m benchmarks.soak kills --kills 200
    python -m benchmarks.soak long --steps 5000

`kills` starts training (and the making of its sample data) in processes of its own, ends each by SIGKILL or SIGTERM at
a random moment, and starts the next as a user would: with the same command. After each the checkpoint must be whole and
no older than the one before; at the end the run must be, bit for bit, one that was never killed.

`long` trains thousands of steps and notes memory, speed and the size of the run's folder as it goes.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import random
import resource
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from fairchem.core.common.utils import setup_imports

import fairchem_scd.fairchem1.plugin  # noqa: F401  (registers everything with the host)
from fairchem_scd.fairchem1 import checkpoint
from fairchem_scd.testing import make_trainer

RUN = "soak"
"""Name of the run's folders; the same at every start, so that the host finds its checkpoint."""


def config(folder: Path, *, epochs: int, task: dict[str, Any], structures: int = 8, every: int = 1) -> dict[str, Any]:
    """A run of tiny steps: EquiformerV2 of one block with dropout and drop path, batches of two."""
    return {
        "trainer": "fairchem_scd.EquiformerV2DenoisingTrainer",
        "task": {"denoising": task},
        "dataset": {
            "train": {
                "format": "emt_slabs",
                "src": str(folder / "data" / "train"),
                "num_structures": structures,
                "num_systems": 2,
                "key_mapping": {"y": "energy", "force": "forces"},
                "transforms": {
                    "normalizer": {"energy": {"mean": 5.5, "stdev": 2.5}, "forces": {"mean": 0.0, "stdev": 1.5}}
                },
            },
            "val": {"src": str(folder / "data" / "val"), "num_structures": 2, "num_systems": 1, "seed": 1},
        },
        "logger": "tensorboard",
        "outputs": {
            "energy": {"level": "system"},
            "forces": {"level": "atom", "train_on_free_atoms": True, "eval_on_free_atoms": True},
        },
        "loss_functions": [
            {"energy": {"fn": "mae", "coefficient": 2}},
            {"forces": {"fn": "l2mae", "coefficient": 100}},
        ],
        "evaluation_metrics": {"metrics": {"energy": ["mae"], "forces": ["mae"]}, "primary_metric": "forces_mae"},
        "model": {
            "name": "hydra",
            "otf_graph": True,
            "pass_through_head_outputs": True,
            "backbone": {
                "model": "equiformer_v2_backbone",
                "use_pbc": True,
                "otf_graph": True,
                "max_neighbors": 8,
                "max_radius": 4.0,
                "num_layers": 1,
                "sphere_channels": 4,
                "attn_hidden_channels": 4,
                "num_heads": 1,
                "attn_alpha_channels": 4,
                "attn_value_channels": 4,
                "ffn_hidden_channels": 4,
                "norm_type": "layer_norm_sh",
                "lmax_list": [1],
                "mmax_list": [1],
                "grid_resolution": 6,
                "edge_channels": 4,
                "num_distance_basis": 16,
                "attn_activation": "silu",
                "ffn_activation": "silu",
                "use_grid_mlp": True,
                "alpha_drop": 0.1,
                "drop_path_rate": 0.1,
                "weight_init": "uniform",
            },
            "heads": {
                "energy": {"module": "equiformerV2_scalar_head"},
                "forces": {"module": "equiformerV2_vector_head"},
            },
        },
        "optim": {
            "batch_size": 2,
            "eval_batch_size": 2,
            "num_workers": 0,
            "lr_initial": 0.001,
            "optimizer": "AdamW",
            "optimizer_params": {"weight_decay": 0.001},
            "scheduler": "LambdaLR",
            "scheduler_params": {
                "lambda_type": "cosine",
                "warmup_factor": 0.2,
                "warmup_epochs": 0.5,
                "lr_min_factor": 0.01,
            },
            "max_epochs": epochs,
            "clip_grad_norm": 100,
            "ema_decay": 0.9,
            "checkpoint_every": every,
            "eval_every": 2 * every,
        },
    }


def train(folder: Path, options: dict[str, Any]) -> None:
    """The host's command line on a config, in this process."""
    from fairchem.core._cli import main
    from fairchem.core.common import distutils
    from fairchem.core.common.flags import flags

    path = folder / "config.yml"
    if not path.exists():
        path.write_text(yaml.safe_dump(options))
    words = ["--mode", "train", "--config-yml", str(path), "--run-dir", str(folder), "--timestamp-id", RUN, "--cpu"]
    try:
        main(*flags.get_parser().parse_known_args(words))
    finally:
        distutils.cleanup()


def in_a_process(action: Callable[[], None], *, log: Path, after: float | None, with_signal: int) -> int | None:
    """Fork, do something there, and end it by a signal after some seconds. Returns its exit status, None if killed."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        gc.freeze()  # garbage of the parent, such as a process group, may wait for threads that are not here
        status = 1
        try:
            with log.open("ab") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    end = None if after is None else time.monotonic() + after
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        if end is not None and time.monotonic() > end:
            os.kill(child, with_signal)
            os.waitpid(child, 0)
            return None
        time.sleep(0.005)


def kills(count: int, folder: Path, *, seed: int = 0, note: Callable[[str], None] = print) -> dict[str, int]:
    """Kill runs `count` times on their way, at moments spread over the time that a run takes, and let the last one end.

    Args:
        count: how often; a run that ends before is followed by another.
        folder: for everything that is written.
        seed: of the moments and signals.
        note: takes a line now and then.

    Returns:
        Kills before there was any checkpoint, after one that the process itself wrote, and after none that it wrote;
        runs that ended.

    Raises:
        AssertionError: a checkpoint was broken or older than the one before, a run could not go on, or its end is not
            that of an uninterrupted run.
    """
    task = {"scd": {"noise_scale": "running", "prob": 0.5}, "dens": {"prob": 0.25}}
    size = {"epochs": 3, "structures": 4, "task": task}
    whole, warm = folder / "whole", folder / "warm"
    whole.mkdir()
    # What is imported, compiled and computed once is so here, and forked with the rest.
    make_trainer(config(warm, **size), warm).train(disable_eval_tqdm=True)
    options, started = config(whole, **size), time.monotonic()
    status = in_a_process(lambda: train(whole, options), log=whole / "log.txt", after=None, with_signal=signal.SIGKILL)
    assert status == 0, (whole / "log.txt").read_text()[-3000:]
    took = time.monotonic() - started
    chance = random.Random(seed)
    tally = {"kills": 0, "before any checkpoint": 0, "after steps": 0, "after no step": 0, "runs": 0}
    while tally["kills"] < count:
        here = folder / f"run{tally['runs']}"
        here.mkdir()
        step, log = 0, here / "log.txt"
        while True:
            started = time.monotonic()
            status = in_a_process(
                lambda here=here: train(here, config(here, **size)),
                log=log,
                after=chance.uniform(0, 1.2 * took) if tally["kills"] < count else None,
                with_signal=chance.choice((signal.SIGKILL, signal.SIGTERM)),
            )
            if status is not None:
                assert status == 0, f"a start after a kill failed: {log.read_text()[-3000:]}"
                took = min(took, time.monotonic() - started)
                break
            tally["kills"] += 1
            path = here / "checkpoints" / RUN / "checkpoint.pt"
            now = checkpoint.read(path)["step"] if path.exists() else 0  # raises where it is broken
            assert now >= step, f"the checkpoint went back from step {step} to {now}"
            tally["after steps" if now > step else "after no step" if step else "before any checkpoint"] += 1
            if now == step:
                took *= 1.1  # others may have made the machine slower
            step = now
            if tally["kills"] % 10 == 0:
                note(str(tally))
        _assert_same_end(here, whole)
        tally["runs"] += 1
    return tally


def _assert_same_end(run: Path, whole: Path) -> None:
    parts = ("step", "state_dict", "optimizer", "ema", "scheduler", "best_val_metric")
    for name, compared in (("checkpoint.pt", parts), ("best_checkpoint.pt", ("state_dict",))):
        ended, expected = (checkpoint.read(f / "checkpoints" / RUN / name) for f in (run, whole))
        for part in compared:
            _assert_equal(ended[part], expected[part], f"{name}: {part}")
    left = [path.name for path in (run / "checkpoints" / RUN).iterdir() if ".part-" in path.name]
    assert not left, f"left behind: {left}"


def _assert_equal(value: Any, expected: Any, name: str) -> None:
    if isinstance(expected, dict):
        assert value.keys() == expected.keys(), name
        for key in expected:
            _assert_equal(value[key], expected[key], f"{name}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(value) == len(expected), name
        for index, item in enumerate(expected):
            _assert_equal(value[index], item, f"{name}.{index}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(value, expected), name
    else:
        assert value == expected, name


def long(steps: int, folder: Path, task: dict[str, Any], *, every: int = 250) -> list[dict[str, float]]:
    """Train many steps in this process; every so often note resident memory, median step time and size on disk."""
    from fairchem_scd.fairchem1.trainer import DenoisingMixin

    notes: list[dict[str, float]] = []
    times: list[float] = []
    started = time.perf_counter()
    backward = DenoisingMixin._backward

    def noted(self: Any, loss: torch.Tensor) -> None:
        nonlocal started
        backward(self, loss)
        now = time.perf_counter()
        times.append(now - started)
        started = now
        if self.step % every == 0:
            files = [path for path in folder.rglob("*") if path.is_file()]
            notes.append(
                {
                    "step": self.step,
                    "MiB resident": _resident(),
                    "MiB most": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
                    "ms a step": 1e3 * statistics.median(times),
                    "files": len(files),
                    "MiB on disk": sum(path.stat().st_size for path in files) / 2**20,
                }
            )
            print("  ".join(f"{key} {value:.4g}" for key, value in notes[-1].items()), flush=True)
            times.clear()

    DenoisingMixin._backward = noted
    try:
        epoch = 4
        train(folder, config(folder, epochs=-(-steps // epoch), task=task, every=every))
    finally:
        DenoisingMixin._backward = backward
    return notes


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    killed = what.add_parser("kills", help="kill a run again and again")
    killed.add_argument("--kills", type=int, default=200)
    killed.add_argument("--seed", type=int, default=0)
    lasting = what.add_parser("long", help="train thousands of steps")
    lasting.add_argument("--steps", type=int, default=5000)
    lasting.add_argument("--task", default="{scd: {prob: 0.5}, dens: {prob: 0.25}}", help="the task.denoising block")
    options = parser.parse_args()
    torch.set_num_threads(1)
    setup_imports()  # once, before processes are forked
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "kills":
            print(kills(options.kills, Path(folder), seed=options.seed))
        else:
            long(options.steps, Path(folder), yaml.safe_load(options.task))


if __name__ == "__main__":
    main()
