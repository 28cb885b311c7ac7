"""The model: the host's hydra, with what the denoising tasks add beside its backbone and heads."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from fairchem.core.common.registry import registry
from fairchem.core.models.base import HydraModel
from torch import Tensor, nn

from fairchem_scd.backbones import Adapter, adapter_for
from fairchem_scd.tasks import NOISE, Pass, Plan, build_tasks


@registry.register_model("denoising_hydra")
class DenoisingHydra(HydraModel):
    """A HydraModel that can run the passes of denoising tasks.

    Called without a plan it computes exactly what HydraModel computes; `backbone.*` and `output_heads.*` keep the
    host's keys, and all that is added lies under `denoising.<task>.*`.

    Args:
        denoising: the `task.denoising` block; which modules are added follows from it.
        legacy_weight_decay: choose the parameters without weight decay as the backbone's one-piece model did.
        host: arguments of HydraModel.

    Raises:
        ConfigError: the block is not valid, or the backbone has no adapter.
    """

    def __init__(
        self, denoising: Mapping[str, Any] | None = None, legacy_weight_decay: bool = False, **host: Any
    ) -> None:
        super().__init__(**host)
        self.legacy_weight_decay = legacy_weight_decay
        tasks, _ = build_tasks(denoising)
        self._adapter: Adapter | None = adapter_for(self.backbone) if tasks else None
        if self._adapter is not None:
            # Also of a backbone that came with a checkpoint to fine-tune from.
            keys = ("regress_forces", "otf_graph", "lmax_list")
            self._adapter.check({key: getattr(self.backbone, key) for key in keys if hasattr(self.backbone, key)})
        # In a fork of the random state, so that everything after is as random as it was without us.
        with torch.random.fork_rng(devices=[]):
            self.denoising = nn.ModuleDict(
                {name: task.modules(self._adapter.encoding_spec, self._vector_head) for name, task in tasks.items()}
            )

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
            return self._tied(super().forward(data), self.denoising.parameters())
        out: dict[str, Any] = {}
        for run in plan.passes:
            out.update(self._run(data, run, self.denoising[plan.task]))
        return self._tied(out, (p for name, m in self.denoising.items() if name != plan.task for p in m.parameters()))

    def _run(self, data: Any, run: Pass, modules: nn.ModuleDict) -> dict[str, Any]:
        view = copy.copy(data)
        view.pos = run.pos
        encoded = nullcontext()
        if run.encoding is not None:
            encoded = self._adapter.encoded(modules["encoding"](*run.encoding))
        out: dict[str, Any] = {}
        with encoded, _returned_by(self.backbone) as embeddings:
            if run.outputs:
                out = super().forward(view)
            else:
                self.backbone(view)
        if run.noise:
            # Before any other pass starts: host heads read state that the backbone keeps of its latest pass.
            head = modules["noise_head"]
            with torch.autocast(view.pos.device.type, enabled=head.use_amp):
                (out[NOISE],) = head(view, embeddings[-1]).values()
        return out

    def _vector_head(self) -> nn.Module:
        return self._adapter.vector_head()

    def _tied(self, out: dict[str, Any], unused: Iterable[nn.Parameter]) -> dict[str, Any]:
        """Give unused parameters a gradient of zero, which DDP waits for."""
        unused = [p for p in unused if p.requires_grad]
        if not unused or not torch.is_grad_enabled() or not self.training:
            return out
        # To every output, since not all need be in the loss.
        for key, value in out.items():
            out[key] = self._tied(value, unused) if isinstance(value, dict) else _ZeroGradient.apply(value, *unused)
        return out

    @torch.jit.ignore
    def no_weight_decay(self) -> Iterable[str]:
        """Names of the parameters without weight decay."""
        if self.legacy_weight_decay:
            # The rule looks at module types and works on any module tree.
            return type(self.backbone).no_weight_decay(self)
        return super().no_weight_decay()


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
