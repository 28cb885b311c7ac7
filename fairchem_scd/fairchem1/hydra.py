"""The model: the host's hydra, with what the denoising tasks add beside its backbone and heads."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from fairchem.core.common.registry import registry
from fairchem.core.models.base import GraphModelMixin, HydraModel
from torch import Tensor, nn
from torch_geometric.data import Batch

from fairchem_scd.denoising.conditions import BoundModulation, ConditionHead, Modulation
from fairchem_scd.denoising.edge_vector import EdgeVectorHead
from fairchem_scd.denoising.plan import NOISE, AtomSubset, Pass, Plan
from fairchem_scd.denoising.structures import structures_of
from fairchem_scd.denoising.tasks import build_tasks
from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1.backbones import Adapter, adapter_for


@registry.register_model("denoising_hydra")
class DenoisingHydra(HydraModel):
    """A HydraModel that can run the passes of denoising tasks.

    Called without a plan it computes exactly what HydraModel computes; `backbone.*` and `output_heads.*` keep the
    host's keys, and all that is added lies under `denoising.<task>.*`.

    Args:
        denoising: the `task.denoising` block; which modules are added follows from it.
        legacy_weight_decay: choose the parameters without weight decay as the backbone's one-piece model did.
        self_supervised: the run trains no outputs. Checkpoints of before this argument was here do without it.
        host: arguments of HydraModel.

    Raises:
        ConfigError: the block is not valid, or the backbone has no adapter.
    """

    def __init__(
        self,
        denoising: Mapping[str, Any] | None = None,
        legacy_weight_decay: bool = False,
        self_supervised: bool = False,
        **host: Any,
    ) -> None:
        super().__init__(**host)
        self.legacy_weight_decay = legacy_weight_decay
        self.self_supervised = self_supervised
        tasks, _ = build_tasks(denoising, supervised=not self_supervised)
        self._tasks = tasks
        self.adapter: Adapter | None = adapter_for(self.backbone) if tasks else None
        if self.adapter is not None:
            # Also of a backbone that came with a checkpoint to fine-tune from.
            keys = ("regress_forces", "direct_forces", "otf_graph", "use_pbc", "lmax_list", "quad_interaction")
            self.adapter.check({key: getattr(self.backbone, key) for key in keys if hasattr(self.backbone, key)})
        if getattr(self.backbone, "use_pbc_single", False) and any(
            getattr(task.settings, "parts", None) for task in tasks.values()
        ):
            raise ConfigError(
                "model.backbone.use_pbc_single: with it the host cannot make the graphs of parts, which embed_tags and "
                "denoise_tags ask for; set it to false"
            )
        if any(getattr(task.settings, "null_condition", None) == "mask_token" for task in tasks.values()):
            if self.adapter.conservative and self.output_heads:
                raise ConfigError(
                    "null_condition: mask_token: the token stands in every pass, and the gradient of the energy, which "
                    "the forces are here, leaves out what it does to the blocks; use null_condition: identity"
                )
            logging.warning(
                "null_condition: mask_token: the token stands in every pass, so plain models and trainers of the host "
                "that start from this one leave something out"
            )
        # In a fork of the random state, so that everything after is as random as it was without us.
        with torch.random.fork_rng(devices=[]):
            self.denoising = nn.ModuleDict({name: task.modules(self.adapter) for name, task in tasks.items()})

    def forward(self, data: Any, plan: Plan | None = None) -> dict[str, Any]:
        """Run the host's forward, or the passes of a plan.

        Args:
            data: a collated batch of N atoms.
            plan: passes of one task; None: the plain model.

        Returns:
            The heads' outputs as the host returns them, and the predicted noise [N, 3] under `NOISE` if a pass has
            the noise head. In training every parameter has a gradient, whatever the plan left out.
        """
        if plan is None:
            modulation = self._given(data, None, None)
            with nullcontext() if modulation is None else self.adapter.in_pass(modulation, self.output_heads.values()):
                out = super().forward(data)
            return self._tied(out, [self.denoising])
        out: dict[str, Any] = {}
        embedding = None
        for run in plan.passes:
            returned, latest = self._run(data, run, self.denoising[plan.task], embedding)
            out.update(returned)
            embedding = embedding if latest is None else latest
        unused: list[nn.Module] = [module for name, module in self.denoising.items() if name != plan.task]
        if not any(run.outputs for run in plan.passes):
            unused += [self.output_heads, *self.adapter.readout()]
        return self._tied(out, unused)

    def embed(self, data: Any) -> Tensor:
        """[B, C] the embedding c that SCD makes of each structure of a batch; zero where it has no part to embed.

        Raises:
            ConfigError: the model has no condition head, or the data no tags where a part is embedded.
        """
        name = next((name for name, modules in self.denoising.items() if "condition_head" in modules), None)
        if name is None:
            raise ConfigError("the model has no condition head: it was not trained with task.denoising.scd")
        structures = structures_of(data)
        run = self._tasks[name].embedding(structures).to(data.pos.device)
        made = self._run(data, run, self.denoising[name], None)[1]
        # A pass over nothing is one over everything.
        return made if self._tasks[name].embedded(structures).any() else torch.zeros_like(made)

    def features(self, data: Any) -> Tensor:
        """[N, C] final l = 0 features of the atoms of a batch, which `embed` makes its embedding of."""
        adapter = self.adapter or adapter_for(self.backbone)
        modulation = self._given(data, None, None)
        with adapter.in_pass(modulation, ()), adapter.skip_energy_readout(), _returned_by(self.backbone) as embeddings:
            self.backbone(data)
        return adapter.scalars(embeddings[-1])

    def _run(
        self, data: Any, run: Pass, modules: nn.ModuleDict, embedding: Tensor | None
    ) -> tuple[dict[str, Any], Tensor | None]:
        """The outputs of one pass, and the embedding [B, C] it made of the structures, if any."""
        view = view_of(data, run)
        heads = [*self.output_heads.values()] if run.outputs else []
        heads += [modules["noise_head"]] if run.noise else []
        modulation = self._given(view, _of_part(run.conditioned, run.subset), _of_part(embedding, run.subset), modules)
        out: dict[str, Any] = {}
        with (
            self.adapter.in_pass(modulation, heads),
            self._encoded(run, modules),
            nullcontext() if run.outputs else self.adapter.skip_energy_readout(),
            _returned_by(self.backbone) as embeddings,
        ):
            # Heads before any other pass starts: the host's read state that the backbone keeps of its latest pass.
            if run.outputs:
                out = super().forward(view)
            else:
                self.backbone(view)
            if run.noise:
                head = modules["noise_head"]
                with torch.autocast(view.pos.device.type, enabled=head.use_amp):
                    (noise,) = head(view, embeddings[-1]).values()
                out[NOISE] = _whole(noise, run.subset and run.subset.atoms, len(data.pos))
        if not run.embed:
            return out, None
        scalars = self.adapter.scalars(embeddings[-1])
        if run.detach_embedding:
            scalars = scalars.detach()
        made = modules["condition_head"](scalars, view.batch, len(view.natoms))
        return out, _whole(made, run.subset and run.subset.structures, len(data.natoms))

    def _given(
        self, view: Any, conditioned: Tensor | None, embedding: Tensor | None, modules: nn.ModuleDict | None = None
    ) -> BoundModulation | None:
        """The modulation of a pass over b structures, told [b] an embedding [b, C]; None: no condition at all."""
        if conditioned is None:
            if self._masked is None:
                return None
            # The authors' model has a mask token wherever there is no condition.
            modules = self.denoising[self._masked]
            conditioned = torch.zeros(len(view.natoms), dtype=torch.bool, device=view.pos.device)
            embedding = modules["condition_head"].mask_token.expand(len(conditioned), -1)
        condition = modules["condition_head"].condition(embedding, conditioned)
        return modules["modulation"].bind(condition[view.batch], conditioned[view.batch])

    def _encoded(self, run: Pass, modules: nn.ModuleDict) -> AbstractContextManager[None]:
        if run.encoding is None:
            return nullcontext()
        encoding = modules["encoding"](*run.encoding)
        return self.adapter.encoded(encoding if run.subset is None else encoding[run.subset.atoms])

    @property
    def _masked(self) -> str | None:
        """The task whose mask token stands for a missing condition."""
        for name, modules in self.denoising.items():
            if "condition_head" in modules and modules["condition_head"].mask_token is not None:
                return name
        return None

    def _tied(self, out: dict[str, Any], unused: Iterable[nn.Module]) -> dict[str, Any]:
        """Give the parameters of unused modules a gradient of zero, which DDP waits for."""
        parameters = [p for module in unused for p in module.parameters() if p.requires_grad]
        if not parameters or not torch.is_grad_enabled() or not self.training:
            return out
        return _with_zero_gradients(out, parameters)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay: see `undecayed`."""
        return no_weight_decay_names(self, legacy=self.legacy_weight_decay, self_supervised=self.self_supervised)


