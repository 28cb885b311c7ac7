"""fairchem-scd: denoising (DeNS, SCD) as an auxiliary task in force-field training with fairchem.

The first use of a public name registers the package's trainers, model and datasets with the host. A config does that by
its trainer's dotted name: `fairchem_scd.DenoisingTrainer`, `fairchem_scd.EquiformerV2DenoisingTrainer` or
`fairchem_scd.MLIPDenoisingTrainer`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fairchem_scd.errors import ConfigError, DataError
from fairchem_scd.fairchem1 import former_names

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

__all__ = [
    "ConfigError",
    "DataError",
    "DenoisingHydra",
    "DenoisingMixin",
    "DenoisingTask",
    "DenoisingTrainer",
    "EquiformerV2DenoisingTrainer",
    "MLIPDenoisingTrainer",
    "Task",
    "register_task",
]

former_names.install()


def __getattr__(name: str) -> Any:
    # The host takes many seconds to import, and `fairchem-scd --help` does without it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("fairchem_scd.fairchem1.plugin"), name)
