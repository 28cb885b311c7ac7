"""The trainers that a config names: the host's, with denoising steps.

The loop, the loaders, the optimiser and everything distributed are the host's. What this package adds stands in
`setup` (before the first step), `step` (one step), `judging` (what SCD's condition is worth, in validation),
`row_check` (which rows are bad) and `resume` (stopping and going on).
"""

from __future__ import annotations

import logging
from typing import Any

from fairchem.core.common import distutils
from fairchem.core.common.registry import registry
from fairchem.core.models.equiformer_v2.trainers.forces_trainer import EquiformerV2ForcesTrainer
from fairchem.core.models.esen.trainers.trainer import MLIPTrainer
from fairchem.core.trainers import OCPTrainer

from fairchem_scd.fairchem1.checkpoint import what_next
from fairchem_scd.fairchem1.trainer.judging import JudgingMixin
from fairchem_scd.fairchem1.trainer.resume import ResumableMixin
from fairchem_scd.fairchem1.trainer.setup import SetupMixin
from fairchem_scd.fairchem1.trainer.step import StepMixin


class DenoisingMixin(JudgingMixin, StepMixin, SetupMixin, ResumableMixin):
    """Denoising on top of a host trainer. Put before the trainer among the bases.

    Raises:
        ConfigError: on construction, where the config or a sample of the data rules out what it asks for.
    """

    def train(self, *args: Any, **kwargs: Any) -> None:
        super().train(*args, **kwargs)
        left_out = distutils.all_reduce(self.structures_left_out, device=self.device)
        if left_out:
            logging.warning("%d structures had nothing to denoise and were left out of the denoising loss", left_out)
        self.data_faults.report()
        if self.condition_report is not None and distutils.is_master():
            report = self.condition_report
            logging.info("%s\n%s", report.sentence(supervised=not self.self_supervised), report.numbers())
        if distutils.is_master() and not self.is_debug:
            logging.info(what_next(self.config["cmd"]["checkpoint_dir"], self.output_targets))


@registry.register_trainer("denoising")
class DenoisingTrainer(DenoisingMixin, OCPTrainer):
    """Where a config says `ocp`, `forces` or `energy`."""


@registry.register_trainer("equiformerv2_denoising")
class EquiformerV2DenoisingTrainer(DenoisingMixin, EquiformerV2ForcesTrainer):
    """Where a config says `equiformerv2_forces`: schedules counted in epochs."""


@registry.register_trainer("mlip_denoising")
class MLIPDenoisingTrainer(DenoisingMixin, MLIPTrainer):
    """Where a config says `mlip_trainer`, as eSEN's do: schedules counted in epochs."""
