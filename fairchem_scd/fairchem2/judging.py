"""What SCD's condition is worth, measured in validation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from fairchem.core.datasets.atomic_data import AtomicData
from fairchem.core.units.mlip_unit.mlip_unit import Task
from fairchem.core.units.mlip_unit.utils import tf32_context_manager
from torch import Tensor

from fairchem_scd.denoising.condition_judge import ConditionJudge, noisy_pass
from fairchem_scd.denoising.condition_report import ConditionReport
from fairchem_scd.denoising.passes import run_plan
from fairchem_scd.denoising.plan import Plan
from fairchem_scd.denoising.tasks import DenoisingTask
from fairchem_scd.fairchem2.batch import identities, structures_of
from fairchem_scd.fairchem2.model import DenoisingHydra
from fairchem_scd.fairchem2.step import DenoisingStep


class JudgedValidation:
    """Judges a task's condition in one validation: see `ConditionJudge`.

    In pre-training validation itself runs the clean pass and the noisy pass that is told the right embedding: `note`.
    Beside labels it never corrupts, and `first` runs these passes over the same batches. `report` runs those that are
    told another structure's embedding, and none, in a sweep over the data of its own.

    Nothing of it goes through the host's wrappers, and the random numbers of the run stay as they are.

    Args:
        model: that validation runs, within the host's wrappers.
        task: whose condition is judged.
        host_tasks: the host's.
        tf32: as the host's unit of validation has it.
    """

    def __init__(self, model: DenoisingHydra, task: DenoisingTask, host_tasks: Sequence[Task], *, tf32: bool) -> None:
        self.judge = judge_of(model, task, host_tasks, tf32=tf32)
        self.device = next(model.parameters()).device
        self._batches = 0

    def note(self, data: AtomicData, step: DenoisingStep) -> None:
        """Take notice of a step of validation that predicted the noise of a batch."""
        self._batches += 1
        noisy, noise, embedding = noisy_pass(step.plan.passes), step.noise.detach(), step.embedding.detach()
        self.judge.note_right(data, step.corruption, noisy, noise, embedding)

    def first(self, data: AtomicData) -> None:
        """Run the clean pass and the noisy one that is told the right embedding.

        It comes before the host's own step, which writes into the batch.
        """
        self._batches += 1
        self.judge.first(data.to(self.device))

    def report(self, loader: Iterable[AtomicData]) -> ConditionReport | None:
        """What was found, over all ranks; None: there are no two structures to judge by. A collective call.

        Args:
            loader: of the validation. No more batches are read than validation had.
        """
        self.judge.pair()
        with torch.random.fork_rng(devices=[]):  # a loader draws a seed for its processes
            for data in islice(loader, self._batches):
                self.judge.second(data.to(self.device))
        return self.judge.report()


def judge_of(
    model: DenoisingHydra, task: DenoisingTask, host_tasks: Sequence[Task], *, tf32: bool = False
) -> ConditionJudge:
    """A judge of batches of this host.

    Args:
        model: in eval mode.
        task: one of its tasks, conditioned on an embedding.
        host_tasks: the host's, which say under which names forces are kept.
        tf32: whether matrices are multiplied in that precision on a GPU.
    """

    def call(data: AtomicData, plan: Plan) -> Mapping[str, Tensor]:
        with tf32_context_manager(tf32), torch.no_grad():
            return run_plan(model, data, plan)

    def structures(data: AtomicData) -> Any:
        return structures_of(data, model.adapter.periodic(data.pbc), host_tasks)

    return ConditionJudge(model, task, call, structures, identities)
