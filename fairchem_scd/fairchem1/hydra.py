"""The model: the host's hydra, with what the denoising tasks add beside its backbone and heads."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from fairchem.core.common.registry import registry
from fairchem.core.models.base import GraphModelMixin, HydraModel
from torch import Tensor, nn
from torch_geometric.data import Batch

from fairchem_scd.denoising import passes
from fairchem_scd.denoising.conditions import ConditionHead, ForceEncoding, Modulation
from fairchem_scd.denoising.edge_vector import EdgeVectorHead
from fairchem_scd.denoising.plan import Pass, Plan
from fairchem_scd.denoising.structures import Structures, structures_of
from fairchem_scd.denoising.tasks import DenoisingTask, TaskModules, build_tasks
from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1.backbones import Adapter, adapter_for

# Arguments of a backbone that it keeps as attributes, and that may rule denoising out.
_CHECKED = ("regress_forces", "direct_forces", "otf_graph", "use_pbc", "lmax_list", "quad_interaction")


@registry.register_model("denoising_hydra")
class DenoisingHydra(HydraModel):
    """A HydraModel that can run the passes of denoising tasks.

    Called without a plan it computes exactly what HydraModel computes; `backbone.*` and `output_heads.*` keep the
    host's keys, and all that is added lies under `denoising.<task>.*`. This class says what a view of the host's batch
    is and how the host's heads are called; denoising/passes.py does the rest.

    Args:
        denoising: the `task.denoising` block; which modules are added follows from it.
        legacy_weight_decay: choose the parameters without weight decay as the legacy model of the backbone did.
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
        self.denoising_tasks, _ = build_tasks(denoising, supervised=not self_supervised)
        self.adapter: Adapter | None = adapter_for(self.backbone) if self.denoising_tasks else None
        if self.adapter is not None:
            # Checked here, not in the config alone: the backbone may come from a checkpoint to fine-tune from.
            self.adapter.check({key: getattr(self.backbone, key) for key in _CHECKED if hasattr(self.backbone, key)})
            self.adapter.drop_legacy_outputs()
        for task in self.denoising_tasks.values():
            self._check_subsets(task)
            task.check_backbone(self.adapter, heads=bool(self.output_heads))
        # In a fork of the random state: a run with denoising goes on with the random numbers of a run without it.
        with torch.random.fork_rng(devices=[]):
            added = {name: TaskModules.of(task.modules(self.adapter)) for name, task in self.denoising_tasks.items()}
            self.denoising = nn.ModuleDict(added)

    def _check_subsets(self, task: DenoisingTask) -> None:
        if task.subset_settings and getattr(self.backbone, "use_pbc_single", False):
            raise ConfigError(
                "model.backbone.use_pbc_single: with it the host cannot make graphs of some of a structure's atoms, "
                f"which {' and '.join(task.subset_settings)} of task.denoising.{task.name} ask for; set it to false"
            )

    def forward(self, data: Any, plan: Plan | None = None) -> dict[str, Any]:
        """Run the host's forward, or the passes of a plan.

        Args:
            data: a collated batch of N atoms.
            plan: passes of one task; None: the plain model.

        Returns:
            The heads' outputs as the host returns them, and the predicted noise [N, 3] under `NOISE` if a pass has
            the noise head. In training every parameter has a gradient, zero where the plan did not use it.
        """
        return passes.run_plain(self, data) if plan is None else passes.run_plan(self, data, plan)

    def embed(self, data: Any) -> Tensor:
        """[B, C] the embedding c that SCD makes of each structure of a batch; zero where it has no atom to embed.

        Raises:
            ConfigError: the model has no condition head, or the data no tags where those choose the atoms to embed.
        """
        return passes.embed(self, data, self.structures_of(data))

    def structures_of(self, data: Any) -> Structures:
        """A batch as tasks see it, with the directions in which this model repeats its structures."""
        return structures_of(data, repeated_directions(self.backbone, data))

    def features(self, data: Any) -> Tensor:
        """[N, C] final l = 0 features of the atoms of a batch, which `embed` makes its embedding of."""
        return passes.atom_features(self, data, self.adapter or adapter_for(self.backbone))

    # --- what the engine asks of a host: see passes.DenoisingModel ------------------------------------------------

    def view_of(self, data: Any, run: Pass) -> Any:
        return view_of(data, run)

    def host_forward(self, view: Any) -> dict[str, Any]:
        return super().forward(view)

    def vectors(self, head: nn.Module, view: Any, embedding: Any) -> Tensor:
        # Under autocast as the host calls its heads.
        with torch.autocast(view.pos.device.type, enabled=head.use_amp):
            (vectors,) = head(view, embedding).values()
        return vectors

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay: see `no_weight_decay_names`."""
        return no_weight_decay_names(self, legacy=self.legacy_weight_decay, self_supervised=self.self_supervised)


@contextmanager
def with_plan(model: nn.Module, plan: Plan) -> Iterator[dict[str, Any]]:
    """While entered, the one call of the model gets a plan besides its batch; yields a dict of all that it returned.

    The host's `_forward` makes that call. It passes the batch alone, and of the outputs keeps only those it knows.
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
    """Freeze what pre-training must not move: see `passes.frozen_in_pretraining`."""
    for parameter in passes.frozen_in_pretraining(model):
        parameter.requires_grad_(False)


def no_weight_decay_names(model: HydraModel, *, legacy: bool, self_supervised: bool, former: bool = False) -> set[str]:
    """Names of the parameters without weight decay.

    Args:
        model: a hydra, plain or denoising.
        legacy: choose them by the rule of the backbone's legacy model.
        self_supervised: choose them by that rule and by the hydra's. Together they are what SCD's paper says: biases,
            norms and embeddings.
        former: choose them as this package once did, when every force encoding had weight decay. Optimiser states in
            checkpoints of that time are in that order.
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
        elif isinstance(module, ForceEncoding) and not (module.weight_decay or former):
            names |= {f"{prefix}.{name}" for name, _ in module.named_parameters()}
    return names


def view_of(data: Any, run: Pass) -> Any:
    """The batch as a pass sees it."""
    if run.subset is None:
        view = copy.copy(data)
        view.pos = run.pos.detach()  # a tensor of its own: conservative models make it require a gradient
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


def repeated_directions(backbone: Any, data: Any) -> Tensor | None:
    """The directions in which a backbone of the host repeats the structures of a batch, whatever the data says.

    Args:
        backbone: its `use_pbc` and `use_pbc_single` say how it makes graphs.
        data: a collated batch of B structures.

    Returns:
        [B, 3] bool on the CPU; None: it repeats none. As in the host's `radius_graph_pbc`: all directions where the
        batch has no `pbc`, and otherwise those of its first structure, unless graphs are made one at a time.
    """
    if not getattr(backbone, "use_pbc", False):
        return None
    size = len(data.natoms)
    if "pbc" not in data:
        return torch.ones(size, 3, dtype=torch.bool)
    pbc = data.pbc.view(-1, 3).bool().cpu()
    return pbc if getattr(backbone, "use_pbc_single", False) else pbc[:1].expand(size, 3)
