"""Conditions by hand: force encoding, embedding, modulation, and what is known of SCD's condition from its weights."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from fairchem_scd.denoising.conditions import ConditionHead, ForceEncoding, Modulation, SelfCondition
from fairchem_scd.denoising.conditions.self_condition import (
    check_exportable,
    check_null_form,
    check_same_form,
    null_form,
)
from fairchem_scd.errors import ConfigError

# --- forces -----------------------------------------------------------------------------------------------------------


def harmonics(unit):
    """[N, 9] real spherical harmonics up to l = 2 in component normalisation, written out; y is the polar axis."""
    x, y, z = unit.unbind(1)
    one, three, five = torch.ones_like(x), math.sqrt(3), math.sqrt(5)
    second = (three * x * z, three * x * y, y * y - (x * x + z * z) / 2, three * y * z, three / 2 * (z * z - x * x))
    return torch.stack([one, three * x, three * y, three * z, *(five * value for value in second)], dim=1)


@pytest.mark.parametrize("lmax_list", [[2], [2, 1]])
def test_force_encoding_is_the_papers_formula(lmax_list):
    encoding = ForceEncoding(lmax_list, channels=3, bound=1.0, sigma=True)
    forces, mask = torch.randn(5, 3), torch.tensor([True, False, True, True, True])
    forces[2] = 0
    sigma = torch.tensor([0.1, 0.1, 0.0, 0.2, 0.2])
    norm = forces.norm(dim=1, keepdim=True)
    y = harmonics(torch.where(norm > 0, forces / norm.clamp(min=1e-9), 0.0)) * norm / math.sqrt(3) * mask[:, None]
    expected, degree = [], 0
    for resolution, lmax in enumerate(lmax_list):
        for l in range(lmax + 1):
            rows = y[:, l * l : (l + 1) ** 2, None] * encoding.force_weight[degree]
            if l == 0:
                rows = rows + sigma[:, None, None] * encoding.sigma_weight[resolution]
            expected.append(rows)
            degree += 1
    torch.testing.assert_close(encoding(forces, mask, sigma), torch.cat(expected, dim=1), rtol=1e-5, atol=1e-6)


def test_where_nothing_is_told_the_encoding_is_zero():
    encoding = ForceEncoding([2], channels=4, bound=1.0, sigma=True)
    out = encoding(torch.randn(3, 3), torch.tensor([True, False, False]), torch.tensor([0.1, 0.0, 0.1]))
    assert out[0].any()
    assert not out[1].any()
    assert out[2, 0].any()
    assert not out[2, 1:].any()
    assert ForceEncoding([1], 4, 1.0).sigma_weight is None


# --- the self-condition -----------------------------------------------------------------------------------------------


def test_modulation_by_hand():
    """Both forms written out for single numbers, in double precision."""
    torch.manual_seed(0)
    x, c = torch.randn(5, 6), torch.randn(5, 6)
    heard = torch.tensor([True, True, False, True, False])
    for null in ("identity", "mask_token"):
        modulation = Modulation(6, 1, null=null, gate_bound=0.5 if null == "identity" else 1.0)
        block = modulation.blocks[0]
        nn.init.normal_(block.mlp[-1].weight)
        modulation = modulation.bind(c, heard)
        out, update = modulation.scalars(0, x), modulation.update(0, torch.ones_like(x))
        shift, scale, gate = block.mlp(torch.cat([c, functional.layer_norm(x, (6,))], dim=1)).chunk(3, dim=1)
        for i in range(5):
            for j in range(6):
                x_, shift_, scale_, gate_ = (float(t[i, j]) for t in (x, shift, scale, gate))
                a, alpha = 0.2, 0.2
                if null == "mask_token":
                    expected = math.tanh(a * x_) * (1 + scale_) / a + shift_, math.tanh(alpha * gate_)
                elif heard[i]:
                    expected = x_ * (1 + scale_) + shift_, 1 + 0.5 * math.tanh(alpha * gate_)
                else:
                    expected = x_, 1.0
                assert float(out[i, j]) == pytest.approx(expected[0], rel=1e-4, abs=1e-5)
                assert float(update[i, j]) == pytest.approx(expected[1], rel=1e-4, abs=1e-5)


def test_the_squashing_of_the_mask_token_form_has_its_limit_where_its_width_is_zero():
    """tanh(a·x)/a → x for a → 0, and the form is the same for a and -a."""
    torch.manual_seed(0)
    block = Modulation(4, 1, null="mask_token").blocks[0]
    scalars, condition, conditioned = torch.randn(5, 4), torch.randn(5, 4), torch.ones(5, dtype=torch.bool)
    made = {}
    with torch.no_grad():
        for a in (0.0, 1e-4, 0.3, -0.3):
            block.a.fill_(a)
            made[a], _ = block(scalars, condition, conditioned)
    torch.testing.assert_close(made[0.0], made[1e-4], rtol=1e-4, atol=1e-5)
    assert torch.equal(made[0.3], made[-0.3])
    assert not torch.allclose(made[0.0], made[0.3])
    block.a.data.fill_(0.0)
    block(scalars, condition, conditioned)[0].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in block.parameters())


def test_condition_head_by_hand():
    torch.manual_seed(0)
    x, batch = torch.randn(5, 6), torch.tensor([0, 0, 0, 2, 2])
    head = ConditionHead(6, mask_token=True)
    atoms = torch.stack([head.atoms(row[None])[0] for row in x])
    pooled = [atoms[:3].sum(0), torch.zeros(6), atoms[3:].sum(0)]
    expected = torch.stack([head.structure(row[None])[0] for row in pooled])
    embedding = head(x, batch, 3)
    torch.testing.assert_close(embedding, expected)
    conditioned = torch.tensor([True, False, False])
    raw = torch.stack([expected[0], head.mask_token, head.mask_token])
    torch.testing.assert_close(head.condition(embedding, conditioned), functional.layer_norm(raw, (6,)))


def test_statistics_are_float32_under_autocast():
    head, modulation = ConditionHead(8), Modulation(8, 1)
    x = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embedding = head(x, torch.tensor([0, 0, 1, 1]), 2)
        condition = head.condition(embedding, torch.tensor([True, True]))
        modulation = modulation.bind(condition.repeat(2, 1), torch.ones(4, dtype=torch.bool))
        assert modulation.scalars(0, x.bfloat16()).dtype == torch.bfloat16
        assert modulation.update(0, x.bfloat16()).dtype == torch.bfloat16
    assert embedding.dtype == condition.dtype == torch.float32


def state_keys(form):
    modules = nn.ModuleDict(SelfCondition.build(4, 2, null_form=form).modules)
    return [f"denoising.scd.{key}" for key in modules.state_dict()]


@pytest.mark.parametrize("form", ["identity", "mask_token"])
def test_the_null_form_is_known_from_the_names_of_the_weights(form):
    assert null_form(state_keys(form)) == form
    assert null_form([f"module.module.{key}" for key in state_keys(form)]) == form
    assert null_form(["backbone.modulation.weight", "denoising.dens.noise_head.weight"]) is None
    condition = SelfCondition.build(4, 2, null_form=form)
    assert condition.always_on == (form == "mask_token")
    bound = condition.bind_nothing(torch.tensor([0, 0, 1]), 2)
    assert (bound is None) == (form == "identity")


def test_a_model_under_a_mask_token_cannot_be_exported():
    check_exportable(state_keys("identity"))
    check_exportable(["backbone.weight"])
    with pytest.raises(ConfigError, match="mask_token, which stands for the condition in every pass"):
        check_exportable(state_keys("mask_token"))


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("identity", "identity", None),
        ("mask_token", "mask_token", None),
        ("identity", None, None),
        (None, "identity", None),
        (None, "mask_token", None),
        ("mask_token", "identity", "--here: its backbone was trained under a mask token"),
        ("mask_token", None, "--here: its backbone was trained under a mask token"),
        ("identity", "mask_token", "--here: trained with .* identity, and this config says mask_token"),
    ],
)
def test_weights_of_one_form_are_not_read_as_the_other(source, target, message):
    keys = {None: ["backbone.weight"], **{form: state_keys(form) for form in ("identity", "mask_token")}}
    if message is None:
        check_same_form("--here", keys[source], keys[target])
        return
    with pytest.raises(ConfigError, match=message):
        check_same_form("--here", keys[source], keys[target])


def test_a_token_in_every_pass_is_warned_of_and_excludes_forces_from_the_energy(caplog):
    with caplog.at_level(logging.WARNING):
        check_null_form("identity", gradient_forces=True)
        assert not caplog.records
        check_null_form("mask_token", gradient_forces=False)
    assert "the token stands in every pass" in caplog.text
    with pytest.raises(ConfigError, match=r"null_condition: mask_token.*gradient"):
        check_null_form("mask_token", gradient_forces=True)
