"""Units without a command, trained on batches."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import hydra
import torch
import torch.distributed as dist
from fairchem.core.common import distutils
from fairchem.core.datasets.atomic_data import AtomicData
from fairchem.core.units.mlip_unit.mlip_unit import MLIPTrainEvalUnit
from omegaconf import OmegaConf
from torchtnt.framework import evaluate, train

from fairchem_scd.fairchem2.unit import DenoisingTrainEvalUnit
from tests.fairchem2.support.configs import model_config, optimisation, tasks_config


def one_rank() -> None:
    """A process group of one rank, which the host's unit cannot do without."""
    if not dist.is_initialized():
        distutils.assign_device_for_local_rank(cpu=True, local_rank=0)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def unit_of(
    denoising: Mapping[str, Any] | None = None,
    *,
    model: Mapping[str, Any] | None = None,
    tasks: Sequence[Mapping[str, Any]] | None = None,
    job: Mapping[str, Any] | None = None,
    cls: type[MLIPTrainEvalUnit] | None = None,
    **arguments: Any,
) -> MLIPTrainEvalUnit:
    """A unit as a run would have it, with the same fresh weights for equal models."""
    one_rank()
    torch.manual_seed(1)
    config = {"seed": 0, "debug": True, "logger": None, "graph_parallel": {"group_size": 1}, **(job or {})}
    built = hydra.utils.instantiate(dict(model_config() if model is None else model))
    made = [hydra.utils.instantiate(each) for each in (tasks_config() if tasks is None else tasks)]
    how = {
        name: hydra.utils.instantiate(value) if isinstance(value, dict) else value
        for name, value in optimisation(10).items()
    }
    cls = cls or (MLIPTrainEvalUnit if denoising is None else DenoisingTrainEvalUnit)
    block = {} if denoising is None else {"denoising": OmegaConf.create(dict(denoising))}
    return cls(OmegaConf.create(config), built, tasks=made, **block, **{**how, **arguments})


def train_on(unit: MLIPTrainEvalUnit, batches: Iterable[AtomicData]) -> None:
    """Train a unit on batches, a step each, as one epoch more."""
    epochs = unit.train_progress.num_epochs_completed + 1
    train(unit, [copy.deepcopy(batch) for batch in batches], max_epochs=epochs)


def validate(unit: MLIPTrainEvalUnit, batches: Sequence[AtomicData], **how: Any) -> dict[str, float]:
    """What the host's logger gets of a validation on batches; `how`: arguments of the host's loop."""
    found: dict[str, float] = {}
    unit.logger = SimpleNamespace(log=lambda values, commit: found.update(values))
    try:
        evaluate(unit, Loader(batches), **how)
    finally:
        unit.logger = None
    return found


class Loader:
    """A loader that gives copies of batches, and that draws a random number when it starts, as torch's do.

    Attributes:
        given: how many it has given.
    """

    dataset = SimpleNamespace(dataset_names=["mo.train"])

    def __init__(self, batches: Sequence[AtomicData]) -> None:
        self.batches, self.given = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[AtomicData]:
        torch.randint(9, ())
        for batch in self.batches:
            self.given += 1
            yield copy.deepcopy(batch)


def plain_state(unit: MLIPTrainEvalUnit) -> dict[str, Any]:
    """The state of a unit that has trained, without what denoising adds to it."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(item) for key, item in value.items() if "denoising" not in str(key).split(".")}
        if isinstance(value, list):
            return [without(item) for item in value if "denoising" not in str(item).split(".")]
        return value.clone() if isinstance(value, torch.Tensor) else value

    return without(unit.state_dict())


def inner(unit: MLIPTrainEvalUnit) -> torch.nn.Module:
    """The model within the host's wrapper."""
    return unit.model.module
