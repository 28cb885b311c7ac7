"""Claims that predictions rotate with the structure, that embeddings do not, and that structures are independent."""

from __future__ import annotations

import copy
from dataclasses import replace
from unittest import mock

import pytest
import torch

from fairchem_scd.denoising.conditions import ConditionHead
from fairchem_scd.denoising.plan import NOISE, Plan
from fairchem_scd.errors import ConfigError
from fairchem_scd.testing.backbone_claims.models import BackboneModels, relative_error
from fairchem_scd.testing.support import SCD, collate, crystal, plan_of, rotation, run, stirred


class SymmetryClaims(BackboneModels):
    def test_the_noise_turns_with_the_structure_under_any_condition(self) -> None:
        model, batch, turn = stirred(self.ours(SCD)).eval(), self.batch(2), rotation()
        plan, _ = plan_of(batch, SCD)
        turned = copy.deepcopy(batch)
        turned.pos, turned.cell = batch.pos @ turn, batch.cell @ turn
        turned_plan = Plan("scd", tuple(replace(p, pos=p.pos @ turn) for p in plan.passes))
        condition = 3 * torch.randn(2, model.adapter.scalar_channels, generator=torch.Generator().manual_seed(1))
        with mock.patch.object(ConditionHead, "forward", return_value=condition), torch.no_grad():
            plain, plain_turned = run(model, batch), run(model, turned)
            out, out_turned = run(model, batch, plan)[NOISE], run(model, turned, turned_plan)[NOISE]
        slack = relative_error(plain["forces"] @ turn, plain_turned["forces"])
        assert relative_error(out @ turn, out_turned) <= max(3 * slack, self.symmetry)
        assert relative_error(out, out_turned) > 0.1

    def test_the_embedding_does_not_see_rotation_translation_order_or_choice_of_cell(self) -> None:
        model, turn, row = self.ours(SCD).eval(), rotation(), crystal()
        turned, moved, permuted = copy.deepcopy(row), copy.deepcopy(row), copy.deepcopy(row)
        turned.pos, turned.cell = row.pos @ turn, row.cell @ turn
        moved.pos = row.pos + torch.tensor([0.3, -1.0, 2.0])
        for key in ("pos", "atomic_numbers", "fixed", "tags"):
            permuted[key] = row[key][torch.tensor([2, 0, 3, 1])]
        others = {"turned": turned, "moved": moved, "permuted": permuted, "a larger cell": crystal((1, 2, 2))}
        with torch.no_grad():
            expected = model.embed(collate([row]))
            slack = relative_error(model(collate([row]))["energy"], model(collate([turned]))["energy"])
            for what, other in others.items():
                error = relative_error(expected, model.embed(collate([other])))
                assert error <= max(10 * slack, self.symmetry), (what, error, slack)
            assert relative_error(expected, model.embed(self.batch(1))) > 1e-2

    def test_structures_of_a_batch_do_not_see_each_other(self) -> None:
        rows = self.rows()
        pair = [row for row in rows if int((row.tags == 2).sum()) == 2][:2]
        batches = [collate(pair), *(collate([row]) for row in pair), collate([pair[0], rows[-1]])]
        for block in ({"scd": {}}, {"noisy_nodes": {}}, *[{"dens": {"prob": 1.0}}] * self.conditions_on_forces()):
            model = stirred(self.ours(block)).eval()
            with torch.no_grad():
                together, *alone, mixed = (run(model, batch, plan_of(batch, block)[0]) for batch in batches)
            assert together[NOISE].any()
            for key, value in together.items():
                slack = {"atol": 1e-4 * float(value.abs().max()), "rtol": 1e-4}
                torch.testing.assert_close(value, torch.cat([out[key] for out in alone]), **slack)
                torch.testing.assert_close(mixed[key][: len(alone[0][key])], alone[0][key], **slack)

    def test_forces_are_heard_and_turn_or_are_refused(self) -> None:
        """As the condition of DeNS: they change what is predicted, and all rotates together."""
        block = {"dens": {"prob": 1.0}}
        if not self.conditions_on_forces():
            with pytest.raises(ConfigError, match="vector features"):
                self.ours(block)
            return
        model, batch, turn = self.ours(block).eval(), self.batch(2), rotation()
        with torch.no_grad():
            model.denoising["dens"]["encoding"].force_weight.uniform_(-1, 1)
        plan, _ = plan_of(batch, block, step=1)
        (only,) = plan.passes
        forces, mask, sigma = only.encoding
        turned = copy.deepcopy(batch)
        turned.pos, turned.cell = batch.pos @ turn, batch.cell @ turn
        turned_pass = replace(only, pos=only.pos @ turn, encoding=(forces @ turn, mask, sigma))
        masked = replace(only, encoding=(forces, torch.zeros_like(mask), torch.zeros_like(sigma)))
        plain, plain_turned = run(model, batch), run(model, turned)
        out, out_turned = run(model, batch, plan), run(model, turned, Plan("dens", (turned_pass,)))
        all_masked, without = (run(model, batch, Plan("dens", (p,))) for p in (masked, replace(only, encoding=None)))
        slack = max(3 * relative_error(plain["forces"] @ turn, plain_turned["forces"]), self.symmetry)
        assert relative_error(out[NOISE] @ turn, out_turned[NOISE]) <= slack
        assert relative_error(out[NOISE], without[NOISE]) > 1e-2
        # The encoding of an atom whose force is masked changes nothing.
        assert all(torch.equal(all_masked[key], without[key]) for key in without)
