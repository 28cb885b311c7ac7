"""The known denoising tasks: this package's, those that were registered, and those that installed packages name.

Nothing here imports torch, so that `fairchem-scd --help` does not wait for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from fairchem_scd.denoising.config_keys import key_of
from fairchem_scd.errors import ConfigError

if TYPE_CHECKING:
    from fairchem_scd.denoising.tasks.base import DenoisingTask

ENTRY_POINTS = "fairchem_scd.tasks"
"""The group of entry points in which another package names its tasks: name of the task = "module:class"."""

_OWN = {"dens": "Dens", "scd": "Scd", "noisy_nodes": "NoisyNodes"}
_TASKS: dict[str, type[DenoisingTask]] = {}


def register_task(cls: type[DenoisingTask]) -> type[DenoisingTask]:
    """Make a task known under `cls.name`, its key in the `task.denoising` block. Usable as a decorator."""
    _TASKS[cls.name] = cls
    return cls


def task_names() -> list[str]:
    """The names of all known tasks, without importing any of them."""
    return list(dict.fromkeys([*_OWN, *_TASKS, *_entry_points()]))


def task_classes(asked: Iterable[str] = ()) -> dict[str, type[DenoisingTask]]:
    """This package's tasks, the registered ones, and of those that other packages name the ones `asked` for, by name.

    Raises:
        ConfigError: another package's task cannot be imported, or is not a task.
    """
    for name in set(_OWN) - set(_TASKS):
        register_task(getattr(importlib.import_module(f"fairchem_scd.denoising.tasks.{name}"), _OWN[name]))
    installed = _entry_points()
    for name in asked:
        if name in installed and name not in _TASKS:
            register_task(_loaded(installed[name]))
    return {name: _TASKS[name] for name in dict.fromkeys([*_OWN, *_TASKS])}


def own_task_classes() -> dict[str, type[DenoisingTask]]:
    """This package's tasks, by name."""
    return {name: cls for name, cls in task_classes().items() if name in _OWN}


def _entry_points() -> dict[str, EntryPoint]:
    return {found.name: found for found in entry_points(group=ENTRY_POINTS)}


def _loaded(found: EntryPoint) -> type[DenoisingTask]:
    from fairchem_scd.denoising.tasks.base import DenoisingTask

    where = f"{key_of(found.name)}: the installed task '{found.value}' (entry point {ENTRY_POINTS})"
    try:
        cls = found.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{where} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, DenoisingTask)):
        raise ConfigError(f"{where} is not a subclass of fairchem_scd.DenoisingTask")
    if cls.name != found.name:
        raise ConfigError(f"{where} calls itself '{cls.name}'; the entry point must have the same name")
    return cls
