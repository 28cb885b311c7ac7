"""DeNS: denoising non-equilibrium structures (Liao et al., TMLR 2024, arXiv 2403.09549)."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from fairchem_scd.denoising.conditions import ForceEncoding
from fairchem_scd.denoising.config_keys import key_of
from fairchem_scd.denoising.corruption import Corruption, corrupt
from fairchem_scd.denoising.plan import Objective, Pass
from fairchem_scd.denoising.settings import DensSettings
from fairchem_scd.denoising.structures import Structures, require
from fairchem_scd.denoising.tasks.base import Backbone, DenoisingTask, TaskModules
from fairchem_scd.errors import ConfigError


class Dens(DenoisingTask):
    """Corrupt a structure, tell the model the forces of the original, predict the noise.

    One pass. Corrupted atoms train on their noise, the others on their forces, and the structure on the energy of the
    original.
    """

    name = "dens"
    Settings = DensSettings
    settings: DensSettings

    @property
    def labels(self) -> frozenset[str]:
        return frozenset({"forces"} | ({"stress"} if self.settings.max_stress_norm is not None else set()))

    @property
    def conditions_on_forces(self) -> bool:
        return self.settings.force_encoding or self.settings.sigma_encoding

    def check(self, outputs: Collection[str], trained: Collection[str]) -> None:
        for key, names in (("outputs", outputs), ("loss_functions", trained)):
            if "forces" not in names:
                raise ConfigError(f"{key}: no 'forces'; {key_of('dens')} trains noise in their place")
        s = self.settings
        if s.corrupt_ratio is None and s.strict_max_ratio is not None and s.strict_max_ratio < 1:
            raise ConfigError(
                f"{key_of('dens', 'strict_max_ratio')}: with corrupt_ratio: null every atom is drawn to move, so no "
                "structure would be corrupted; leave it out, or give corrupt_ratio a number"
            )
        for name in s.train_outputs if "train_outputs" in s.model_fields_set else ():
            if name not in outputs:
                known = ", ".join(n for n in outputs if n != "forces")
                raise ConfigError(f"{key_of('dens', 'train_outputs')}: '{name}' is not an output; outputs: {known}")

    def modules(self, backbone: Backbone) -> TaskModules:
        s = self.settings
        noise_head, encoding = backbone.vector_head(), None
        if self.conditions_on_forces:
            encoding = ForceEncoding(**backbone.encoding_spec, forces=s.force_encoding, sigma=s.sigma_encoding)
        return TaskModules(noise_head, encoding=encoding)

    def corrupt(self, structures: Structures, *, seed: int, step: int) -> Corruption:
        s = self.settings
        return corrupt(
            structures.natoms,
            structures.ids,
            self.movable(structures),
            seed=seed,
            step=step,
            sigmas=s.sigmas,
            ratio=s.corrupt_ratio,
            excluded=self._excluded(structures),
            max_ratio=s.strict_max_ratio,
        )

    def passes(self, structures: Structures, corruption: Corruption, *, seed: int, step: int) -> tuple[Pass, ...]:
        encoding = self._force_encoding(structures, corruption) if self.conditions_on_forces else None
        return (Pass(structures.displaced(corruption.noise), encoding=encoding, noise=True),)

    def objective(self, progress: float) -> Objective:
        s = self.settings
        decay = 1.0 if s.coefficient_decay is None else 1.0 + (s.coefficient_decay - 1.0) * progress
        return Objective(
            coefficient=s.coefficient * decay,
            scale=s.std_high if s.schedule else s.std,
            outputs=frozenset(s.train_outputs),
        )

    def _excluded(self, structures: Structures) -> Tensor:
        """[B] bool: structures without force labels, and those that a mark in the data or a setting leaves alone."""
        s = self.settings
        excluded = torch.zeros(len(structures.natoms), dtype=torch.bool)
        if structures.forces is not None:
            excluded[structures.batch[~structures.forces.isfinite().all(dim=-1)]] = True
        if s.exclude_md and structures.md is not None:
            excluded |= structures.md
        if s.honour_skip_dens and structures.skip_dens is not None:
            excluded |= structures.skip_dens
        if s.min_num_atoms is not None:
            excluded |= structures.natoms < s.min_num_atoms
        if s.max_force_norm is not None:
            norm = require(structures.forces, "forces", self.name).norm(dim=-1)
            largest = torch.zeros(len(excluded), dtype=norm.dtype)
            largest.scatter_reduce_(0, structures.batch, norm, "amax")
            excluded |= largest > s.max_force_norm
        if s.max_stress_norm is not None:
            stress = require(structures.stress, "stress", self.name).reshape(len(excluded), -1)
            excluded |= stress.norm(dim=-1) > s.max_stress_norm
        return excluded
