"""All that registers with the host, and the package's public names."""

# A host trainer first: the host's models and trainers import each other in a circle that starts only there.
import fairchem.core.trainers  # noqa: F401

from fairchem_scd import data  # noqa: F401
from fairchem_scd.config import ConfigError, DataError
from fairchem_scd.model import DenoisingHydra
from fairchem_scd.tasks import Task, register_task
from fairchem_scd.trainers import DenoisingTrainer, EquiformerV2DenoisingTrainer, MLIPDenoisingTrainer

__all__ = [
    "ConfigError",
    "DataError",
    "DenoisingHydra",
    "DenoisingTrainer",
    "EquiformerV2DenoisingTrainer",
    "MLIPDenoisingTrainer",
    "Task",
    "register_task",
]
