"""The check of a fairchem 2.x config, in the order in which it reports."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import hydra
import torch
from fairchem.core.common import distutils
from fairchem.core.common.utils import setup_env_vars
from omegaconf import DictConfig, OmegaConf

from fairchem_scd.commands.check import rounds
from fairchem_scd.commands.check.report import Report
from fairchem_scd.commands.fairchem2 import check_data, check_steps, check_weights
from fairchem_scd.commands.fairchem2.add_task import OURS
from fairchem_scd.commands.fairchem2.config_file import UNIT, read_config
from fairchem_scd.denoising.config_keys import block_called
from fairchem_scd.denoising.tasks import build_tasks
from fairchem_scd.errors import ConfigError, DataError, first_line
from fairchem_scd.fairchem2.setup import KEY, without_tasks
from fairchem_scd.fairchem2.unit import DenoisingTrainEvalUnit


def preflight(path: str | Path, overrides: Sequence[str], report: Report, *, repeats: int, seconds: float) -> None:
    """Check a config and report what is found.

    No files are written, but for those that a dataset writes when it is opened (sample data is made).

    Args:
        path: of the config.
        overrides: as `fairchem -c CONFIG` would get them.
        report: gets the findings.
        repeats, seconds: see `check_steps.try_steps`.
    """
    config = None
    with report.part("config"):
        config = _load(path, overrides)
        report.say("config", str(path))
    if config is None:
        return
    with report.part(KEY), block_called(KEY):
        _check_settings(config, report)
    _check_device(config, report)
    _check_logger(config, report)
    _check_scheduler(config, report)
    if not report.problems:
        with report.part("setting up"):
            _run(config, report, repeats, seconds)


def _load(path: str | Path, overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        if override.startswith("-"):
            raise ConfigError(
                f"{override}: fairchem 2.x has no such option; an override is key.of.config=value, such as "
                "job.device_type=CPU"
            )
    try:
        return read_config(path, overrides)
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename}: no such file") from error


def _check_settings(config: DictConfig, report: Report) -> None:
    unit = OmegaConf.to_container(OmegaConf.select(config, ".".join(UNIT)), resolve=True)
    target = unit["_target_"]
    try:
        known = issubclass(hydra.utils.get_class(target), DenoisingTrainEvalUnit)
    except (ImportError, ValueError, TypeError) as error:
        raise ConfigError(f"{'.'.join(UNIT)}._target_: '{target}' cannot be used ({first_line(error)})") from error
    if not known:
        raise ConfigError(
            f"{'.'.join(UNIT)}._target_: '{target}' is not this package's, so nothing is denoised; it is {OURS} in a "
            "config that `fairchem-scd add` writes"
        )
    tasks, settings = build_tasks(unit.get("denoising"), supervised=bool(unit.get("tasks")))
    shares = {name: task.settings.prob for name, task in tasks.items()}
    shares["ordinary"] = max(0.0, 1 - sum(shares.values()))
    report.say("steps", ", ".join(f"{100 * share:.3g} % {name}" for name, share in shares.items() if share > 1e-9))
    if not tasks:
        report.caution(without_tasks(settings))


def _check_device(config: DictConfig, report: Report) -> None:
    asked = str(config.job.device_type).rpartition(".")[2].upper()
    if asked == "CUDA" and not torch.cuda.is_available():
        report.caution(
            "no CUDA device is visible here, and with job.device_type: CUDA fairchem would not start on this machine. "
            "What is said here was tried on the CPU: time and memory are the CPU's. Check on a machine like the job's, "
            "too"
        )
    name = torch.cuda.get_device_name() if _device(config) == "CUDA" else "CPU"
    report.say("device", f"{name}, torch {torch.__version__}")


def _device(config: DictConfig) -> str:
    """Where the check runs."""
    asked = str(config.job.device_type).rpartition(".")[2].upper()
    return "CUDA" if asked == "CUDA" and torch.cuda.is_available() else "CPU"


def _check_logger(config: DictConfig, report: Report) -> None:
    """Start the config's logger and end it, offline, in a folder that is then removed."""
    if config.job.debug or not config.job.logger:
        report.say("logger", "none: what is logged goes to the console alone (job.debug, or no job.logger)")
        return
    import wandb

    if os.environ.get("WANDB_MODE") not in ("offline", "disabled") and not wandb.api.api_key:
        report.problem(
            "job.logger: Weights & Biases has no API key here, and a job in a queue cannot be asked for one: run "
            "`wandb login`, or set WANDB_MODE=offline"
        )
    offline = wandb.Settings(mode="offline", silent=True)
    with report.part("job.logger"), tempfile.TemporaryDirectory() as folder:
        start = hydra.utils.instantiate(config.job.logger)
        start(config={}, run_id="check", run_name="check", log_dir=folder, settings=offline)
        wandb.finish()
        report.say("logger", "Weights & Biases starts")


