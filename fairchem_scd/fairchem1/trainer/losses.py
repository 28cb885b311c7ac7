"""Between a denoising step and the host's list of loss functions.

The host's `_compute_loss` goes through its list of (output, {fn, coefficient}). For each entry it selects the rows that
train, subtracts element references, normalises, and calls fn(prediction, target, natoms). For one step a stand-in takes
the place of every fn and is called with the same arguments. The mathematics stands in denoising/loss.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from fairchem.core.common.registry import registry
from torch import Tensor

from fairchem_scd.denoising import loss
from fairchem_scd.fairchem1.trainer.step_state import DenoisingStep, LossTerms

HostFunctions = Sequence[tuple[str, Mapping[str, Any]]]
"""(output, {fn, coefficient}) as the host keeps them."""
Outputs = Mapping[str, Mapping[str, Any]]
"""The host's settings of each output: its level, and whether it trains and is judged on free atoms alone."""


class HostLoss(Protocol):
    """The part of the host's DDPLoss that is used here."""

    loss_fn: loss.LossFunction
    reduction: loss.Reduction

    def __call__(self, input: Tensor, target: Tensor, natoms: Tensor) -> Tensor: ...


@contextmanager
def loss_functions_replaced(trainer: Any, functions: HostFunctions) -> Iterator[None]:
    """While entered, the host's trainer has other loss functions than the config's."""
    before, trainer.loss_functions = trainer.loss_functions, functions
    try:
        yield
    finally:
        trainer.loss_functions = before


# --- stand-ins --------------------------------------------------------------------------------------------------------


class RecordedLoss:
    """A loss function whose value, times its coefficient, is noted among the terms."""

    def __init__(self, fn: HostLoss, coefficient: float, terms: LossTerms, name: str) -> None:
        self.fn, self.coefficient, self.terms, self.name = fn, coefficient, terms, name

    def __call__(self, pred: Tensor, target: Tensor, natoms: Tensor) -> Tensor:
        value = self.coefficient * self.fn(pred, target, natoms=natoms)
        self.terms.note(self.name, value)
        return value


class UncorruptedOnly:
    """A loss function over structures, or atoms of structures, that were not corrupted.

    Args:
        keep: [K] their row numbers among those that the host hands over.
        natoms: [K] or [B] as the loss function is to see it.
    """

    def __init__(self, fn: HostLoss, ranks: loss.Ranks, keep: Tensor, natoms: Tensor) -> None:
        self.loss_fn, self.reduction, self.ranks, self.keep, self.natoms = (
            fn.loss_fn, fn.reduction, ranks, keep, natoms,
        )  # fmt: skip

    def __call__(self, pred: Tensor, target: Tensor, natoms: Tensor) -> Tensor:
        items = self.loss_fn(pred[self.keep], target[self.keep], self.natoms)
        return loss.reduce(items, self.reduction, self.ranks)


class HybridLoss:
    """The force loss of a DeNS step: see `loss.hybrid_items`, whose arguments these are.

    Args:
        noise, noise_target: [n, 3] of the atoms that the host hands over.
        corrupted: [n] bool, of the same atoms.
    """

    def __init__(
        self,
        fn: HostLoss,
        ranks: loss.Ranks,
        terms: LossTerms,
        *,
        noise: Tensor,
        noise_target: Tensor,
        corrupted: Tensor,
        **coefficients: float,
    ) -> None:
        self.fn, self.ranks, self.terms, self.coefficients = fn, ranks, terms, coefficients
        self.noise, self.noise_target, self.corrupted = noise, noise_target, corrupted

    def __call__(self, pred: Tensor, target: Tensor, natoms: Tensor) -> Tensor:
        items = loss.hybrid_items(
            self.fn.loss_fn,
            pred,
            target,
            self.noise,
            self.noise_target,
            self.corrupted,
            natoms=natoms,
            **self.coefficients,
        )
        value = loss.reduce(items, self.fn.reduction, self.ranks)
        share = loss.corrupted_share(items, self.corrupted)
        self.terms.note("denoising_pos_loss", value * share)
        self.terms.note("denoising_force_loss", value * (1 - share))
        return value


# --- the loss of a step -----------------------------------------------------------------------------------------------


def recorded(functions: HostFunctions, terms: LossTerms) -> list[tuple[str, dict[str, Any]]]:
    """The config's loss functions, each noted as `<output>_loss`."""
    return [
        (target, {"fn": RecordedLoss(info["fn"], info["coefficient"], terms, f"{target}_loss"), "coefficient": 1})
        for target, info in functions
    ]


