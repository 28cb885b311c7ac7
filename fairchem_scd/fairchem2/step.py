"""What one step of training or validation holds, while the host runs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from fairchem.core.datasets.atomic_data import AtomicData
from torch import Tensor

from fairchem_scd.denoising.corruption import Corruption
from fairchem_scd.denoising.loss import noise_in_angstrom, noise_target
from fairchem_scd.denoising.plan import EMBEDDING, NOISE, Objective, Plan
from fairchem_scd.denoising.tasks import DenoisingTask
from fairchem_scd.fairchem2.metrics import Measured

NOISE_TASK = "denoising_forces"
"""Name of the host's task whose loss is the noise term. The host masks vectors by the word "forces" in that name."""


@dataclass(kw_only=True)
class Step:
    """A step under way; as it stands an ordinary one, without a denoising task.

    Attributes:
        measured: terms of the loss and errors, for the log.
    """

    measured: Measured = field(default_factory=Measured)


@dataclass(kw_only=True)
class DenoisingStep(Step):
    """A step of a denoising task over a batch of B structures and N atoms.

    Attributes:
        task: drawn for this step.
        corruption: on the CPU, where it was drawn.
        plan: the passes, on the model's device.
        objective: what to train. Its scale is known: see "The unit of the noise" in denoising/loss.py.
        device: the model's.
        noise: [N, 3] predicted, in units of the objective's scale; set by the forward.
        embedding: [B, C] that the noisy pass was conditioned on; set by the forward, where the plan returns it.
    """

    task: DenoisingTask
    corruption: Corruption
    plan: Plan
    objective: Objective
    device: torch.device
    noise: Tensor | None = None
    embedding: Tensor | None = None

    @property
    def noise_for_forces(self) -> bool:
        """Whether the noise takes the place of the forces on corrupted atoms; otherwise it is a term of its own."""
        return self.objective.loss is None

    def trains(self, name: str, prop: str) -> bool:
        """Whether an output other than forces, by its task's name and property, trains on corrupted structures."""
        wanted = self.objective.outputs
        return wanted is None or prop in wanted or name in wanted

    @cached_property
    def moved(self) -> Tensor:
        """[N] bool on the device: the atoms that moved."""
        return self.corruption.mask.to(self.device)

    @cached_property
    def noise_counted(self) -> Tensor:
        """[N] bool on the device: the atoms whose noise is in the loss already. Replaced as tasks add to it."""
        return torch.zeros_like(self.moved)

    @cached_property
    def corrupted(self) -> Tensor:
        """[B] bool on the device: the structures of which any atom moved."""
        return self.corruption.corrupted.to(self.device)

    @cached_property
    def noise_target(self) -> Tensor:
        """[N, 3] on the device: what `noise` should be; zero where nothing moved."""
        every = torch.arange(len(self.corruption.mask))
        return noise_target(self.corruption, every, self.objective.scale, self.device)

    def receive(self, out: dict[str, Any], data: AtomicData) -> None:
        """Take the predicted noise out of what the model returned.

        Where it is a term of its own, prediction and target are put where the host's loss looks for those of a task.
        """
        self.noise, self.embedding = out.pop(NOISE).float(), out.pop(EMBEDDING, None)
        if not self.noise_for_forces:
            out[NOISE_TASK] = {"forces": self.noise}
            data[NOISE_TASK] = self.noise_target
            self.measured.add("denoising_left_out", (~self.corrupted).sum(), len(self.corrupted))
        errors = noise_in_angstrom(self.noise - self.noise_target, self.objective.scale).abs()
        self.measured.add_errors("denoising_pos_mae", errors, self.moved)
