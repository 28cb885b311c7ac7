"""Runs the passes of a plan on a model, whatever its host.

A pass runs the backbone over one view of the batch, and then the heads that it asks for. The backbone's adapter puts
in what the pass adds: a force encoding before the first block, and the modulation by a condition in every block. Passes
run in order; the embedding that one of them makes is handed to the later ones that are conditioned on it. Without a
plan the host's own forward runs.

What differs between hosts is asked of the model: see `DenoisingModel`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fairchem_scd.denoising.adapter import Adapter
from fairchem_scd.denoising.conditions import BoundModulation, SelfCondition
from fairchem_scd.denoising.conditions.self_condition import always_on
from fairchem_scd.denoising.config_keys import key_of
from fairchem_scd.denoising.hooks import outputs_of
from fairchem_scd.denoising.plan import EMBEDDING, NOISE, AtomSubset, Pass, Plan
from fairchem_scd.denoising.recompute import recomputed
from fairchem_scd.denoising.structures import Structures
from fairchem_scd.denoising.tasks.base import DenoisingTask, TaskModules
from fairchem_scd.errors import ConfigError


class DenoisingModel(Protocol):
    """What a model of some host must have, so that plans run on it: a backbone, the user's heads, what tasks added.

    Attributes:
        backbone: called with a view, it returns an embedding that heads and adapter understand.
        output_heads: the user's heads, by name.
        denoising: what each task added, by its name.
        denoising_tasks: the tasks, by name.
        adapter: of the backbone; None where there is no task.
        training: as of any module.
    """

    backbone: nn.Module
    output_heads: nn.ModuleDict
    denoising: Mapping[str, TaskModules]
    denoising_tasks: Mapping[str, DenoisingTask]
    adapter: Adapter | None
    training: bool

    def view_of(self, data: Any, run: Pass) -> Any:
        """The batch as a pass sees it: an object of its own, which the backbone may write into.

        It has `pos` [n, 3], `batch` [n] and `natoms` [b], and all else that the host's backbone and heads read.
        """

    def host_forward(self, view: Any) -> dict[str, Any]:
        """What the host's own forward returns: backbone, then the user's heads."""

    def vectors(self, head: nn.Module, view: Any, embedding: Any) -> Tensor:
        """[n, 3] that a head made by `adapter.vector_head` predicts from what the backbone returned."""


def run_plain(model: DenoisingModel, data: Any) -> dict[str, Any]:
    """The host's own forward.

    Bit for bit that of the plain model, unless a condition is always on. In training the parameters that tasks added
    have a gradient of zero.
    """
    modulation = _without_condition(model, data)
    with nullcontext() if modulation is None else model.adapter.in_pass(modulation, model.output_heads.values()):
        out = model.host_forward(data)
    return _tied(model, out, model.denoising.values())


def run_plan(model: DenoisingModel, data: Any, plan: Plan) -> dict[str, Any]:
    """Run the passes of a plan over a batch of N atoms.

    Returns:
        The outputs of the user's heads as the host returns them, and under `NOISE` the predicted noise [N, 3], zero for
        atoms that the noise pass does not have; under `EMBEDDING` the embeddings [B, C], if the plan returns them. In
        training every parameter has a gradient, zero where the plan did not use it.
    """
    modules = model.denoising[plan.task]
    # A host's backbone may write into the batch that it is given, and a trainer into its own before the backward.
    batch = model.view_of(data, Pass(data.pos))
    out: dict[str, Any] = {}
    embedding = None
    for run in plan.passes:
        call = partial(_run_pass, model, batch, run, modules, embedding)
        recompute = run.recompute and torch.is_grad_enabled()
        returned, made = recomputed(call, data.pos.device) if recompute else call()
        out.update(returned)
        embedding = made if run.embed else embedding
    if plan.returns_embedding and embedding is not None:
        out[EMBEDDING] = embedding
    unused: list[nn.Module] = [added for task, added in model.denoising.items() if task != plan.task]
    if not any(run.outputs for run in plan.passes):
        unused += [model.output_heads, *model.adapter.readout()]
    return _tied(model, out, unused)


def embed(model: DenoisingModel, data: Any, structures: Structures) -> Tensor:
    """The embedding that a task makes of each structure of a batch; zero where it has no atom to embed.

    Args:
        data: the batch.
        structures: the same batch, as tasks see it.

    Returns:
        [B, C] float32.

    Raises:
        ConfigError: no task of the model makes one, or the data has not what says which atoms to embed.
    """
    task = embedding_task(model)
    if task is None:
        raise ConfigError(f"the model has no condition head: it was not trained with {key_of('scd')}")
    run = task.embedding_pass(structures).to(data.pos.device)
    _, made = _run_pass(model, data, run, model.denoising[task.name], None)
    return made.masked_fill(~task.embedded_structures(structures).to(made.device)[:, None], 0)


def embedding_task(model: DenoisingModel) -> DenoisingTask | None:
    """The task that embeds structures; None: the model has none."""
    return next(
        (task for name, task in model.denoising_tasks.items() if model.denoising[name].condition is not None), None
    )


def atom_features(model: DenoisingModel, data: Any, adapter: Adapter) -> Tensor:
    """[N, C] final l = 0 features of the atoms of a batch, which the user's heads read and `embed` pools."""
    modulation = _without_condition(model, data)
    with adapter.in_pass(modulation, ()), adapter.skip_energy_readout(), outputs_of(model.backbone) as returned:
        model.backbone(data)
    return adapter.scalars(returned[-1])


