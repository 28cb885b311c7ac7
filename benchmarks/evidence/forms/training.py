"""Forms that are trained in another way."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.evidence.forms.difference import mean_of_structures
from fairchem_scd.denoising.corruption import Corruption
from fairchem_scd.denoising.plan import EMBEDDING, NOISE, VALIDATION, Plan
from fairchem_scd.fairchem1.hydra import DenoisingHydra


def contrastive(model: Any) -> None:
    """A third pass is told another structure's embedding, and should do worse than the second by a margin.

    The term is mean over structures of max(0, 0.2 + e_right − e_other), with errors in σ², and the weight of the
    noise's own.
    """
    model.__class__ = _Contrastive


class _Contrastive(DenoisingHydra):
    def forward(self, data: Any, plan: Plan | None = None) -> dict[str, Any]:
        if plan is None or not self.training:
            return super().forward(data, plan)
        out = super().forward(data, replace(plan, returns_embedding=True))
        noisy, task = plan.passes[-1], self.denoising_tasks["scd"]
        asked = replace(noisy, given=out.pop(EMBEDDING).roll(1, 0))
        other = super().forward(data, Plan(plan.task, (asked,)))[NOISE]
        target = (noisy.pos - data.pos) / task.settings.std
        errors = ((noise - target).square() for noise in (out[NOISE], other))
        right, wrong = (mean_of_structures(of, data.batch, len(data.natoms)).mean(dim=1) for of in errors)
        hinge = (0.2 + right - wrong).clamp(min=0)[noisy.conditioned].sum() / len(data.natoms)
        out[NOISE] = _WithTerm.apply(out[NOISE], task.settings.coefficient_of(False) * hinge)
        return out


class _WithTerm(torch.autograd.Function):
    """Returns its first argument as it is, and adds the second to whatever loss is made of it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, term: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones(())


def from_large_noise(task: Any) -> None:
    """σ falls from four times its value to its value, over the first 500 steps of training.

    Args:
        task: the trainer's, which draws the noise.
    """
    drawn = task.corrupt
    first = None

    def corrupt(structures: Any, *, seed: int, step: int) -> Corruption:
        nonlocal first
        found = drawn(structures, seed=seed, step=step)
        if step == VALIDATION:
            return found
        first = step if first is None else first
        factor = math.exp(math.log(4.0) * max(0.0, 1 - (step - first) / 500))
        return replace(found, noise=factor * found.noise, sigma=factor * found.sigma)

    task.corrupt = corrupt


def with_mean(task: Any) -> None:
    """In training the noise keeps its mean over a structure's atoms, which no model can find.

    Args:
        task: of all atoms, the trainer's, which draws the noise.
    """
    drawn = task.corrupt

    def corrupt(structures: Any, *, seed: int, step: int) -> Corruption:
        found = drawn(structures, seed=seed, step=step)
        if step == VALIDATION:
            return found
        # The mean of N independent displacements has standard deviation σ / √N, and is independent of what is left.
        means = np.random.default_rng([seed, step]).standard_normal((len(found.sigma), 3), dtype=np.float32)
        size = found.sigma / structures.natoms.sqrt()
        return replace(found, noise=found.noise + (size[:, None] * torch.from_numpy(means))[found.batch])

    task.corrupt = corrupt
