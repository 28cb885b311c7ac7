"""Noisy nodes: unconditioned denoising beside the ordinary loss (as SCD's fine-tuning uses it, arXiv 2603.17196)."""

from __future__ import annotations

from fairchem_scd.denoising.corruption import Corruption, corrupt
from fairchem_scd.denoising.plan import Objective, Pass
from fairchem_scd.denoising.settings import NoisyNodesSettings
from fairchem_scd.denoising.structures import Structures
from fairchem_scd.denoising.tasks.base import Backbone, DenoisingTask, TaskModules


class NoisyNodes(DenoisingTask):
    """Train every label on slightly noisy input, and predict the noise beside them. One pass, no condition."""

    name = "noisy_nodes"
    Settings = NoisyNodesSettings
    settings: NoisyNodesSettings

    def modules(self, backbone: Backbone) -> TaskModules:
        return TaskModules(backbone.vector_head())

    def corrupt(self, structures: Structures, *, seed: int, step: int) -> Corruption:
        s = self.settings
        return corrupt(
            structures.natoms,
            structures.ids,
            self.movable(structures),
            seed=seed,
            step=step,
            sigmas=(s.std,),
            ratio=s.corrupt_ratio,
        )

    def passes(self, structures: Structures, corruption: Corruption, *, seed: int, step: int) -> tuple[Pass, ...]:
        return (Pass(structures.pos + corruption.noise, outputs=self.supervised, noise=True),)

    def objective(self, progress: float) -> Objective:
        return Objective(coefficient=self.settings.coefficient, scale=self.settings.std, loss=self.settings.loss)
