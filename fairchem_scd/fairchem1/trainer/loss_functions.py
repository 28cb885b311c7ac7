"""Losses of a denoising step, as stand-ins for the config's loss functions in the host's own loss loop.

The host masks, dereferences and normalises; a stand-in sees what its loss function would have seen. Every rank makes
the same collective calls in the same order, whatever its batch holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class HostLoss(Protocol):
    """The part of the host's DDPLoss that is used here."""

    loss_fn: Callable[..., Tensor]
    reduction: str

    def __call__(self, input: Tensor, target: Tensor, natoms: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Ranks:
    """What a mean over all ranks needs.

    Attributes:
        size: number of ranks; DDP divides gradients by it.
        total: sum of an integer over the ranks.
    """

    size: int
    total: Callable[[int], Any]

    def reduce(self, fn: HostLoss, items: Tensor) -> Tensor:
        """Mean (or sum, if the loss function says so) of unreduced losses over all ranks; zero over no items."""
        if fn.reduction == "sum":
            return items.sum()
        return items.sum() * self.size / max(self.total(items.numel()), 1)


class LossTerms(dict[str, Tensor]):
    """The parts of one step's loss, by name, detached."""

    def note(self, name: str, value: Tensor) -> None:
        self[name] = self.get(name, 0) + value.detach()


class RecordedLoss:
    """A loss function whose value is noted."""

    def __init__(self, fn: HostLoss, coefficient: float, parts: LossTerms, name: str) -> None:
        self.fn, self.coefficient, self.parts, self.name = fn, coefficient, parts, name

    @classmethod
    def of(cls, target: str, info: Mapping[str, Any], parts: LossTerms) -> tuple[str, dict[str, Any]]:
        """The entry of the host's list of loss functions, noted."""
        return target, {"fn": cls(info["fn"], info["coefficient"], parts, f"{target}_loss"), "coefficient": 1}

    def __call__(self, pred: Tensor, target: Tensor, natoms: Tensor) -> Tensor:
        loss = self.coefficient * self.fn(pred, target, natoms=natoms)
        self.parts.note(self.name, loss)
        return loss


class UncorruptedOnly:
    """A loss function over the rows of `keep` alone: structures, or their atoms, that were not corrupted.

    Args:
        keep: [K] row numbers.
        natoms: [K] or [B] as the loss function is to see it.
    """

    def __init__(self, fn: HostLoss, ranks: Ranks, keep: Tensor, natoms: Tensor) -> None:
        self.loss_fn, self.reduction, self.fn, self.ranks = fn.loss_fn, fn.reduction, fn, ranks
        self.keep, self.natoms = keep, natoms

    def __call__(self, pred: Tensor, target: Tensor, natoms: Tensor) -> Tensor:
        items = self.loss_fn(pred[self.keep], target[self.keep], self.natoms)
        return self.ranks.reduce(self.fn, items)


class Hybrid:
    """The force loss of a DeNS step: corrupted atoms train on their noise, the others on their forces.

    mean_i [ c_i λ_D ‖ε_i/σ − ε̂_i‖ + (1 − c_i) λ_F ‖F_i − F̂_i‖ ] over the trained atoms of all ranks, with the config's
    own force loss for ‖·‖ (DeNS, arXiv 2403.09549).

    Args:
        fn: the config's force loss.
        force_coefficient, noise_coefficient: λ_F and λ_D.
        noise: [n, 3] predicted, in units of σ, of the atoms the host passes in.
        noise_target: [n, 3] ε/σ of the same atoms.
        corrupted: [n, 1] bool, c.
    """

    def __init__(
        self,
        fn: HostLoss,
        ranks: Ranks,
        parts: LossTerms,
        *,
        force_coefficient: float,
        noise_coefficient: float,
        noise: Tensor,
        noise_target: Tensor,
        corrupted: Tensor,
    ) -> None:
        self.fn, self.ranks, self.parts = fn, ranks, parts
        self.force_coefficient, self.noise_coefficient = force_coefficient, noise_coefficient
        self.noise, self.noise_target, self.corrupted = noise, noise_target, corrupted

    def __call__(self, pred: Tensor, target: Tensor, natoms: Tensor) -> Tensor:
        pred = torch.where(self.corrupted, self.noise, pred)
        target = torch.where(self.corrupted, self.noise_target, target)
        items = self.fn.loss_fn(pred, target, natoms)
        # [n] for a norm, [n, 3] for an elementwise loss.
        corrupted = self.corrupted if items.dim() == 2 else self.corrupted[:, 0]
        items = items * torch.where(corrupted, self.noise_coefficient, self.force_coefficient)
        loss = self.ranks.reduce(self.fn, items)
        with torch.no_grad():
            share = (items * corrupted).sum() / items.sum().clamp(min=torch.finfo(items.dtype).tiny)
            self.parts.note("denoising_pos_loss", loss * share)
            self.parts.note("denoising_force_loss", loss * (1 - share))
        return loss
