"""Self-supervised pre-training: a config that trains no outputs, as the host's trainer can run it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

from fairchem_scd.denoising.passes import frozen_in_pretraining
from fairchem_scd.denoising.tasks import DenoisingTask
from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1.hydra import DenoisingHydra

PRIMARY_METRIC = "denoising_pos_mae"

# The host takes a config without loss functions for one of an old format.
_PLACEHOLDER = [{"denoising_pos": {"fn": "mse", "coefficient": 0}}]


def is_self_supervised(outputs: Any, loss_functions: Any) -> bool:
    """Whether a config says `outputs: {}` and `loss_functions: []`, or is one that `prepare` made of such."""
    return not outputs and isinstance(loss_functions, list) and loss_functions in ([], _PLACEHOLDER)


def prepare(config: dict[str, Any]) -> None:
    """Fill in, in place, what the host's trainer cannot do without.

    Args:
        config: keyword arguments of a host trainer.
    """
    config["loss_functions"] = copy.deepcopy(_PLACEHOLDER)
    asked = config.get("evaluation_metrics") or {}
    ours = {"metrics": {}, "primary_metric": PRIMARY_METRIC}
    if asked and asked != ours:
        logging.warning("evaluation_metrics: without outputs there is %s and nothing else to judge by", PRIMARY_METRIC)
    config["evaluation_metrics"] = ours
    config["model"]["heads"] = config["model"].get("heads") or {}
    data = config["dataset"]
    if isinstance(data, Mapping) and data.get("test"):
        logging.warning("dataset.test: without outputs there is nothing to predict; it is left out")
        config["dataset"] = {split: block for split, block in data.items() if split != "test"}


def check_supervised(config: Mapping[str, Any]) -> None:
    """Raise ConfigError where one of outputs and loss functions is there without the other.

    Neither is an old format, which the host knows by its `task.dataset`.
    """
    outputs, losses = bool(config.get("outputs")), bool(config.get("loss_functions"))
    if outputs == losses and (outputs or "dataset" in (config.get("task") or {})):
        return
    what = {
        (True, False): "outputs is there, and loss_functions empty or absent",
        (False, True): "loss_functions is there, and outputs empty or absent",
        (False, False): "outputs, loss_functions: absent",
    }[outputs, losses]
    raise ConfigError(
        f"{what}. To train without labels say `outputs: {{}}` and `loss_functions: []`; beside labels, name both as in "
        "configs/quickstart.yml"
    )


def check_tasks(tasks: Mapping[str, DenoisingTask]) -> None:
    """Raise ConfigError unless every step has a task: an ordinary step would have nothing to train."""
    total = sum(task.settings.prob for task in tasks.values())
    if total < 1 - 1e-9:
        shares = ", ".join(f"task.denoising.{name}.prob: {task.settings.prob:g}" for name, task in tasks.items())
        raise ConfigError(
            f"{shares or 'task.denoising names no task'}: without outputs every step must denoise; the probabilities "
            "must sum to 1 (leave one out to fill it up)"
        )


def freeze(model: DenoisingHydra) -> None:
    """Freeze what pre-training must not move: see `frozen_in_pretraining`."""
    for parameter in frozen_in_pretraining(model):
        parameter.requires_grad_(False)
