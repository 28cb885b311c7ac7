"""What must hold for a backbone with an adapter and for a task, as tests: of this package's own, and of anybody's."""

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
