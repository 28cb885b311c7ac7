"""What must hold for a backbone with an adapter, as tests: of this package's own backbones, and of anybody's."""

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

__all__ = [
    "BOTH",
    "SCD",
    "BackboneClaims",
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
