"""Checks of the machine: the device, the compiled extensions on it, SLURM and the logger."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any
from unittest import mock

import torch
from fairchem.core.common.registry import registry

from fairchem_scd.commands.check.report import Report
from fairchem_scd.errors import ConfigError


def check_device(config: Mapping[str, Any], report: Report) -> None:
    """Report the device that a run would have, and whether torch_scatter runs on it."""
    if not config["cpu"] and not torch.cuda.is_available():
        report.caution(
            "no CUDA device is visible here, and without --cpu fairchem would not start on this machine. What is said "
            "here was tried on the CPU: time and memory are the CPU's. Check on a machine like the job's, too"
        )
    device = torch.device("cpu" if config["cpu"] or not torch.cuda.is_available() else "cuda")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    report.say("device", f"{name}, torch {torch.__version__}")
    with report.part("torch_scatter"):
        _try_scatter(device)
        report.say("", f"torch_scatter works on {device.type}: {_extensions()}")


def _try_scatter(device: torch.device) -> None:
    try:
        from torch_scatter import scatter, segment_coo

        index = torch.tensor([0, 0, 1], device=device)
        values = torch.ones(3, device=device)
        for reduced in (scatter(values, index, dim=0, reduce="sum"), segment_coo(values, index, dim_size=2)):
            if reduced.tolist() != [2.0, 1.0]:
                raise RuntimeError(f"[1, 1, 1] summed over [0, 0, 1] gave {reduced.tolist()}")
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"torch_scatter does not work on {device.type}: {error}. It must be built for this PyTorch and CUDA; the "
            "README says which wheels (PYG_WHEELS)"
        ) from error


def _extensions() -> str:
    """Versions of both extensions, and which of them are this project's stand-ins."""
    found = {name: version(name) for name in ("torch-scatter", "torch-sparse")}
    note = {name: " (stand-in in plain PyTorch)" if found[name].endswith("+standin") else "" for name in found}
    return ", ".join(f"{name} {found[name]}{note[name]}" for name in found)


def check_submission(config: Mapping[str, Any], report: Report) -> None:
    """Report whether `--submit` would work from here."""
    if not config["submit"]:
        return
    if shutil.which("sbatch") is None:
        report.problem(
            "--submit: there is no sbatch here. The host would start local processes that fail at once, and report "
            "success: see logs/<job>/*_log.err. Submit from a machine with SLURM, or leave --submit out"
        )
    if config["cpu"]:
        report.problem(
            "--submit --cpu: under SLURM the host sets CUDA devices and uses nccl whatever the flags; for CPU ranks "
            "call fairchem with --num-gpus N --cpu in a batch script of your own"
        )


def check_logger(config: Mapping[str, Any], report: Report) -> None:
    """Start the config's logger and end it, in a folder that is then removed. Nothing is sent anywhere."""
    logger = config.get("logger", "wandb")
    name = logger if isinstance(logger, str) else (logger or {}).get("name")
    if not name:
        report.problem("logger: no name; it is one of tensorboard, wandb, or a block with such a name")
        return
    with report.part(f"logger '{name}' does not start"):
        try:
            logger_class = registry.get_logger_class(name)
        except RuntimeError as error:
            raise ConfigError(f"logger: unknown '{name}'; fairchem knows tensorboard and wandb") from error
        if name.startswith("wandb"):
            _check_wandb(report)
        with tempfile.TemporaryDirectory() as folder, _offline(folder):
            started = logger_class(
                {
                    **config,
                    "logger": logger,
                    "cmd": {"logs_dir": folder, "timestamp_id": "check", "identifier": "check", "seed": config["seed"]},
                }
            )
            started.log({"check": 1.0}, step=1, split="train")
            _end(started)
        report.say("logger", f"{name} starts")


def _check_wandb(report: Report) -> None:
    import wandb

    if os.environ.get("WANDB_MODE") not in ("offline", "disabled") and not wandb.api.api_key:
        report.problem(
            "logger: wandb has no API key here, and a job in a queue cannot be asked for one: run `wandb login`, or "
            "set WANDB_MODE=offline"
        )


@contextmanager
def _offline(folder: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": folder}):
        yield


def _end(logger: Any) -> None:
    if hasattr(logger, "writer"):
        logger.writer.close()
    else:
        import wandb

        wandb.finish()
