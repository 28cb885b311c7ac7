"""Denoising tasks, one file a task, all of one shape. A third party registers its own with `register_task`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairchem_scd.denoising.parse_settings import Denoising, parse_denoising
from fairchem_scd.denoising.settings import Settings
from fairchem_scd.denoising.tasks.base import DenoisingTask
from fairchem_scd.denoising.tasks.dens import Dens
from fairchem_scd.denoising.tasks.draw import TaskDraw
from fairchem_scd.denoising.tasks.noisy_nodes import NoisyNodes
from fairchem_scd.denoising.tasks.scd import Scd

__all__ = ["DenoisingTask", "Dens", "NoisyNodes", "Scd", "TaskDraw", "build_tasks", "register_task", "task_classes"]

_TASKS: dict[str, type[DenoisingTask]] = {}


def register_task(cls: type[DenoisingTask]) -> type[DenoisingTask]:
    """Make a task known under `cls.name`, its key in the `task.denoising` block."""
    _TASKS[cls.name] = cls
    return cls


def task_classes() -> dict[str, type[DenoisingTask]]:
    """All known tasks, by name."""
    return dict(_TASKS)


for _task in (Dens, Scd, NoisyNodes):
    register_task(_task)


def build_tasks(block: Mapping[str, Any] | None, supervised: bool = True) -> tuple[dict[str, DenoisingTask], Denoising]:
    """The tasks that a `task.denoising` block turns on, by name, and the parsed block.

    Args:
        block: as read from YAML.
        supervised: the config trains outputs beside the tasks.

    Raises:
        ConfigError: the block is not valid.
    """
    classes: dict[str, type[Settings]] = {name: cls.Settings for name, cls in _TASKS.items()}
    parsed = parse_denoising(block, classes)
    return {name: _TASKS[name](s, supervised) for name, s in parsed.tasks.items()}, parsed