@contextmanager
def with_plan(model: nn.Module, plan: Plan) -> Iterator[dict[str, Any]]:
    """Hand a plan to the one call of the model made inside, and collect all that it returns.

    The host's `_forward` calls the model with the batch alone, and keeps only the outputs it knows.
    """
    returned: dict[str, Any] = {}
    hooks = (
        model.register_forward_pre_hook(lambda _, args, kwargs: (args, {**kwargs, "plan": plan}), with_kwargs=True),
        model.register_forward_hook(lambda module, args, out: returned.update(out)),
    )
    try:
        yield returned
    finally:
        for hook in hooks:
            hook.remove()


def freeze(model: DenoisingHydra) -> None:
    """Freeze what pre-training must not move (SCD, arXiv 2603.17196): element embeddings, mask token, the user's heads.

    Element embeddings would shrink to nothing, and fine-tuning from there blows up; heads have no loss.
    """
    frozen = [p for module in model.adapter.element_embeddings() for p in module.parameters()]
    frozen += [p for module in (model.output_heads, *model.adapter.readout()) for p in module.parameters()]
    frozen += [p for name, p in model.named_parameters() if name.endswith("condition_head.mask_token")]
    for parameter in frozen:
        parameter.requires_grad_(False)


def no_weight_decay_names(model: HydraModel, *, legacy: bool, self_supervised: bool) -> set[str]:
    """Names of the parameters that a run did not decay.

    Args:
        model: a hydra, plain or denoising.
        legacy: by the rule of the backbone's one-piece model.
        self_supervised: by both rules and so as SCD's paper says: no biases, norms or embeddings.
    """
    names: set[str] = set()
    if legacy or self_supervised:
        # The rule looks at module types and works on any module tree.
        names |= set(getattr(type(model.backbone), "no_weight_decay", GraphModelMixin.no_weight_decay)(model))
    if not legacy:
        names |= set(HydraModel.no_weight_decay(model))
    for prefix, module in model.named_modules():
        if isinstance(module, (ConditionHead, Modulation, EdgeVectorHead)):
            vectors = (name for name, p in module.named_parameters() if p.dim() < 2)
            names |= {f"{prefix}.{name}" for name in vectors}
    return names


