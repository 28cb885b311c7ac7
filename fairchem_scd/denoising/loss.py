"""The loss of a denoising step, as functions of tensors and masks.

Nothing here knows a host. A host's loss function comes in as a `LossFunction`, which does not reduce. Sums over ranks
go through `Ranks.total`: every rank makes the same calls of it in the same order, whatever its batch holds.

**Rows and masks.** Some hosts hand over only the rows that train (fairchem 1.x), others all rows with a mask of those
that train (fairchem 2.x). Both work here: `mask` is [n] bool, and None where every row trains. Without a mask the
sums are those of the rows alone, to the last bit.

**The unit of the noise.** The noise head predicts ε/s: the displacement ε [Å] in units of a scale s [Å]. A task says s
in `Objective.scale`: its σ, or with a schedule of σ the largest. Where it says None, s is the value of the task's
`RunningScale`, and whoever runs the step updates that module with the step's noise and puts its value into the
objective before the passes run. From then on s has one value in the step: `noise_target` divides by it, and
`noise_in_angstrom` multiplies by it for the errors that are reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fairchem_scd.denoising.corruption import Corruption

LossFunction = Callable[[Tensor, Tensor, Any], Tensor]
"""(prediction [n, d], target [n, d], natoms) → the loss of each element [n, d]; of each row [n] where it is a norm."""

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class Ranks:
    """What a mean over all ranks needs.

    Attributes:
        size: number of ranks. Gradients are averaged over them, so a mean over all items is this many times a rank's
            own share of it.
        total: sum of a count over the ranks. A collective call.
    """

    size: int
    total: Callable[[Any], Any]


def reduce(items: Tensor, reduction: Reduction, ranks: Ranks, mask: Tensor | None = None) -> Tensor:
    """This rank's part of the mean of all ranks' items, or the sum of its own items.

    Args:
        items: [n] or [n, d] losses.
        reduction: the mean is over the items of all ranks, and zero where there are none; the sum is over this rank's.
        ranks: a mean makes one call of `total`, a sum none.
        mask: [n] bool, the rows that count; None: all.

    Returns:
        A scalar. The mean of the ranks' scalars is the mean over all items.
    """
    if mask is not None:
        items = torch.where(_rows_like(mask, items), items, 0.0)
    if reduction == "sum":
        return items.sum()
    # In this order: it is how fairchem's own mean is rounded.
    return items.sum() * ranks.size / _at_least_one(ranks.total(_count(items, mask)))


def hybrid_items(
    fn: LossFunction,
    prediction: Tensor,
    target: Tensor,
    noise: Tensor,
    noise_target: Tensor,
    corrupted: Tensor,
    *,
    force_coefficient: float,
    noise_coefficient: float,
    natoms: Tensor | None = None,
) -> Tensor:
    """The force loss of a DeNS step, atom by atom: corrupted atoms train on their noise, the others on their forces.

    c_i λ_D L(ε_i/s, ε̂_i) + (1 − c_i) λ_F L(F_i, F̂_i), the hybrid term of DeNS (arXiv 2403.09549) with the
    config's own force loss for L.

    Args:
        fn: L.
        prediction: [n, 3] F̂, as the host has it, which may be normalised.
        target: [n, 3] F, likewise.
        noise: [n, 3] ε̂, in units of s.
        noise_target: [n, 3] ε/s.
        corrupted: [n] bool, c.
        force_coefficient, noise_coefficient: λ_F and λ_D.
        natoms: handed to `fn`.

    Returns:
        [n] or [n, 3], as `fn` has it. `reduce` makes the loss of it.
    """
    rows = corrupted[:, None]
    items = fn(torch.where(rows, noise, prediction), torch.where(rows, noise_target, target), natoms)
    return items * torch.where(_rows_like(corrupted, items), noise_coefficient, force_coefficient)


def noise_term(
    fn: LossFunction,
    noise: Tensor,
    noise_target: Tensor,
    *,
    coefficient: float,
    ranks: Ranks,
    mask: Tensor | None = None,
) -> Tensor:
    """The noise as a term of its own beside other losses: λ times the mean of L(ε_i/s, ε̂_i) over all ranks' atoms.

    SCD (arXiv 2603.17196) and noisy nodes train by it.

    Args:
        fn: L.
        noise, noise_target: [n, 3] ε̂ and ε/s.
        coefficient: λ.
        ranks: `total` is called once.
        mask: [n] bool, the corrupted atoms; None: the rows are those of corrupted atoms.
    """
    return coefficient * reduce(fn(noise, noise_target, None), "mean", ranks, mask)


@torch.no_grad()
def corrupted_share(items: Tensor, corrupted: Tensor) -> Tensor:
    """Share of the items' sum that corrupted rows have, for the log. Zero where the sum is zero."""
    return (items * _rows_like(corrupted, items)).sum() / items.sum().clamp(min=torch.finfo(items.dtype).tiny)


def trained_atoms(fixed: Tensor, corruption: Corruption, *, free_only: bool, noise_for_forces: bool) -> Tensor:
    """[N] bool: the atoms whose forces train, or whose noise trains in their place.

    Args:
        fixed: [N] bool.
        corruption: of the step.
        free_only: the config trains forces on free atoms alone.
        noise_for_forces: the noise takes the place of the forces. Then fixed atoms train where they were moved.
    """
    if not free_only:
        return torch.ones_like(fixed)
    return ~fixed | corruption.mask if noise_for_forces else ~fixed


def noise_target(corruption: Corruption, rows: Tensor, scale: float | Tensor, device: torch.device) -> Tensor:
    """[n, 3] ε/s of some atoms.

    Args:
        corruption: of the step, on the CPU.
        rows: [n] row numbers, on the CPU, so that nothing waits for the device.
        scale: s, Å.
        device: of the result.
    """
    return corruption.noise[rows].to(device, non_blocking=True) / scale


def noise_in_angstrom(noise: Tensor, scale: float | Tensor) -> Tensor:
    """Predicted noise, which is in units of s, in Å and without gradient."""
    return noise.detach() * scale


def _rows_like(mask: Tensor, items: Tensor) -> Tensor:
    """A mask [n] of rows, for items [n] or [n, d]."""
    return mask if items.dim() == 1 else mask[:, None]


def _count(items: Tensor, mask: Tensor | None) -> Any:
    """How many items count; a tensor where a mask on the device says so, since reading it would wait for the device."""
    return items.numel() if mask is None else mask.sum() * (items.shape[1] if items.dim() == 2 else 1)


def _at_least_one(count: Any) -> Any:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
