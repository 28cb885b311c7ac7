"""fairchem-scd: denoising (DeNS, SCD) as an auxiliary task in force-field training with fairchem 1.x.

Importing the package registers its trainers, model and datasets with the host. A config loads it by its trainer's
dotted name, `fairchem_scd.DenoisingTrainer` or `fairchem_scd.EquiformerV2DenoisingTrainer`.
"""

# A host trainer first: the host's models and trainers import each other in a circle that starts only there.
import fairchem.core.trainers  # noqa: F401

from fairchem_scd.config import ConfigError
from fairchem_scd.model import DenoisingHydra
from fairchem_scd.tasks import Task, register_task
from fairchem_scd.trainers import DenoisingTrainer, EquiformerV2DenoisingTrainer

__all__ = [
    "ConfigError",
    "DenoisingHydra",
    "DenoisingTrainer",
    "EquiformerV2DenoisingTrainer",
    "Task",
    "register_task",
]