def _with_zero_gradients(out: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    # To every output, since not all need be in the loss.
    return {
        key: _with_zero_gradients(value, parameters)
        if isinstance(value, dict)
        else _ZeroGradient.apply(value, *parameters)
        for key, value in out.items()
    }


def view_of(data: Any, run: Pass) -> Any:
    """The batch as a pass sees it."""
    if run.subset is None:
        view = copy.copy(data)
        view.pos = run.pos.detach()  # conservative models make it require a gradient
        return view
    subset = run.subset
    view = Batch(batch=subset.batch, natoms=subset.natoms.to(data.natoms), pos=run.pos[subset.atoms])
    view.atomic_numbers = data.atomic_numbers[subset.atoms]
    view.cell = data.cell[subset.structures]
    if "tags" in data:  # GemNet-OC's quadruplets go by them
        view.tags = data.tags[subset.atoms]
    if "pbc" in data:
        view.pbc = data.pbc.view(-1, 3)[subset.structures]
    return view


def _of_part(value: Tensor | None, subset: AtomSubset | None) -> Tensor | None:
    """[b, …] of the structures in a part, of [B, …]."""
    return value if value is None or subset is None else value[subset.structures]


def _whole(value: Tensor, rows: Tensor | None, size: int) -> Tensor:
    """[size, …] with `value` in some rows and zero in the others; None: it is whole already."""
    return value if rows is None else value.new_zeros(size, *value.shape[1:]).index_copy(0, rows, value)


class _ZeroGradient(torch.autograd.Function):
    """The identity on its first argument, which leaves the others with a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *unused: Tensor) -> Tensor:
        ctx.unused = unused
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return (grad, *(torch.zeros_like(p) for p in ctx.unused))


class _returned_by:
    """While entered, collect what a module's forward returns."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> list[Any]:
        returned: list[Any] = []
        self.handle = self.module.register_forward_hook(lambda module, args, out: returned.append(out))
        return returned

    def __exit__(self, *_: object) -> None:
        self.handle.remove()
