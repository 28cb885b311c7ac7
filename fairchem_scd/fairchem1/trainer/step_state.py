"""What the calls of the host's loop share within one step."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fairchem_scd.denoising.corruption import Corruption
from fairchem_scd.denoising.loss import noise_target
from fairchem_scd.denoising.plan import Objective, Plan
from fairchem_scd.denoising.tasks import DenoisingTask


class LossTerms(dict[str, Tensor]):
    """The terms of one step's loss by name, without gradient, for the log."""

    def note(self, name: str, value: Tensor) -> None:
        self[name] = self.get(name, 0) + value.detach()


@dataclass(kw_only=True)
class StepState:
    """A step under way; as it stands an ordinary one, without a denoising task.

    Attributes:
        terms: the terms of the loss, for the log.
        ranks_affected: how many ranks met a bad row that ends the run; None where nobody asked.
    """

    terms: LossTerms = field(default_factory=LossTerms)
    ranks_affected: Tensor | None = None


@dataclass(kw_only=True)
class DenoisingStep(StepState):
    """A step of a denoising task over a batch of B structures and N atoms.

    What says which rows train is on the CPU, where the corruption was drawn, so that indexing never waits for the
    device.

    Attributes:
        task: drawn for this step.
        corruption: on the CPU.
        plan: the passes, on the model's device.
        objective: what to train. Its scale is known: see "The unit of the noise" in denoising/loss.py.
        fixed: [N] bool, on the CPU.
        scale_before: state of the task's running scale before this step's noise was added; None: it has none.
        noise: [N, 3] predicted, in units of the objective's scale, on the model's device; set by the forward.
        embedding: [B, C] of the structures, in validation, where a pass makes it; set by the forward.
    """

    task: DenoisingTask
    corruption: Corruption
    plan: Plan
    objective: Objective
    fixed: Tensor
    scale_before: dict[str, Tensor] | None = None
    noise: Tensor | None = None
    embedding: Tensor | None = None

    @property
    def noise_for_forces(self) -> bool:
        """Whether the noise takes the place of the forces on corrupted atoms; otherwise it is a term of its own."""
        return self.objective.loss is None

    def trains(self, output: str) -> bool:
        """Whether an output other than forces trains on corrupted structures."""
        return self.objective.outputs is None or output in self.objective.outputs

    def noise_of(self, rows: Tensor) -> Tensor:
        """[n, 3] predicted for some atoms, by row numbers on the CPU."""
        return self.noise[rows.to(self.noise.device, non_blocking=True)]

    def noise_target(self, rows: Tensor) -> Tensor:
        """[n, 3] what `noise_of` the same rows should be."""
        return noise_target(self.corruption, rows, self.objective.scale, self.noise.device)
