"""The model: the host's hydra as the config builds it, converted in place, with what the denoising tasks add."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from fairchem.core.datasets.atomic_data import AtomicData
from torch import Tensor, nn

from fairchem_scd.denoising import passes
from fairchem_scd.denoising.plan import Pass, Plan
from fairchem_scd.denoising.tasks import DenoisingTask, TaskModules
from fairchem_scd.fairchem2.backbones import Adapter, adapter_for
from fairchem_scd.fairchem2.batch import complete, view_of


class DenoisingHydra:
    """Mixed in front of the class of a hydra, so that it can run the passes of denoising tasks.

    Called without a plan it computes exactly what the host's model computes; `backbone.*` and `output_heads.*` keep
    the host's keys, and all that is added lies under `denoising.<task>.*`. This class says what a view of the host's
    batch is and how the host's heads are called; denoising/passes.py does the rest.

    Attributes:
        denoising: what each task added, by its name.
        denoising_tasks: the tasks, by name. (`tasks` are the host's.)
        adapter: of the backbone.
    """

    backbone: nn.Module
    output_heads: nn.ModuleDict
    denoising: nn.ModuleDict
    denoising_tasks: dict[str, DenoisingTask]
    adapter: Adapter

    def forward(self, data: AtomicData, plan: Plan | None = None) -> dict[str, Any]:
        """Run the host's forward, or the passes of a plan.

        Args:
            data: a collated batch of N atoms.
            plan: passes of one task; None: the plain model.

        Returns:
            The heads' outputs as the host returns them, and the predicted noise [N, 3] under `NOISE` if a pass has
            the noise head. In training every parameter has a gradient, zero where the plan did not use it.
        """
        if plan is None:
            return passes.run_plain(self, data)
        out = passes.run_plan(self, data, plan)
        complete(data)
        return out

    # --- what the engine asks of a host: see passes.DenoisingModel ------------------------------------------------

    def view_of(self, data: AtomicData, run: Pass) -> AtomicData:
        return view_of(data, run)

    def host_forward(self, view: AtomicData) -> dict[str, Any]:
        return super().forward(view)

    def vectors(self, head: nn.Module, view: AtomicData, embedding: Any) -> Tensor:
        # Under autocast as the host calls its heads.
        with torch.autocast(view.pos.device.type, enabled=head.use_amp):
            (vectors,) = head(view, embedding).values()
        return vectors


def convert(model: nn.Module, tasks: Mapping[str, DenoisingTask]) -> None:
    """Make a DenoisingHydra of a hydra, in place.

    The object stays the one that the host was given, whichever of its functions made it, and so does its config.

    Args:
        model: a hydra with an adapter for its backbone, on the CPU.
        tasks: by name.
    """
    model.__class__ = _converted(type(model))
    model.adapter, model.denoising_tasks = adapter_for(model.backbone), dict(tasks)
    # In a fork of the random state: a run with denoising goes on with the random numbers of a run without it.
    with torch.random.fork_rng(devices=[]):
        added = {name: TaskModules.of(task.modules(model.adapter)) for name, task in tasks.items()}
        model.denoising = nn.ModuleDict(added)


@cache
def _converted(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Denoising{cls.__name__}", (DenoisingHydra, cls), {})


@contextmanager
def with_plan(model: DenoisingHydra, plan: Plan, receive: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """While entered, the one call of the model gets a plan besides its batch.

    The host makes that call through its wrappers. It passes the batch alone.

    Args:
        model: within the host's wrappers.
        plan: of the step.
        receive: is called with all that the model returned, and may change it before the host gets it.
    """
    hooks = (
        model.register_forward_pre_hook(lambda _, args, kwargs: (args, {**kwargs, "plan": plan}), with_kwargs=True),
        model.register_forward_hook(lambda module, args, out: receive(out)),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def unwrapped(model: nn.Module) -> DenoisingHydra:
    """The model within the host's wrappers."""
    while not isinstance(model, DenoisingHydra):
        model = model.module
    return model
