"""How well a model denoises, told the right structure's embedding, another's or none; and a form of the condition."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from fairchem_scd.denoising import passes
from fairchem_scd.denoising.conditions import SelfCondition
from fairchem_scd.denoising.plan import NOISE, VALIDATION, Plan
from fairchem_scd.denoising.structures import structures_of
from fairchem_scd.fairchem1.hydra import DenoisingHydra, repeated_directions


@torch.no_grad()
def noise_errors(trainer: Any, told: str, batch_size: int = 16) -> Tensor:
    """Noise errors of a trainer's present weights, in eval mode, on its held-out structures.

    The noise is that of validation, the same for every run.

    Args:
        trainer: of SCD on the whole structure.
        told: what the noisy pass is told: "right", the structure's own embedding; "other", that of the structure
            before it in its batch; "none".

    Returns:
        [B] mean square of the noise's error over σ², of each structure. Predicting zero has about 1 − 1/N for N atoms.
    """
    if told not in ("right", "other", "none"):
        raise ValueError(f"told: right, other or none (got {told!r})")
    rows, model, task = trainer.val_dataset, trainer._unwrapped_model, trainer.tasks["scd"]
    errors = []
    for start in range(0, len(rows), batch_size):
        batch = trainer.collater([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        structures = structures_of(batch, repeated_directions(model.backbone, batch))
        corruption = task.corrupt(structures, seed=0, step=VALIDATION)
        planned = task.passes(structures, corruption, seed=0, step=VALIDATION)
        if told == "none":
            planned = (replace(planned[-1], conditioned=None),)
        with _rolled(model) if told == "other" else _as_it_is():
            noise = model(batch, plan=Plan(task.name, planned))[NOISE]
        error = (noise - corruption.noise / task.settings.std).square().mean(dim=1)
        errors += [of.mean() for of in error.split(structures.natoms.tolist())]
    return torch.stack(errors)


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


@contextmanager
def _rolled(model: DenoisingHydra) -> Iterator[None]:
    """While entered, each structure is told the embedding of the one before it in its batch."""
    head = model.denoising["scd"]["condition_head"]
    hook = head.register_forward_hook(lambda module, args, embedding: embedding.roll(1, 0))
    model.rolled = True
    try:
        yield
    finally:
        hook.remove()
        model.rolled = False


@torch.no_grad()
def dimensions(trainer: Any) -> float:
    """Effective number of dimensions of what held-out structures are told: participation ratio of its covariance.

    (Σλ)² / Σλ² over the eigenvalues λ: 1 where all lie on a line, the number of channels where they fill all alike.
    """
    model = trainer._unwrapped_model
    told: list[Tensor] = []
    if isinstance(model, DifferenceHydra):
        model.differences = told
        noise_errors(trainer, "right")
        model.differences = None
        return participation_ratio(torch.cat(told))
    head = model.denoising["scd"]["condition_head"]
    hook = head.register_forward_hook(lambda module, args, embedding: told.append(embedding))
    noise_errors(trainer, "right")
    hook.remove()
    return participation_ratio(head.norm(torch.cat(told)))


def participation_ratio(samples: Tensor) -> float:
    """(Σλ)² / Σλ² over the eigenvalues λ of the covariance of samples [B, C]; zero where they do not vary."""
    centred = (samples - samples.mean(dim=0)).double()
    covariance = centred.T @ centred
    square = covariance.square().sum()
    return (covariance.trace().square() / square).item() if square > 0 else 0.0


# --- the difference form ----------------------------------------------------------------------------------------------


class DifferenceHydra(DenoisingHydra):
    """SCD whose blocks are told by how much the noisy structure differs from the clean one, in place of c.

    Each block b is told d_b = (z_b(x) − z_b(x̃)) / rms_b, where z_b is the mean over a structure's atoms of the l = 0
    features that enter the block after its pre-norm, and rms_b a running root mean square per channel. To first order
    in the noise a model told invariants c_k of the clean structure gains by −Σ_k (c_k(x̃) − c_k(x)) ∇_i c_k, and
    c_k(x̃), a mean over all atoms, is what messages within a cutoff cannot form.

    Use `told_differences` to make a model one.
    """

    def forward(self, data: Any, plan: Plan | None = None) -> dict[str, Any]:
        if plan is None:
            return super().forward(data)

        def clean(model: DenoisingHydra, view: Any) -> _Means:
            self._clean = _Means(view.batch, len(view.natoms))
            return self._clean

        def noisy(condition: SelfCondition, embedding: Tensor, conditioned: Tensor, batch: Tensor) -> _Difference:
            return _Difference(self, batch, conditioned, condition.modulation.blocks)

        # The two places where the engine asks for a pass's modulation: with a condition, and without.
        with mock.patch.object(passes, "_without_condition", clean), mock.patch.object(SelfCondition, "bind", noisy):
            return super().forward(data, plan)


def told_differences(model: DenoisingHydra) -> None:
    """Make a model one that is told differences, in place: its class changes, its modules stay."""
    model.__class__ = DifferenceHydra
    model.rolled, model.differences = False, None
    for block in range(model.adapter.num_modulated):
        model.register_buffer(_square(block), torch.zeros(model.adapter.scalar_channels), persistent=False)
        model.register_buffer(_count(block), torch.zeros(()), persistent=False)


def _square(block: int) -> str:
    return f"difference_square_{block}"


def _count(block: int) -> str:
    return f"difference_count_{block}"


class _Means:
    """The z_b of a pass over a clean structure, which it leaves as it is."""

    def __init__(self, batch: Tensor, size: int) -> None:
        self.batch, self.size = batch, size
        self.of_block: dict[int, Tensor] = {}

    def scalars(self, block: int, scalars: Tensor) -> Tensor:
        self.of_block[block] = mean_of_structures(scalars, self.batch, self.size)
        return scalars

    def update(self, block: int, update: Tensor) -> Tensor:
        return update


class _Difference:
    """A modulation by differences, in the place of `conditions.BoundModulation`."""

    def __init__(self, model: DifferenceHydra, batch: Tensor, conditioned: Tensor, blocks: nn.ModuleList) -> None:
        self.model, self.batch, self.conditioned, self.blocks = model, batch, conditioned, blocks
        self.gates: dict[int, Tensor] = {}

    def scalars(self, block: int, scalars: Tensor) -> Tensor:
        model, clean = self.model, self.model._clean.of_block[block]
        if model.rolled:
            clean = clean.roll(1, 0)
        difference = clean - mean_of_structures(scalars, self.batch, len(self.conditioned))
        square, count = getattr(model, _square(block)), getattr(model, _count(block))
        if model.training:
            with torch.no_grad():
                count += 1
                square.lerp_(difference.square().mean(dim=0), max(0.01, 1 / count.item()))
        condition = (difference / (square + 1e-12).sqrt()).clamp(-5, 5)
        if model.differences is not None and block == len(self.blocks) - 1:
            model.differences.append(condition)
        rows = self.batch
        out, self.gates[block] = self.blocks[block](scalars, condition[rows], self.conditioned[rows])
        return out

    def update(self, block: int, update: Tensor) -> Tensor:
        return update * self.gates.pop(block).to(update.dtype)


def mean_of_structures(values: Tensor, batch: Tensor, size: int) -> Tensor:
    """[B, C] means over the atoms of each of B = `size` structures, of [N, C]."""
    total = values.new_zeros(size, values.shape[1]).index_add(0, batch, values)
    return total / torch.bincount(batch, minlength=size).clamp(min=1)[:, None]