def of_corrupted_structures(
    step: DenoisingStep, functions: HostFunctions, outputs: Outputs, natoms: Tensor, ranks: loss.Ranks
) -> list[tuple[str, dict[str, Any]]]:
    """The config's loss functions, in their order, where the outputs are of corrupted structures.

    Args:
        natoms: [B] on the model's device.
    """
    stand_ins, noise_coefficient = [], step.objective.coefficient
    for target, info in functions:
        fn: Callable[..., Tensor]
        if target == "forces" and step.noise_for_forces:
            fn = _hybrid(step, info, noise_coefficient, outputs, ranks)
            noise_coefficient = 0.0  # a second force loss does not count the noise again
        else:
            fn = info["fn"]
            if not step.trains(target):
                fn = _uncorrupted_only(step, target, fn, outputs, natoms, ranks)
            fn = RecordedLoss(fn, info["coefficient"], step.terms, f"denoising_{_label(target)}_loss")
        stand_ins.append((target, {"fn": fn, "coefficient": 1}))
    return stand_ins


def with_trained_atoms(step: DenoisingStep, batch: Any) -> Any:
    """The batch as the host's loss loop is to see it: fixed atoms whose noise trains are not marked as fixed."""
    if not step.noise_for_forces:
        return batch
    batch = copy.copy(batch)
    trained = loss.trained_atoms(step.fixed, step.corruption, free_only=True, noise_for_forces=True)
    batch.fixed = (~trained).to(batch.fixed, non_blocking=True)
    return batch


def noise_term(step: DenoisingStep, ranks: loss.Ranks) -> Tensor:
    """The noise as a term of its own, over the corrupted atoms of all ranks."""
    rows = step.corruption.mask.nonzero()[:, 0]
    term = loss.noise_term(
        registry.get_loss_class(step.objective.loss)(),
        step.noise_of(rows),
        step.noise_target(rows),
        coefficient=step.objective.coefficient,
        ranks=ranks,
    )
    step.terms.note("denoising_pos_loss", term)
    return term


def _hybrid(
    step: DenoisingStep, info: Mapping[str, Any], noise_coefficient: float, outputs: Outputs, ranks: loss.Ranks
) -> HybridLoss:
    rows = _trained_rows(step, "forces", outputs)
    return HybridLoss(
        info["fn"],
        ranks,
        step.terms,
        force_coefficient=info["coefficient"],
        noise_coefficient=noise_coefficient,
        noise=step.noise_of(rows),
        noise_target=step.noise_target(rows),
        corrupted=step.corruption.mask[rows].to(step.noise.device, non_blocking=True),
    )


def _uncorrupted_only(
    step: DenoisingStep, target: str, fn: HostLoss, outputs: Outputs, natoms: Tensor, ranks: loss.Ranks
) -> UncorruptedOnly:
    rows, per_atom = _trained_rows(step, target, outputs), outputs[target]["level"] == "atom"
    structure = step.corruption.batch[rows] if per_atom else rows
    keep = (~step.corruption.corrupted[structure]).nonzero()[:, 0].to(natoms.device, non_blocking=True)
    return UncorruptedOnly(fn, ranks, keep, natoms if per_atom else natoms[keep])


def _trained_rows(step: DenoisingStep, target: str, outputs: Outputs) -> Tensor:
    """Row numbers of an output that the host hands to a loss function: of atoms, or of all structures."""
    if outputs[target]["level"] != "atom":
        return torch.arange(len(step.corruption.sigma))
    free_only = bool(outputs[target]["train_on_free_atoms"])
    trained = loss.trained_atoms(
        step.fixed, step.corruption, free_only=free_only, noise_for_forces=step.noise_for_forces
    )
    return trained.nonzero()[:, 0]


# --- errors for the log -----------------------------------------------------------------------------------------------


def errors(
    step: DenoisingStep, out: Mapping[str, Tensor], batch: Any, outputs: Outputs, *, of_zero: bool = False
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What to compare, under the names of the errors: (name, prediction, target), in the data's units.

    Args:
        out: denormalised predictions, by output.
        batch: with the labels, on the model's device.
        of_zero: also what predicting no noise would give.
    """
    for name, prediction in () if step.objective.clean else out.items():
        hybrid = name == "forces" and step.noise_for_forces
        if not hybrid and not step.trains(name):
            continue
        rows = _judged_rows(step, name, outputs, len(prediction), uncorrupted_only=hybrid)
        rows = rows.to(prediction.device, non_blocking=True)
        yield f"denoising_{_label(name)}_mae", prediction[rows], batch[name].view(len(prediction), -1)[rows]
    rows = step.corruption.mask.nonzero()[:, 0]
    noise = loss.noise_in_angstrom(step.noise_of(rows), step.objective.scale)
    target = step.corruption.noise[rows].to(noise.device, non_blocking=True)
    yield "denoising_pos_mae", noise, target
    if of_zero:
        yield "denoising_pos_mae_zero", torch.zeros_like(target), target


def _judged_rows(step: DenoisingStep, name: str, outputs: Outputs, count: int, *, uncorrupted_only: bool) -> Tensor:
    """Row numbers of an output whose error is reported."""
    if outputs[name]["level"] != "atom":
        return torch.arange(count)
    judged = ~step.fixed if outputs[name]["eval_on_free_atoms"] else torch.ones_like(step.fixed)
    if uncorrupted_only:
        judged = judged & ~step.corruption.mask
    return judged.nonzero()[:, 0]


def _label(target: str) -> str:
    return "force" if target == "forces" else target  # as the log of DeNS's authors has it
