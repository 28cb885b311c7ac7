"""Between a denoising step and the host's list of tasks.

The host's `compute_loss` goes through its list of `Task`s, each with a loss function. It normalises the target, which
is not finite where a structure has no such label, and calls fn(prediction, target, mult_mask, natoms) with all rows and
a mask of those that train. For one step stand-ins take the place of the tasks: the same but for their functions. The
mathematics stands in denoising/loss.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any, Protocol

import torch
from fairchem.core.common import distutils
from fairchem.core.common.registry import registry
from fairchem.core.modules.loss import DDPMTLoss
from fairchem.core.modules.normalization.normalizer import Normalizer
from fairchem.core.units.mlip_unit.mlip_unit import OutputSpec, Task
from torch import Tensor

from fairchem_scd.denoising import loss
from fairchem_scd.fairchem2.step import NOISE_TASK, DenoisingStep, Step


class HostLoss(Protocol):
    """A loss function as the host calls it: predictions and targets [n, d], a mask of those that train, [B] atoms."""

    def __call__(self, pred: Tensor, target: Tensor, mult_mask: Tensor, natoms: Tensor) -> Tensor: ...


# --- the tasks of a step ----------------------------------------------------------------------------------------------


def tasks_of(step: Step, tasks: Iterable[Task]) -> list[Task]:
    """Stand-ins for the host's tasks in one step, in their order; after them the noise, where it is a term of its own.

    Every term is noted among what the step measured, and the errors of what is predicted for corrupted structures.
    """
    if not isinstance(step, DenoisingStep):
        return [_with_loss(task, Recorded(task.loss_fn, step, f"{task.name}_loss")) for task in tasks]
    stand_ins = [_with_loss(task, _loss_of(task, step)) for task in tasks]
    return stand_ins if step.noise_for_forces else [*stand_ins, _noise_task(step)]


def label(name: str) -> str:
    """What the log calls a task of the host's: forces are "force", as in the log of DeNS's authors."""
    return name[:-1] if name.endswith("forces") else name


def _loss_of(task: Task, step: DenoisingStep) -> HostLoss:
    if step.objective.clean:
        return Recorded(task.loss_fn, step, f"{task.name}_loss")
    name = f"denoising_{label(task.name)}"
    if task.property == "forces" and step.noise_for_forces:
        return HybridLoss(task, step, name)
    if step.trains(task.name, task.property):
        return WithErrors(Recorded(task.loss_fn, step, f"{name}_loss"), task, step, f"{name}_mae")
    return Recorded(UncorruptedOnly(task, step), step, f"{name}_loss")


def _noise_task(step: DenoisingStep) -> Task:
    """The noise as a task of its own; its prediction and target are `step.noise` and `step.noise_target`."""
    return Task(
        name=NOISE_TASK,
        level="atom",
        property="forces",
        out_spec=OutputSpec(dim=[3], dtype="float32"),
        normalizer=Normalizer(mean=0.0, rmsd=1.0),
        datasets=[],
        loss_fn=Recorded(NoiseTerm(step), step, "denoising_pos_loss"),
        train_on_free_atoms=False,
    )


def _with_loss(task: Task, fn: HostLoss) -> Task:
    # Under Hydra a task is a DictConfig, which dataclasses.replace refuses.
    return Task(**{**{field.name: getattr(task, field.name) for field in fields(Task)}, "loss_fn": fn})


# --- stand-ins --------------------------------------------------------------------------------------------------------


class Recorded:
    """A loss function whose value is noted as a term of the step."""

    def __init__(self, fn: HostLoss, step: Step, name: str) -> None:
        self.fn, self.step, self.name = fn, step, name

    def __call__(self, pred: Tensor, target: Tensor, mult_mask: Tensor, natoms: Tensor) -> Tensor:
        value = self.fn(pred, target, mult_mask=mult_mask, natoms=natoms)
        self.step.measured.add_term(self.name, value)
        return value


class WithErrors:
    """A loss function of a task beside which the errors, in the data's units, are noted."""

    def __init__(self, fn: HostLoss, task: Task, step: Step, name: str) -> None:
        self.fn, self.task, self.step, self.name = fn, task, step, name

    def __call__(self, pred: Tensor, target: Tensor, mult_mask: Tensor, natoms: Tensor) -> Tensor:
        self.step.measured.add_errors(self.name, _errors(pred, target, self.task), mult_mask)
        return self.fn(pred, target, mult_mask=mult_mask, natoms=natoms)


