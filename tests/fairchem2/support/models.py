"""Models without a unit: plans, gradients."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import hydra
import torch
from fairchem.core.datasets.atomic_data import AtomicData

from fairchem_scd.denoising.corruption import Corruption
from fairchem_scd.denoising.plan import Plan
from fairchem_scd.denoising.tasks import build_tasks
from fairchem_scd.fairchem2.batch import structures_of
from fairchem_scd.fairchem2.model import convert
from tests.fairchem2.support.configs import model_config


def converted(
    denoising: Mapping[str, Any] | None, model: Mapping[str, Any] | None = None, *, supervised: bool = True
) -> torch.nn.Module:
    """A model with the tasks of a block; the host's own where there is no block. Equal weights for equal models."""
    torch.manual_seed(1)
    made = hydra.utils.instantiate(dict(model_config() if model is None else model))
    if denoising is not None:
        convert(made, build_tasks(denoising, supervised)[0])
    return made.train()


def stirred(model: torch.nn.Module) -> torch.nn.Module:
    """The model with other weights wherever they are zero at the start, as after some training."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


def plan_of(
    model: torch.nn.Module,
    batch: AtomicData,
    task: str | None = None,
    *,
    step: int = 1,
    conditioned: Sequence[bool] | None = None,
) -> tuple[Plan, Corruption]:
    """The plan of a step of one of a model's tasks.

    Args:
        conditioned: for each structure, whether the noisy pass is conditioned on its embedding; None: as drawn.
    """
    tasks = model.denoising_tasks
    drawn = tasks[task or next(iter(tasks))]
    structures = structures_of(batch, model.adapter.periodic(batch.pbc), _LABELLED)
    corruption = drawn.corrupt(structures, seed=0, step=step)
    passes = drawn.passes(structures, corruption, seed=0, step=step)
    if conditioned is not None:
        passes = tuple(
            replace(run, conditioned=torch.tensor(conditioned)) if run.conditioned is not None else run
            for run in passes
        )
    return Plan(drawn.name, passes), corruption


_LABELLED = [Namespace(name=name, property=name) for name in ("energy", "forces", "stress")]


def gradients(
    model: torch.nn.Module, batch: AtomicData, plan: Plan | None = None, *, value: bool = False
) -> dict[str, torch.Tensor] | float:
    """The gradient of every trained parameter, for a loss of all that the model returns; or the loss itself."""
    model.zero_grad()
    torch.manual_seed(5)
    out = model(copy.deepcopy(batch), *(() if plan is None else (plan,)))
    generator = torch.Generator().manual_seed(6)
    loss = 0.0
    for name in sorted(_flat(out)):
        weights = torch.randn(_flat(out)[name].shape, generator=generator, dtype=torch.float64)
        loss = loss + (_flat(out)[name] * weights).sum() + (_flat(out)[name] ** 2).sum()
    if value:
        return loss.item()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def _flat(out: Any, name: str = "") -> dict[str, torch.Tensor]:
    """What a model returned, by name; embeddings are not for a loss."""
    if isinstance(out, torch.Tensor):
        return {name: out}
    found = {}
    for key, each in out.items():
        if "embeddings" not in key:
            found.update(_flat(each, f"{name}.{key}"))
    return found


@contextmanager
def with_rotations_fixed() -> Iterator[None]:
    """While entered, the host's random frames of edges are the same in every pass over as many edges."""
    drawn = torch.rand, torch.rand_like

    def same(like: torch.Tensor) -> torch.Tensor:
        return torch.full_like(like, 0.3)

    torch.rand_like = same
    torch.rand = lambda *size, **how: torch.full(size if isinstance(size[0], int) else size[0], 0.3, **how)
    try:
        yield
    finally:
        torch.rand, torch.rand_like = drawn
