"""The public names of this host's wing."""

from fairchem_scd.denoising.tasks import DenoisingTask, register_task
from fairchem_scd.fairchem2.unit import DenoisingTrainEvalUnit

__all__ = ["DenoisingTask", "DenoisingTrainEvalUnit", "register_task"]