class UncorruptedOnly:
    """The loss function of a task over structures, or atoms of structures, that were not corrupted."""

    def __init__(self, task: Task, step: DenoisingStep) -> None:
        self.task, self.step = task, step

    def __call__(self, pred: Tensor, target: Tensor, mult_mask: Tensor, natoms: Tensor) -> Tensor:
        clean = ~self.step.corrupted
        if self.task.level == "atom":
            clean = clean.repeat_interleave(natoms)
        mask = mult_mask & clean.view(-1, *[1] * (mult_mask.dim() - 1))
        return self.task.loss_fn(pred, target, mult_mask=mask, natoms=natoms)


class HybridLoss:
    """The force loss of a DeNS step: see `loss.hybrid_items`.

    With a force task for each data set, an atom's noise counts in the first one that has a label for the atom.
    """

    def __init__(self, task: Task, step: DenoisingStep, name: str) -> None:
        self.task, self.step, self.name = task, step, name
        self.fn: DDPMTLoss = task.loss_fn

    def __call__(self, pred: Tensor, target: Tensor, mult_mask: Tensor, natoms: Tensor) -> Tensor:
        step = self.step
        known = target.isfinite().all(dim=-1)
        corrupted = step.moved & known
        items = loss.hybrid_items(
            self.fn.loss_fn,
            pred,
            torch.nan_to_num(target, posinf=0.0, neginf=0.0),
            step.noise,
            step.noise_target,
            corrupted,
            force_coefficient=self.fn.coefficient,
            noise_coefficient=step.objective.coefficient,
            natoms=natoms,
        )
        mask = mult_mask | corrupted
        counts = mask & ~(corrupted & step.noise_counted)
        items = torch.where(counts if items.dim() == 1 else counts[:, None], items, 0.0)
        step.noise_counted = step.noise_counted | corrupted
        value = self._reduced(items, mask, pred, natoms)
        share = loss.corrupted_share(items, corrupted)
        step.measured.add_term("denoising_pos_loss", value * share)
        step.measured.add_term(f"{self.name}_loss", value * (1 - share))
        step.measured.add_errors(f"{self.name}_mae", _errors(pred, target, self.task), mult_mask & ~corrupted)
        return value

    def _reduced(self, items: Tensor, mask: Tensor, pred: Tensor, natoms: Tensor) -> Tensor:
        if self.fn.reduction == "per_structure":  # which only this host has
            return self.fn.per_structure(pred, mask, None, items, natoms)
        return loss.reduce(items, self.fn.reduction, ranks(), mask)


class NoiseTerm:
    """The noise as a term of its own: see `loss.noise_term`."""

    def __init__(self, step: DenoisingStep) -> None:
        self.step = step

    def __call__(self, pred: Tensor, target: Tensor, mult_mask: Tensor, natoms: Tensor) -> Tensor:
        objective = self.step.objective
        return loss.noise_term(
            registry.get_loss_class(objective.loss)(),
            pred,
            target,
            coefficient=objective.coefficient,
            ranks=ranks(),
            mask=self.step.moved,
        )


def ranks() -> loss.Ranks:
    """The ranks of this run. Sums of tensors stay on their device."""
    return loss.Ranks(distutils.get_world_size(), distutils.all_reduce)


def _errors(pred: Tensor, target: Tensor, task: Task) -> Any:
    """Absolute errors in the data's units; those of elements have the mask's shape.

    Both are normalised, and the references of elements are taken off the target: what is left is the scale.
    """
    scale = task.normalizer.rmsd
    return (pred.detach().float() - target.view(pred.shape)).abs() * scale
