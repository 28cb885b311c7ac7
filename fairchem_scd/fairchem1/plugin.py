"""All that registers with the host, and the public names that need it."""

# A host trainer first: the host's models and trainers import each other in a circle that starts only there.
import fairchem.core.trainers  # noqa: F401

from fairchem_scd.denoising.tasks import DenoisingTask, register_task
from fairchem_scd.fairchem1 import data  # noqa: F401
from fairchem_scd.fairchem1.hydra import DenoisingHydra
from fairchem_scd.fairchem1.trainer import (
    DenoisingMixin,
    DenoisingTrainer,
    EquiformerV2DenoisingTrainer,
    MLIPDenoisingTrainer,
)

Task = DenoisingTask  # its former name

__all__ = [
    "DenoisingHydra",
    "DenoisingMixin",
    "DenoisingTask",
    "DenoisingTrainer",
    "EquiformerV2DenoisingTrainer",
    "MLIPDenoisingTrainer",
    "Task",
    "register_task",
]