def frozen_in_pretraining(model: DenoisingModel) -> list[nn.Parameter]:
    """The parameters that self-supervised pre-training must not move (SCD, arXiv 2603.17196).

    Element embeddings, which would shrink to nothing, so that fine-tuning would fail; the user's heads and what they
    alone read, which have no loss; what a condition says of itself.
    """
    modules = (*model.adapter.element_embeddings(), model.output_heads, *model.adapter.readout())
    frozen = [p for module in modules for p in module.parameters()]
    conditions = (added.condition for added in model.denoising.values())
    return frozen + [p for condition in conditions if condition is not None for p in condition.frozen_in_pretraining]


# --- one pass ---------------------------------------------------------------------------------------------------------


def _run_pass(
    model: DenoisingModel, data: Any, run: Pass, modules: TaskModules, embedding: Tensor | None
) -> tuple[dict[str, Any], Tensor | None]:
    """The outputs of one pass, and the embedding [B, C] that it makes, if it makes one.

    Whatever the pass needs is set up in here, since a pass with `recompute` runs again in backward.

    Args:
        embedding: [B, C] that the latest embedding pass made of the structures of the whole batch, if any.
    """
    view = model.view_of(data, run)
    heads = [*model.output_heads.values()] if run.outputs else []
    heads += [modules["noise_head"]] if run.noise else []
    if run.conditioned is None:
        modulation = _without_condition(model, view)
    else:
        given = _of_subset(embedding if run.given is None else run.given, run.subset)
        modulation = modules.condition.bind(given, _of_subset(run.conditioned, run.subset), view.batch)
    out: dict[str, Any] = {}
    with (
        model.adapter.in_pass(modulation, heads),
        _encoded(model.adapter, run, modules),
        nullcontext() if run.outputs else model.adapter.skip_energy_readout(),
        outputs_of(model.backbone) as returned,
    ):
        # All heads run before the next pass starts: some read state that the backbone keeps of its latest pass only.
        if run.outputs:
            out = model.host_forward(view)
        else:
            model.backbone(view)
        if run.noise:
            noise = model.vectors(modules["noise_head"], view, returned[-1])
            out[NOISE] = _whole(noise, run.subset and run.subset.atoms, len(run.pos))
    return out, _embedding(model, data, view, run, modules.condition, returned[-1]) if run.embed else None


def _embedding(
    model: DenoisingModel, data: Any, view: Any, run: Pass, condition: SelfCondition, features: Any
) -> Tensor:
    """[B, C] of the structures of the whole batch; zero for those that the pass does not have."""
    scalars = model.adapter.scalars(features)
    if run.detach_embedding:
        scalars = scalars.detach()
    made = condition.embed(scalars, view.batch, len(view.natoms))
    return _whole(made, run.subset and run.subset.structures, len(data.natoms))


def _without_condition(model: DenoisingModel, view: Any) -> BoundModulation | None:
    """The modulation of a pass without a condition; None: the plain backbone."""
    standing = always_on(added.condition for added in model.denoising.values())
    return None if standing is None else standing.bind_nothing(view.batch, len(view.natoms))


def _encoded(adapter: Adapter, run: Pass, modules: TaskModules) -> AbstractContextManager[None]:
    if run.encoding is None:
        return nullcontext()
    return adapter.encoded(_rows_of(modules["encoding"](*run.encoding), run.subset and run.subset.atoms))


def _of_subset(value: Tensor, subset: AtomSubset | None) -> Tensor:
    """[b, …] of the structures in a subset, of [B, …]."""
    return _rows_of(value, subset and subset.structures)


def _rows_of(value: Tensor, rows: Tensor | None) -> Tensor:
    return value if rows is None else value[rows]


def _whole(value: Tensor, rows: Tensor | None, size: int) -> Tensor:
    """[size, …] with `value` in some rows and zero in the others; None: it has all rows already."""
    return value if rows is None else value.new_zeros(size, *value.shape[1:]).index_copy(0, rows, value)


# --- gradients for all ------------------------------------------------------------------------------------------------


def _tied(model: DenoisingModel, out: dict[str, Any], unused: Iterable[nn.Module]) -> dict[str, Any]:
    """In training, give the parameters of unused modules a gradient of zero: DDP waits for every parameter's."""
    parameters = [p for module in unused for p in module.parameters() if p.requires_grad]
    if not parameters or not torch.is_grad_enabled() or not model.training:
        return out
    return _with_zero_gradients(out, parameters)


def _with_zero_gradients(out: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    # To every output, since not all need be in the loss.
    return {
        key: _with_zero_gradients(value, parameters)
        if isinstance(value, dict)
        else _ZeroGradient.apply(value, *parameters)
        for key, value in out.items()
    }


class _ZeroGradient(torch.autograd.Function):
    """Returns its first argument as it is, and gives the others a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *unused: Tensor) -> Tensor:
        ctx.unused = unused
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return (grad, *(torch.zeros_like(p) for p in ctx.unused))
