"""Denoising tasks, one file a task, all of one shape. A third party registers its own with `register_task`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairchem_scd.config import Settings, parse_denoising
from fairchem_scd.tasks.base import NOISE, Objective, Pass, Plan, Structures, Task, structures_of
from fairchem_scd.tasks.dens import Dens
from fairchem_scd.tasks.draw import TaskDraw
from fairchem_scd.tasks.noisy_nodes import NoisyNodes

__all__ = [
    "NOISE",
    "Dens",
    "NoisyNodes",
    "Objective",
    "Pass",
    "Plan",
    "Structures",
    "Task",
    "TaskDraw",
    "build_tasks",
    "register_task",
    "structures_of",
]

_TASKS: dict[str, type[Task]] = {}


def register_task(cls: type[Task]) -> type[Task]:
    """Make a task known under `cls.name`, its key in the `task.denoising` block."""
    _TASKS[cls.name] = cls
    return cls


for _task in (Dens, NoisyNodes):
    register_task(_task)


def build_tasks(block: Mapping[str, Any] | None) -> tuple[dict[str, Task], bool]:
    """The tasks that a `task.denoising` block turns on, by name, and its `restart` setting.

    Raises:
        ConfigError: the block is not valid.
    """
    classes: dict[str, type[Settings]] = {name: cls.Settings for name, cls in _TASKS.items()}
    settings, restart = parse_denoising(block, classes)
    return {name: _TASKS[name](s) for name, s in settings.items()}, restart
