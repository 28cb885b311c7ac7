"""fairchem-scd: denoising (DeNS, SCD) as an auxiliary task in force-field training with fairchem.

Two versions of fairchem are supported, and which names this package has depends on the installed one. A config names
them by their dotted names. The first use of one registers what the package has to register with the host.

    fairchem-core 1.10   `fairchem_scd.DenoisingTrainer`, `.EquiformerV2DenoisingTrainer`, `.MLIPDenoisingTrainer`
    fairchem-core 2.x    `fairchem_scd.DenoisingTrainEvalUnit`
"""

# ruff: noqa: F401 (what is imported for type checkers alone)

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fairchem_scd import host
from fairchem_scd.errors import ConfigError, DataError

if TYPE_CHECKING:
    from fairchem_scd.fairchem1.plugin import (
        DenoisingHydra,
        DenoisingMixin,
        DenoisingTask,
        DenoisingTrainer,
        EquiformerV2DenoisingTrainer,
        MLIPDenoisingTrainer,
        Task,
        register_task,
    )
    from fairchem_scd.fairchem2.plugin import DenoisingTrainEvalUnit

_BOTH = ("DenoisingTask", "register_task")
_NAMES = {
    1: (
        "DenoisingHydra",
        "DenoisingMixin",
        "DenoisingTrainer",
        "EquiformerV2DenoisingTrainer",
        "MLIPDenoisingTrainer",
        "Task",
        *_BOTH,
    ),
    2: ("DenoisingTrainEvalUnit", *_BOTH),
}
_MAJOR = host.installed_major()

__all__ = ["ConfigError", "DataError", *_NAMES.get(_MAJOR, ())]

if _MAJOR != 2:
    from fairchem_scd.fairchem1 import former_names

    former_names.install()


def __getattr__(name: str) -> Any:
    # The host takes many seconds to import, and `fairchem-scd --help` does without it.
    majors = [major for major, names in _NAMES.items() if name in names]
    if not majors:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _MAJOR not in majors:
        raise ImportError(host.missing(f"fairchem_scd.{name}", majors[0]))
    try:
        return getattr(importlib.import_module(f"{host.WINGS[_MAJOR]}.plugin"), name)
    except ImportError as error:
        if host.is_tested(_MAJOR):
            raise
        raise ImportError(host.untested(_MAJOR, str(error))) from error
