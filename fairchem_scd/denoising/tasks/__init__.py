"""Denoising tasks, one file per task, all of one shape. Third parties add theirs: docs/adding-a-task.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairchem_scd.denoising.parse_settings import Denoising, parse_denoising, without_former
from fairchem_scd.denoising.task_registry import register_task, task_classes, task_names
from fairchem_scd.denoising.tasks.base import DenoisingTask, TaskModules
from fairchem_scd.denoising.tasks.dens import Dens
from fairchem_scd.denoising.tasks.draw import TaskDraw
from fairchem_scd.denoising.tasks.noisy_nodes import NoisyNodes
from fairchem_scd.denoising.tasks.scd import Scd

__all__ = [
    "DenoisingTask",
    "Dens",
    "NoisyNodes",
    "Scd",
    "TaskDraw",
    "TaskModules",
    "build_tasks",
    "register_task",
    "task_classes",
    "task_names",
    "without_former_settings",
]


def build_tasks(block: Mapping[str, Any] | None, supervised: bool = True) -> tuple[dict[str, DenoisingTask], Denoising]:
    """The tasks that a `task.denoising` block turns on, by name, and the parsed block.

    Args:
        block: as read from YAML.
        supervised: the config trains outputs beside the tasks.

    Raises:
        ConfigError: the block is not valid.
    """
    classes = _classes_for(block)
    parsed = parse_denoising(block, {name: cls.Settings for name, cls in classes.items()})
    return {name: classes[name](s, supervised) for name, s in parsed.tasks.items()}, parsed


def without_former_settings(block: Any) -> Any:
    """A `task.denoising` block without settings that are no more, each of which is warned of.

    For who reads a block more than once, so that the warnings come once.
    """
    return without_former(block, {name: cls.Settings for name, cls in _classes_for(block).items()})


def _classes_for(block: Any) -> Mapping[str, type[DenoisingTask]]:
    return task_classes(asked=block if isinstance(block, Mapping) else ())
