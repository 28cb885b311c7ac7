"""The host's trainers with denoising steps."""

from fairchem_scd.fairchem1.trainer.trainers import (
    DenoisingMixin,
    DenoisingTrainer,
    EquiformerV2DenoisingTrainer,
    MLIPDenoisingTrainer,
)

__all__ = ["DenoisingMixin", "DenoisingTrainer", "EquiformerV2DenoisingTrainer", "MLIPDenoisingTrainer"]