def _check_scheduler(config: DictConfig, report: Report) -> None:
    if str(config.job.scheduler.mode).rpartition(".")[2].upper() == "SLURM" and shutil.which("sbatch") is None:
        report.problem(
            "job.scheduler.mode: SLURM, and there is no sbatch here; submit from a machine with SLURM, or set LOCAL"
        )


def _run(config: DictConfig, report: Report, repeats: int, seconds: float) -> None:
    """Set up all that training sets up, in this process alone, and take some steps."""
    with (
        tempfile.TemporaryDirectory() as folder,
        _one_rank(folder, _device(config) == "CPU"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", UserWarning)  # of the host's, in every run
        config = _here(config, folder)
        torch.manual_seed(config.job.seed)
        runner = _built(config.runner)
        unit = runner.train_eval_unit
        for split, loader in (("train", runner.train_dataloader), ("val", runner.eval_dataloader)):
            with report.part(f"runner.{split}_dataloader"), block_called(KEY):
                rows = check_data.describe(split, loader, unit, report)
                if split == "train":
                    for task in unit.setup.tasks.values():
                        check_data.describe_corruption(task, rows, unit, report)
                    check_weights.describe_weights(runner, report)
        rounds.describe_model(unit.model.module, report)
        check_steps.try_steps(runner, report, repeats=repeats, seconds=seconds)
        if not report.problems:
            with report.part("validation"):
                check_steps.try_validation(runner, report)


def _built(config: DictConfig) -> Any:
    """The runner. An error of Hydra's about an object is one of what the object itself raised."""
    try:
        return hydra.utils.instantiate(config)
    except Exception as error:
        cause = error
        while cause.__cause__ is not None and not isinstance(cause, (ConfigError, DataError)):
            cause = cause.__cause__
        raise cause from error


def _here(config: DictConfig, folder: str) -> DictConfig:
    """The config of a run on one rank in this process, which writes into another folder and logs nothing."""
    config = copy.deepcopy(config)
    OmegaConf.set_struct(config, False)
    jobs = [config.job, config.runner.train_eval_unit.get("job_config")]
    for job in filter(None, jobs):
        job.run_dir, job.device_type, job.debug, job.logger = folder, _device(config), True, None
    return config


@contextmanager
def _one_rank(folder: str, cpu: bool) -> Iterator[None]:
    """While entered, this process is the one rank of a run."""
    backend = "gloo" if cpu else "nccl"
    with mock.patch.dict(os.environ):
        setup_env_vars()
        os.environ.update(LOCAL_RANK="0", RANK="0")
        distutils.setup(
            {
                "submit": False,
                "init_method": "file",
                "shared_file_dir": folder,
                "array_job_num": 0,
                "world_size": 1,
                "distributed_backend": backend,
                "cpu": cpu,
            }
        )
        try:
            yield
        finally:
            distutils.cleanup()
