"""Claims about gradients: every parameter has one in every step, and it is the right one."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fairchem_scd.denoising.conditions import ConditionHead
from fairchem_scd.denoising.plan import NOISE, Plan
from fairchem_scd.fairchem1.hydra import DenoisingHydra
from fairchem_scd.testing.backbone_claims.models import BackboneModels
from fairchem_scd.testing.support import BOTH, SCD, gradients, plan_of, run, stirred


class GradientClaims(BackboneModels):
    @pytest.mark.parametrize("supervised", [True, False])
    def test_everything_that_trains_has_a_gradient_and_not_zero_where_used(self, supervised: bool) -> None:
        block = {**BOTH, "dens": {"prob": 0}} if supervised and self.conditions_on_forces() else BOTH
        model, batch = stirred(self.ours(block)), self.batch()
        # Some of the host's parameters have no influence by construction, such as the l = 0 bias of a vector head.
        _, plain = gradients(self.plain(), batch)
        idle = {name for name, gradient in plain.items() if gradient is None or not gradient.any()}
        silent = self._without_influence_on_vectors(model, batch)
        readout = {id(p) for module in model.adapter.readout() for p in module.parameters()}
        for task in block:
            plans = (plan_of(batch, block, supervised, task=task, step=step)[0] for step in range(1, 100))
            plan = next(p for p in plans if task != "scd" or len(set(p.passes[-1].conditioned.tolist())) == 2)
            _, found = gradients(model, batch, plan)
            unused = idle if supervised or task == "scd" else silent
            for name, p in model.named_parameters():
                if not p.requires_grad:
                    continue
                assert found[name] is not None, name
                of_heads = name.startswith("output_heads.") or id(p) in readout
                of_others = name.startswith("denoising.") and not name.startswith(f"denoising.{task}.")
                if of_others or (of_heads and not supervised):
                    assert not found[name].any(), name
                elif name not in unused and name.removeprefix(f"denoising.{task}.") not in silent:
                    assert found[name].any(), name

    @staticmethod
    def _without_influence_on_vectors(model: DenoisingHydra, batch: Any) -> set[str]:
        """Names of parameters of the backbone, and of `noise_head`, that the latter's prediction does not depend on."""
        head, data = model.adapter.vector_head(), copy.deepcopy(batch)
        model.zero_grad()
        with model.adapter.in_pass(None, [head]), model.adapter.skip_energy_readout():
            (vectors,) = head(data, model.backbone(data)).values()
        vectors.square().sum().backward()
        modules = {"backbone": model.backbone, "noise_head": head}
        parameters = {f"{prefix}.{name}": p for prefix, each in modules.items() for name, p in each.named_parameters()}
        return {name for name, p in parameters.items() if p.grad is None or not p.grad.any()}

    def test_a_denoising_pass_adds_its_gradient_to_the_hosts_own(self) -> None:
        """First derivatives, and second ones where the host's forces are derivatives themselves."""
        plain, model, batch = self.plain(), stirred(self.ours(SCD)), self.batch()
        plan, _ = plan_of(batch, SCD)
        _, expected = gradients(plain, batch)
        _, noise = gradients(model, batch, Plan("scd", tuple(replace(p, outputs=False) for p in plan.passes)))
        noise = {name: copy.deepcopy(gradient) for name, gradient in noise.items()}
        out, found = gradients(model, batch, plan)
        assert out[NOISE].any()
        for name, value in expected.items():
            if value is None:
                continue
            total = value + noise[name]
            torch.testing.assert_close(found[name], total, rtol=1e-4, atol=1e-5 * float(total.abs().max()) + 1e-12)

    @pytest.mark.parametrize("supervised", [True, False])
    def test_recomputing_the_clean_pass_changes_no_bit(self, supervised: bool) -> None:
        """Outputs, gradients and the random state after the step, on consecutive steps of a model in training mode."""
        model, batch = stirred(self.ours(SCD)), self.batch()
        for step in range(1, 4):
            results = []
            for settings in ({}, {"recompute_clean_pass": True}):
                plan, _ = plan_of(batch, {"scd": settings}, supervised, step=step)
                found = gradients(model, batch, plan)
                results.append([copy.deepcopy(found[1]), {k: v.detach() for k, v in found[0].items()}, torch.rand(4)])
            assert [p.recompute for p in plan.passes] == [True, False]
            (kept, outputs, after), (again, outputs_again, after_again) = results
            assert all(torch.equal(outputs_again[key], value) for key, value in outputs.items())
            assert torch.equal(after, after_again)
            assert any(value is not None and value.any() for value in kept.values())
            for name, value in kept.items():
                assert torch.equal(again[name], value) if value is not None else again[name] is None, name

    def test_the_gradient_goes_through_the_embedding_and_can_be_cut(self) -> None:
        """Against the chain rule by hand: the gradient with a fixed embedding c, plus that through c."""
        model, batch = stirred(self.ours(SCD)).eval(), self.batch(2)
        weights = {n: p for n, p in model.backbone.named_parameters() if p.requires_grad}
        probe = torch.randn(len(batch.pos), 3, generator=torch.Generator().manual_seed(0))

        def slopes(value: Tensor, **arguments: Any) -> list[Tensor]:
            found = torch.autograd.grad(value, weights.values(), allow_unused=True, retain_graph=True, **arguments)
            return [torch.zeros_like(p) if g is None else g for g, p in zip(found, weights.values(), strict=True)]

        through, cut = (
            slopes((run(model, batch, plan_of(batch, {"scd": settings}, False)[0])[NOISE] * probe).sum())
            for settings in ({"std_reg": 0}, {"std_reg": 0, "stop_gradient_condition": True})
        )
        torch.manual_seed(7)
        embedding = model.embed(copy.deepcopy(batch))
        fixed = embedding.detach().requires_grad_()
        with mock.patch.object(ConditionHead, "forward", return_value=fixed):
            value = (run(model, batch, plan_of(batch, {"scd": {"std_reg": 0}}, False)[0])[NOISE] * probe).sum()
        (by_embedding,) = torch.autograd.grad(value, fixed)
        assert by_embedding.any()
        through_embedding = slopes(embedding, grad_outputs=by_embedding)
        for name, total, direct, rest in zip(weights, through, cut, through_embedding, strict=True):
            slack = 1e-4 * float(total.abs().max()) + 1e-10
            torch.testing.assert_close(total, direct + rest, rtol=1e-3, atol=slack, msg=lambda m, n=name: f"{n}: {m}")
