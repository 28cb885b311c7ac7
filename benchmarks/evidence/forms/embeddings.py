"""Forms in which something else is told."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.evidence.forms.parts import blocks_of, head_of, numbers_of, seen_of
from fairchem_scd.denoising.conditions import BoundModulation, ConditionHead, Modulation
from fairchem_scd.denoising.conditions.modulation import BlockModulation

ELEMENTS = 100
TOKENS = 4


def standardised(model: Any) -> None:
    """The condition is c with each component's mean and variance over the batch taken out, instead of its LayerNorm.

    In validation they are running ones.
    """
    head = head_of(model)
    head.norm = nn.BatchNorm1d(head.norm.normalized_shape[0], affine=False)


def running(model: Any) -> None:
    """As `standardised`, by the running statistics in training too, not by those of each batch."""
    head = head_of(model)
    head.norm = _Running(head.norm.normalized_shape[0])


class _Running(nn.Module):
    """Takes out a running mean and variance of its inputs [B, C], through which no gradient flows."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("moments", torch.zeros(2, channels))
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, values: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.batches += 1
                fresh = torch.stack([values.mean(dim=0), values.square().mean(dim=0)])
                self.moments.lerp_(fresh, 1 / self.batches.clamp(max=100))
        mean, square = self.moments.clone()
        return (values - mean) / (square - mean.square() + 1e-5).sqrt()


def without_elements(model: Any) -> None:
    """As `running`; and what an atom's features owe to its element is taken out before they are pooled.

    The noisy structure has the same elements, so that they tell nothing of the noise. From each atom's features the
    running mean over atoms of its element is subtracted, and the rest divided by its running root mean square, in place
    of the first LayerNorm.
    """
    head = head_of(model)
    head.__class__, head.numbers = _WithoutElements, numbers_of(model)
    head.atoms[0] = _Centred(head.norm.normalized_shape[0])
    running(model)


class _WithoutElements(ConditionHead):
    def forward(self, scalars: Tensor, batch: Tensor, size: int) -> Tensor:
        self.atoms[0].numbers = self.numbers.of_pass
        return super().forward(scalars, batch, size)


class _Centred(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(ELEMENTS + 1, channels))
        self.register_buffer("seen", torch.zeros(ELEMENTS + 1, 1))
        self.scale = _Running(channels)

    def forward(self, features: Tensor) -> Tensor:
        features, numbers = features.float(), self.numbers
        if self.training:
            with torch.no_grad():
                count = torch.bincount(numbers, minlength=len(self.means))[:, None].float()
                fresh = torch.zeros_like(self.means).index_add_(0, numbers, features) / count.clamp(min=1)
                self.seen += count > 0
                self.means.lerp_(fresh, torch.where(count > 0, 1 / self.seen.clamp(1, 100), 0.0))
        return self.scale(features - self.means[numbers].clone())


def moments(model: Any) -> None:
    """Half of the channels are pooled by their root mean square over the atoms, the others by their sum, as usual."""
    head_of(model).__class__ = Moments


class Moments(ConditionHead):
    def forward(self, scalars: Tensor, batch: Tensor, size: int) -> Tensor:
        atoms = self.atoms(scalars).float()
        half = atoms.shape[1] // 2
        values = torch.cat([atoms[:, :half], atoms[:, half:].square()], dim=1)
        pooled = atoms.new_zeros(size, atoms.shape[1]).index_add_(0, batch, values)
        count = torch.bincount(batch, minlength=size).clamp(min=1)[:, None]
        root = (pooled[:, half:] / count + 1e-6).sqrt()
        return self.structure(torch.cat([pooled[:, :half], root], dim=1)).float()


def tokens(model: Any) -> None:
    """Four vectors a structure instead of one, each pooled with attention weights over the atoms of its own.

    In each block an atom reads a mixture of them, whose weights follow from its l = 0 features. Still no vector is an
    atom's own, unless one atom has all the weight.
    """
    head = head_of(model)
    channels = head.norm.normalized_shape[0]
    head.__class__, head.scores = _Tokens, nn.Linear(channels, TOKENS)
    for block in blocks_of(model):
        block.__class__, block.choice = _ReadsTokens, nn.Linear(channels, TOKENS)


class _Vectors(ConditionHead):
    """An embedding of several vectors a structure, [B, count · C]."""

    count: int

    def condition(self, embedding: Tensor, conditioned: Tensor) -> Tensor:
        return self.norm(embedding.unflatten(1, (self.count, -1))).float().flatten(1)


class _Tokens(_Vectors):
    count = TOKENS

    def forward(self, scalars: Tensor, batch: Tensor, size: int) -> Tensor:
        atoms = self.atoms(scalars).float()
        # No score is so large that its exponential is none: a softmax without the usual shift.
        weights = torch.exp(5 * torch.tanh(self.scores(atoms)))
        total = weights.new_zeros(size, TOKENS).index_add(0, batch, weights)
        values = weights[:, :, None] * atoms[:, None, :]
        pooled = values.new_zeros(size, *values.shape[1:]).index_add(0, batch, values) / total[:, :, None].clamp(1e-9)
        return self.structure(pooled).float().flatten(1)


class _ReadsTokens(BlockModulation):
    def forward(self, scalars: Tensor, condition: Tensor, conditioned: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.choice(seen_of(scalars)).softmax(dim=1)
        read = (weights[:, :, None] * condition.unflatten(1, (TOKENS, -1))).sum(dim=1)
        return super().forward(scalars, read, conditioned)


def by_element(model: Any) -> None:
    """A vector for each element of a structure, pooled over its atoms; an atom is told that of its own element."""
    head, numbers = head_of(model), numbers_of(model)
    head.__class__, head.numbers = _ByElement, numbers
    for block in blocks_of(model):
        block.__class__, block.numbers = _ReadsItsElement, numbers


class _ByElement(_Vectors):
    count = ELEMENTS

    def forward(self, scalars: Tensor, batch: Tensor, size: int) -> Tensor:
        atoms = self.atoms(scalars).float()
        place = batch * ELEMENTS + self.numbers.of_pass
        pooled = atoms.new_zeros(size * ELEMENTS, atoms.shape[1]).index_add(0, place, atoms)
        return self.structure(pooled).float().view(size, -1)


class _ReadsItsElement(BlockModulation):
    def forward(self, scalars: Tensor, condition: Tensor, conditioned: Tensor) -> tuple[Tensor, Tensor]:
        atoms = torch.arange(len(scalars), device=scalars.device)
        own = condition.unflatten(1, (ELEMENTS, -1))[atoms, self.numbers.of_pass]
        return super().forward(scalars, own, conditioned)


def dropped_by_atom(model: Any) -> None:
    """In training a tenth of the atoms of structures with a condition go without it, drawn atom by atom."""
    model.denoising["scd"]["modulation"].__class__ = _DroppedByAtom


class _DroppedByAtom(Modulation):
    def bind(self, condition: Tensor, conditioned: Tensor) -> BoundModulation:
        if self.training:
            conditioned = conditioned & (torch.rand(len(conditioned), device=conditioned.device) >= 0.1)
        return super().bind(condition, conditioned)
