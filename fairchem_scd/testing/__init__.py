"""What must hold for a backbone with an adapter and for a task, as tests: of this package's own, and of anybody's."""

from __future__ import annotations

import warnings
from typing import Any

from fairchem_scd.host import installed_major, missing

if installed_major() != 1:
    raise ImportError(missing("fairchem_scd.testing", 1))

from fairchem_scd.testing.backbone_claims import BackboneClaims
from fairchem_scd.testing.support import (
    BOTH,
    SCD,
    collate,
    crystal,
    gradients,
    make_trainer,
    on_ranks,
    plan_of,
    rotation,
    run,
    self_supervised,
    slabs,
    stirred,
    training_config,
    with_conditioned,
)
from fairchem_scd.testing.task_claims import TaskClaims

__all__ = [
    "BOTH",
    "SCD",
    "BackboneClaims",
    "TaskClaims",
    "collate",
    "crystal",
    "gradients",
    "make_trainer",
    "on_ranks",
    "plan_of",
    "rotation",
    "run",
    "self_supervised",
    "slabs",
    "stirred",
    "training_config",
    "with_conditioned",
]


def __getattr__(name: str) -> Any:
    if name == "told":  # a former name
        warnings.warn("fairchem_scd.testing.told is now with_conditioned", DeprecationWarning, stacklevel=2)
        return with_conditioned
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
