"""Claims that without a condition the model is the host's, and that a pass leaves nothing behind."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from fairchem_scd.denoising.plan import NOISE, Plan
from fairchem_scd.testing.backbone_claims.models import BackboneModels
from fairchem_scd.testing.support import BOTH, SCD, gradients, plan_of, run, stirred, with_conditioned


class NoTraceClaims(BackboneModels):
    def test_construction_leaves_the_hosts_weights_and_names(self) -> None:
        state = self.ours(BOTH).state_dict()
        plain = self.plain().state_dict()
        assert [key for key in state if not key.startswith("denoising.")] == list(plain)
        assert all(torch.equal(state[key], value) for key, value in plain.items())

    @pytest.mark.parametrize("training", [True, False])
    def test_without_a_plan_it_is_the_host_bit_for_bit(self, training: bool) -> None:
        plain, model, batch = self.plain().train(training), stirred(self.ours(BOTH)).train(training), self.batch()
        if training or not model.adapter.conservative:
            expected, expected_gradients = gradients(plain, batch)
            out, found = gradients(model, batch)
        else:  # in eval mode the host keeps no graph of gradient forces
            expected, expected_gradients = run(plain, batch), {}
            out, found = run(model, batch), {}
        assert set(out) == set(expected)
        for key, value in expected.items():
            assert torch.equal(out[key], value), key
        for key, value in expected_gradients.items():
            assert (value is None and found[key] is None) or torch.equal(found[key], value), key

    @pytest.mark.parametrize("trained", [False, True])
    def test_a_condition_that_is_not_told_leaves_no_trace(self, trained: bool) -> None:
        """Of a pass in which every structure's condition is dropped."""
        plain, model, batch = self.plain(), self.ours(SCD), self.batch()
        if trained:
            stirred(model)
        plan, _ = plan_of(batch, SCD)
        first, last = plan.passes
        alone = run(model, batch, Plan("scd", (replace(first, embed=False), replace(last, conditioned=None))))
        dropped = run(model, batch, with_conditioned(plan, False))
        assert torch.equal(dropped[NOISE], alone[NOISE])
        # That pass computes the host's outputs, on the corrupted structure.
        silent = replace(last, outputs=True, conditioned=torch.zeros_like(last.conditioned))
        out = run(model, batch, Plan("scd", (first, silent)))
        corrupted = copy.deepcopy(batch)
        corrupted.pos = last.pos
        for key, value in run(plain, corrupted).items():
            # Backward adds the parts of a derivative by positions in another order, where features could be modulated.
            slack = 1e-5 * float(value.abs().max()) if model.adapter.conservative and key == "forces" else 0.0
            torch.testing.assert_close(out[key], value, rtol=0, atol=slack, msg=key)
        # The clean pass computes the host's outputs, whichever pass follows.
        for key, value in run(plain, batch).items():
            assert torch.equal(run(model, batch, plan)[key], value), key

    def test_a_condition_changes_nothing_at_initialisation_and_later_it_does(self) -> None:
        model, batch = self.ours(SCD), self.batch()
        plan, _ = plan_of(batch, SCD)
        assert torch.equal(run(model, batch, plan)[NOISE], run(model, batch, with_conditioned(plan, False))[NOISE])
        stirred(model)
        conditioned, without = run(model, batch, plan)[NOISE], run(model, batch, with_conditioned(plan, False))[NOISE]
        assert (conditioned - without).abs().max() > 1e-3 * without.abs().max()

    def test_a_pass_takes_all_it_brought_with_it(self) -> None:
        """Hooks, attributes and switches are as before: after a pass, and after one that ended in an error."""
        for block in (SCD, *[{"dens": {"prob": 1.0}}] * self.conditions_on_forces()):
            model, batch = self.ours(block), self.batch(1)
            plan, _ = plan_of(batch, block)
            run(model, batch)  # hosts store things in the backbone, too
            modules, attributes = [name for name, _ in model.named_modules()], set(vars(model.backbone))
            switches = {k: v for k, v in vars(model.backbone).items() if isinstance(v, bool)}
            broken = copy.deepcopy(batch)
            broken.atomic_numbers = broken.atomic_numbers + 1000
            with pytest.raises((AssertionError, IndexError, RuntimeError)):
                model(broken, plan)
            run(model, batch, plan)[NOISE].sum().backward()
            assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
            assert [name for name, _ in model.named_modules()] == modules
            assert set(vars(model.backbone)) == attributes
            assert {k: v for k, v in vars(model.backbone).items() if isinstance(v, bool)} == switches
