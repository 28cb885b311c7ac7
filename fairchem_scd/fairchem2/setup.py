"""What a run is asked for, read once: the denoising block, beside the host's tasks and model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fairchem.core.units.mlip_unit.mlip_unit import Task, filter_inference_only_tasks
from omegaconf import OmegaConf
from torch import nn

from fairchem_scd.denoising.config_keys import block_called, key_of
from fairchem_scd.denoising.parse_settings import WITHOUT_A_TASK, Denoising
from fairchem_scd.denoising.passes import frozen_in_pretraining
from fairchem_scd.denoising.quiet_heads import quieten, say_which
from fairchem_scd.denoising.tasks import DenoisingTask, build_tasks
from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem2 import refusals
from fairchem_scd.fairchem2.backbones import adapter_for
from fairchem_scd.fairchem2.model import convert

KEY = "runner.train_eval_unit.denoising"
"""The key of the denoising block in a config of this host."""

# Probabilities that sum to 1 may miss it by a rounding error.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Setup:
    """All that follows from a config.

    Attributes:
        tasks: the denoising tasks that are on, by name.
        settings: the denoising block, parsed.
        self_supervised: the config trains no outputs (pre-training).
    """

    tasks: dict[str, DenoisingTask]
    settings: Denoising
    self_supervised: bool

    @property
    def validated_task(self) -> DenoisingTask:
        """The task whose noise validation predicts, in pre-training."""
        return next(task for task in self.tasks.values() if task.settings.prob)

    @property
    def judged_task(self) -> DenoisingTask | None:
        """The task whose condition validation judges; None: it judges none."""
        tasks = (self.validated_task,) if self.self_supervised else self.tasks.values()
        return next((task for task in tasks if task.judges_condition), None)


@block_called(KEY)
def prepare(job: Any, model: nn.Module, host_tasks: Sequence[Task], block: Any, host: Mapping[str, Any]) -> Setup:
    """Read the denoising block and, if it turns on any task, check the run and convert the model.

    New heads may start quietly: see `_quieten_heads`.

    Args:
        job: the config's `job`.
        model: the host's, as the config builds it. It is converted in place.
        host_tasks: the config's `tasks`.
        block: the denoising block, as Hydra hands it over; None: there is none.
        host: the other arguments of the host's unit.

    Raises:
        ConfigError: the run cannot be trained as written; the message names the key and what would be right.
    """
    refusals.check_arguments(host)
    trained = filter_inference_only_tasks(host_tasks)
    plain = OmegaConf.to_container(block, resolve=True) if OmegaConf.is_config(block) else block
    tasks, settings = build_tasks(plain, supervised=bool(trained))
    if tasks or settings.quiet_heads:
        refusals.check_host()
    if tasks:
        refusals.check_run(job, host)
        refusals.check_settings(settings, tasks)
        refusals.check_model(model)
        refusals.check_tasks(tasks, trained)
        if not trained:
            _check_every_step_denoises(tasks)
        for task in tasks.values():
            task.check_backbone(adapter_for(model.backbone), heads=bool(model.output_heads))
        convert(model, tasks)
        if not trained:
            for parameter in frozen_in_pretraining(model):
                parameter.requires_grad_(False)
    if trained:
        _quieten_heads(model, settings.quiet_heads, denoises=bool(tasks))
    return Setup(tasks, settings, self_supervised=not trained)


def without_tasks(settings: Denoising) -> str:
    """What a block means that turns on no task, for a warning."""
    if settings.quiet_heads:
        return f"{KEY} turns on no task: no step denoises, but new heads start quietly"
    return f"{KEY} turns on no task: this trains as the host's unit would. {WITHOUT_A_TASK}"


def _quieten_heads(model: nn.Module, asked: bool | None, *, denoises: bool) -> None:
    """Let new heads start quietly, in place, before the host makes its moving average of the weights.

    The state of a run that goes on is loaded later, with its own heads. The host's `initialize_finetuning_model` leaves
    a config on every model that it makes, and its argument `heads` where it built new heads of that. Where it got none,
    the heads are the checkpoint's and stay as they are.

    Args:
        model: the host's, as the config builds it.
        asked: the setting `quiet_heads`; None: in fine-tuning, if a task is on.
        denoises: a task is on.

    Raises:
        ConfigError: it was asked for, and there is no head whose last layer is known.
    """
    fine_tunes = hasattr(model, "finetune_model_full_config")
    if not (asked or (asked is None and fine_tunes and denoises)):
        return
    if fine_tunes and getattr(model, "heads", None) is None:
        return
    refusals.check_backbone(model)
    quiet = quieten(model.output_heads, adapter_for(model.backbone), readout=False)
    say_which(quiet, model.output_heads, place=f"{refusals.UNIT}.model.heads", asked=bool(asked))


def _check_every_step_denoises(tasks: Mapping[str, DenoisingTask]) -> None:
    """Raise ConfigError unless every step has a task: an ordinary step would have nothing to train."""
    total = sum(task.settings.prob for task in tasks.values())
    if total < 1 - _ROUNDING:
        shares = ", ".join(f"{key_of(name, 'prob')}: {task.settings.prob:g}" for name, task in tasks.items())
        raise ConfigError(
            f"{shares}: without tasks (runner.train_eval_unit.tasks) every step must denoise; the probabilities must "
            "sum to 1 (leave one out to fill it up)"
        )
