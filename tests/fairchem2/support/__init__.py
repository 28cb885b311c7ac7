"""Sample data, configs, runs, units and models that tests of the second host share."""

from tests.fairchem2.support.configs import (
    OURS,
    UMA,
    UNIT,
    element_references,
    mixture,
    model_config,
    of_several_data_sets,
    run_config,
    task,
    tasks_config,
)
from tests.fairchem2.support.data import (
    batch_of,
    cluster,
    crystal,
    crystals,
    database,
    labelled,
    row,
    sample_data,
    write,
)
from tests.fairchem2.support.models import converted, gradients, plan_of, stirred, with_rotations_fixed
from tests.fairchem2.support.runs import Run, differences, run
from tests.fairchem2.support.units import inner, one_rank, plain_state, train_on, unit_of

__all__ = [
    "OURS",
    "UMA",
    "UNIT",
    "Run",
    "batch_of",
    "cluster",
    "converted",
    "crystal",
    "crystals",
    "database",
    "differences",
    "element_references",
    "gradients",
    "inner",
    "labelled",
    "mixture",
    "model_config",
    "of_several_data_sets",
    "one_rank",
    "plain_state",
    "plan_of",
    "row",
    "run",
    "run_config",
    "sample_data",
    "stirred",
    "task",
    "tasks_config",
    "train_on",
    "unit_of",
    "with_rotations_fixed",
    "write",
]
