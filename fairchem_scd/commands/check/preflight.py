"""The whole check, in the order in which it reports."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fairchem.core.common import distutils, gp_utils
from fairchem.core.common.flags import flags
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import build_config, new_trainer_context, setup_imports

from fairchem_scd.commands.check import data, environment, rounds, steps
from fairchem_scd.commands.check.report import Report
from fairchem_scd.commands.check.weights import describe_weights
from fairchem_scd.commands.config_file import read_config
from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1.config import read
from fairchem_scd.fairchem1.trainer import DenoisingMixin


def preflight(path: str | Path, options: Sequence[str], report: Report, *, repeats: int, seconds: float) -> None:
    """Check a config and report what is found.

    No files are written, but for those that a dataset writes when it is opened (`emt_slabs` makes its data).

    Args:
        path: of the config.
        options: further options that `fairchem --mode train --config-yml CONFIG` would get.
        report: gets the findings.
        repeats, seconds: see `steps.try_steps`.
    """
    config = None
    with report.part("config"):
        config = load(path, options)
        report.say("config", str(path))
    if config is None:
        return
    setup_imports()
    with report.part("task.denoising"):
        _check_settings(config, report)
    environment.check_device(config, report)
    environment.check_logger(config, report)
    environment.check_submission(config, report)
    data.check_sources(config, report)
    if not report.problems:
        with report.part("setting up"):
            _run(config, report, repeats, seconds)


def load(path: str | Path, options: Sequence[str] = ()) -> dict[str, Any]:
    """A config as the host reads it, with its own options and overrides.

    Raises:
        ConfigError: there is no such file, it is not a mapping, or an option is not known.
    """
    try:
        read_config(path)  # its errors say more than those of the host
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename}: no such file") from error
    try:
        known, overrides = flags.get_parser().parse_known_args(["--mode", "train", "--config-yml", str(path), *options])
    except SystemExit as error:  # argparse has said why
        raise ConfigError(f"{' '.join(options)}: fairchem does not take these options") from error
    for override in overrides:
        if not override.startswith("--") or override.count("=") != 1:
            raise ConfigError(f"{override}: fairchem does not take that; an override is --key.of.config=value")
    return build_config(known, overrides)


def _check_settings(config: Mapping[str, Any], report: Report) -> None:
    name = config.get("trainer", "ocp")
    trainer = registry.get_trainer_class(name)
    if trainer is None or not issubclass(trainer, DenoisingMixin):
        raise ConfigError(
            f"trainer: '{name}' is not this package's, so task.denoising would do nothing; `fairchem-scd add` writes "
            "the config with the right one"
        )
    for key in ("model", "optim"):
        if not isinstance(config.get(key), Mapping):
            raise ConfigError(f"{key}: missing, or not a block")
    setup = read(config)
    rest = max(0.0, 1 - sum(setup.shares.values()))
    shares = {**setup.shares, "ordinary": rest}
    report.say("steps", ", ".join(f"{100 * share:.3g} % {name}" for name, share in shares.items() if share > 1e-9))
    if not setup.tasks:
        report.caution(setup.settings.without_tasks)


def _run(config: dict[str, Any], report: Report, repeats: int, seconds: float) -> None:
    """Set up all that training sets up, and take some steps."""
    config = copy.deepcopy(config)
    # In this process alone, and without a folder for the run.
    config.update(is_debug=True, world_size=1, submit=False, summit=False)
    config["cpu"] = config["cpu"] or not torch.cuda.is_available()
    config["distributed_backend"] = "gloo" if config["cpu"] else config["distributed_backend"]
    distutils.setup_env_local()
    try:
        with new_trainer_context(config=config) as context:
            trainer = context.trainer
            context.task.setup(trainer)
            if trainer.train_loader is None:
                raise ConfigError("dataset.train.src: missing; there is nothing to train on")
            outputs = sorted(trainer.output_targets)
            for split in ("train", "val"):
                loader = getattr(trainer, f"{split}_loader")
                if loader is None:
                    continue
                with report.part(f"dataset.{split}"):
                    skip = trainer.denoising.on_bad_data == "skip"
                    rows = data.describe(split, loader.dataset, outputs, skip=skip, report=report)
                    if split == "train":
                        for task in trainer.tasks.values():
                            data.describe_corruption(task, rows, trainer.draw_task.seed, report)
                        describe_weights(trainer, report)
            if trainer.val_loader is None:
                report.caution("dataset.val: none, so no best_checkpoint.pt will be written")
            rounds.describe_model(trainer._unwrapped_model, report)
            steps.try_steps(trainer, report, repeats=repeats, seconds=seconds)
            if not report.problems:
                with report.part("validation"):
                    steps.try_validation(trainer, report)
    finally:
        if gp_utils.initialized():
            gp_utils.cleanup_gp()
        distutils.cleanup()
