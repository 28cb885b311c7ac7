"""A config of fairchem 1.x, read once: all that follows from it for this package, in one object.

The trainer, `fairchem-scd add` and `fairchem-scd check` use what `read` returns. The model is built by the host from
`Setup.model`, plain values that are also what a checkpoint stores, so it cannot come to another conclusion.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fairchem.core.common.registry import registry

from fairchem_scd.denoising.parse_settings import Denoising
from fairchem_scd.denoising.tasks import DenoisingTask, build_tasks, without_former_settings
from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1.backbones import adapter_class
from fairchem_scd.fairchem1.dens_aliases import denoising_block
from fairchem_scd.fairchem1.legacy import to_hydra

PRIMARY_METRIC = "denoising_pos_mae"
"""What pre-training is judged by, Å."""

# The host takes a config without loss functions for one of an old format.
_PLACEHOLDER = [{"denoising_pos": {"fn": "mse", "coefficient": 0}}]
# Probabilities that sum to 1 may miss it by a rounding error.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Setup:
    """All that follows from a config.

    Attributes:
        tasks: the denoising tasks that are on, by name.
        settings: the `task.denoising` block, parsed.
        model: the `model` block for the host to build: of a DenoisingHydra where there is a task. Plain values alone,
            since the host writes it to YAML and to checkpoints.
        self_supervised: the config trains no outputs (pre-training).
    """

    tasks: dict[str, DenoisingTask]
    settings: Denoising
    model: dict[str, Any]
    self_supervised: bool

    @property
    def shares(self) -> dict[str, float]:
        """Share of the steps of each task, by name. What they leave of 1 are ordinary steps."""
        return {name: task.settings.prob for name, task in self.tasks.items()}

    def host_arguments(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a host trainer for this setup, made of the user's.

        In pre-training they hold what the host cannot do without: a loss function, and a metric to judge by.
        """
        changed = {**arguments, "model": copy.deepcopy(self.model)}
        if not self.self_supervised:
            return changed
        asked = arguments.get("evaluation_metrics") or {}
        ours = {"metrics": {}, "primary_metric": PRIMARY_METRIC}
        if asked and asked != ours:
            logging.warning(
                "evaluation_metrics: without outputs there is %s and nothing else to judge by", PRIMARY_METRIC
            )
        changed.update(loss_functions=copy.deepcopy(_PLACEHOLDER), evaluation_metrics=ours)
        data = arguments["dataset"]
        if isinstance(data, Mapping) and data.get("test"):
            logging.warning("dataset.test: without outputs there is nothing to predict; it is left out")
            changed["dataset"] = {split: block for split, block in data.items() if split != "test"}
        return changed


def read(config: Mapping[str, Any]) -> Setup:
    """Read a config. The only place that does.

    Args:
        config: its blocks `model`, `task`, `optim`, `outputs` and `loss_functions`, as the host merges them.

    Raises:
        ConfigError: it cannot be trained as written; the message names the key and what would be right.
    """
    if not isinstance(config.get("model"), Mapping):
        raise ConfigError("model: missing; the config names no model to train")
    model, dens = to_hydra(config["model"])
    block = without_former_settings(denoising_block(config.get("task") or {}, config.get("optim") or {}, dens))
    self_supervised = is_self_supervised(config.get("outputs"), config.get("loss_functions"))
    tasks, settings = build_tasks(block, supervised=not self_supervised)
    if self_supervised:
        _check_every_step_denoises(tasks)
    elif tasks:
        _check_outputs_have_losses(config)
    if model.get("backbone") and any(task.conditions_on_forces for task in tasks.values()):
        cannot = adapter_class(registry.get_model_class(model["backbone"]["model"])).cannot_condition_on_forces()
        if cannot is not None:
            raise cannot
    return Setup(tasks, settings, _model_block(model, block if tasks else None, self_supervised), self_supervised)


def is_self_supervised(outputs: Any, loss_functions: Any) -> bool:
    """Whether a config trains no outputs: `outputs: {}` and `loss_functions: []`, also as a checkpoint stores them."""
    return not outputs and isinstance(loss_functions, list) and loss_functions in ([], _PLACEHOLDER)


def check_outputs(
    tasks: Mapping[str, DenoisingTask], outputs: Collection[str], loss_functions: Iterable[Mapping[str, Any]]
) -> None:
    """Raise ConfigError where outputs or loss functions lack what a task needs.

    Args:
        tasks: by name.
        outputs: names of the outputs.
        loss_functions: the config's list, each entry by the output it is of.
    """
    trained = {name for loss in loss_functions for name in loss}
    for task in tasks.values():
        task.check(outputs, trained)


@contextmanager
def outputs_of_heads_named() -> Iterator[None]:
    """While entered, the host's errors for outputs that no head returns say which keys to write.

    Raises:
        ConfigError: in the place of the host's AttributeError and AssertionError.
    """
    cure = (
        "a head that calls its output by another name than the config: give the head `output_name` where its class has "
        "that argument, as EquiformerV2's have; else set model.pass_through_head_outputs: false, name the head as the "
        "output, and write the name that the head uses as outputs.<output>.property (an energy head's is `energy`)"
    )
    try:
        yield
    except AttributeError as error:
        if "not found in model outputs" not in str(error):
            raise
        raise ConfigError(f"outputs: {str(error).splitlines()[0]}; {cure}") from error
    except AssertionError as error:
        if "specify the property field" not in str(error):
            raise
        raise ConfigError(f"outputs: one has no `property`; {cure}") from error


def _model_block(model: dict[str, Any], block: Mapping[str, Any] | None, self_supervised: bool) -> dict[str, Any]:
    """The block of a hydra with the denoising tasks of `block`; None: without any."""
    # A block that was copied from a checkpoint's config may hold these.
    model = {key: value for key, value in model.items() if key not in ("denoising", "self_supervised")}
    if block is not None:
        model["denoising"] = block
    elif not model.get("legacy_weight_decay"):
        model["name"] = "hydra"
        model.pop("legacy_weight_decay", None)
    if self_supervised:
        model.update(self_supervised=True, heads=model.get("heads") or {})
    return model


def _check_outputs_have_losses(config: Mapping[str, Any]) -> None:
    """Raise ConfigError where one of outputs and loss functions is there without the other.

    Where both are absent, the config may be of an old format, which the host knows by its `task.dataset`.
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


def _check_every_step_denoises(tasks: Mapping[str, DenoisingTask]) -> None:
    """Raise ConfigError unless every step has a task: an ordinary step would have nothing to train."""
    total = sum(task.settings.prob for task in tasks.values())
    if total < 1 - _ROUNDING:
        shares = ", ".join(f"task.denoising.{name}.prob: {task.settings.prob:g}" for name, task in tasks.items())
        raise ConfigError(
            f"{shares or 'task.denoising names no task'}: without outputs every step must denoise; the probabilities "
            "must sum to 1 (leave one out to fill it up)"
        )
