"""Noisy nodes: unconditioned denoising beside the ordinary loss (as SCD's fine-tuning uses it, arXiv 2603.17196)."""

from __future__ import annotations

import logging
from collections.abc import Collection

from fairchem_scd.denoising.config_keys import key_of
from fairchem_scd.denoising.corruption import Corruption, corrupt
from fairchem_scd.denoising.plan import Objective, Pass
from fairchem_scd.denoising.settings import NoisyNodesSettings
from fairchem_scd.denoising.structures import Structures
from fairchem_scd.denoising.tasks.base import Backbone, DenoisingTask, TaskModules

_LARGEST_BESIDE_FORCES = 1e-3
"""Å; above it a warning says what the noise does to force labels."""


class NoisyNodes(DenoisingTask):
    """Train every label on slightly noisy input, and predict the noise beside them. One pass, no condition."""

    name = "noisy_nodes"
    Settings = NoisyNodesSettings
    settings: NoisyNodesSettings

    def check(self, outputs: Collection[str], trained: Collection[str]) -> None:
        if "forces" in trained and self.settings.std > _LARGEST_BESIDE_FORCES:
            logging.warning(
                "%s: %g Å. The force labels belong to the structure without the noise, so "
                "this is noise on the labels: about 4 meV/Å on metal slabs for 0.0005 Å, 77 to 123 meV/Å on molecules "
                "for 0.005 Å (measured). Beside forces use %s or dens, whose labels stay exact",
                key_of(self.name, "std"),
                self.settings.std,
                key_of("scd"),
            )

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
        return (Pass(structures.displaced(corruption.noise), outputs=self.supervised, noise=True),)

    def objective(self, progress: float) -> Objective:
        return Objective(coefficient=self.settings.coefficient, scale=self.settings.std, loss=self.settings.loss)
