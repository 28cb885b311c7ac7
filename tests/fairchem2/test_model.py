"""Passes of denoising tasks on the host's models: gradients, symmetry, and what is left when they are over."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from fairchem.core.models.uma.nn.mole import MOLE

from fairchem_scd.denoising.hooks import StateOfPass
from fairchem_scd.denoising.plan import NOISE
from fairchem_scd.fairchem2.backbones.escn_md import ESCNMDMoeAdapter
from tests.fairchem2.support import (
    batch_of,
    converted,
    crystal,
    crystals,
    gradients,
    model_config,
    plan_of,
    stirred,
    with_rotations_fixed,
)

BLOCKS = {
    "scd": {"scd": {}},
    "scd with forces": {"scd": {"condition": ["self", "forces"]}},
    "dens": {"dens": {"prob": 1}},
    "noisy nodes": {"noisy_nodes": {"std": 0.02}},
}
DROPPING = {"moe_dropout": 0.5, "use_composition_embedding": True, "composition_dropout": 0.3}


# --- no condition, no trace -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [True, False])
def test_without_a_plan_the_model_is_the_plain_one_bit_for_bit(direct):
    plain, model = (converted(block, model_config(direct=direct, experts=2)) for block in (None, BLOCKS["scd"]))
    stirred(model.denoising)
    expected, found = gradients(plain, batch_of(crystals(2))), gradients(model, batch_of(crystals(2)))
    assert set(found) > set(expected)
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]) if name in expected else not gradient.any(), name


@pytest.mark.parametrize("direct", [True, False])
def test_the_clean_pass_gives_the_plain_models_outputs_whatever_follows(direct):
    plain, model = (converted(block, model_config(direct=direct, experts=2)) for block in (None, BLOCKS["scd"]))
    stirred(model.denoising)
    batch = batch_of(crystals(2))
    plan, _ = plan_of(model, batch)
    with with_rotations_fixed():
        expected = plain(copy.deepcopy(batch))
        found = model(copy.deepcopy(batch), plan)
    for key in ("energy", "forces"):
        assert torch.equal(expected[key][key], found[key][key])


def test_nothing_is_left_when_a_pass_fails():
    model = converted(BLOCKS["scd with forces"], model_config(experts=2, activation_checkpointing=True))
    batch = batch_of(crystals(2))
    plan, _ = plan_of(model, batch)
    broken = copy.deepcopy(batch)
    broken.atomic_numbers = broken.atomic_numbers + 1000
    with pytest.raises(IndexError):
        model(broken, plan)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all("forward_chunk" not in vars(module) for module in model.modules())
    model(copy.deepcopy(batch), plan)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("direct", [True, False])
def test_every_parameter_has_a_gradient_in_every_kind_of_step(block, direct):
    (task,) = block
    others = {name: {"prob": 0} for name in ("scd", "dens", "noisy_nodes") if name != task}
    model = stirred(converted({**others, **block}, model_config(direct=direct, experts=2, stress=not direct)))
    batch = batch_of(crystals(2))
    plan, _ = plan_of(model, batch, task, conditioned=[True, False])
    found = gradients(model, batch, plan)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(found) == trained
    for name, gradient in found.items():
        idle = name.startswith("denoising.") and not name.startswith(f"denoising.{task}.")
        idle |= name.endswith("linear.bias")  # of l = 0, which a vector head computes and does not use
        assert bool(gradient.any()) != idle, name


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("equal_edges", [True, False])
def test_activation_checkpointing_changes_no_gradient(experts, direct, equal_edges):
    """With dropout of experts, and also where both passes have as many edges: then a wrong mix would go unnoticed."""
    made = [
        stirred(
            converted(
                BLOCKS["scd"],
                model_config(
                    direct=direct,
                    experts=experts,
                    activation_checkpointing=checkpointing,
                    **(DROPPING if experts else {}),
                ),
            )
        ).train()
        for checkpointing in (False, True)
    ]
    batch = batch_of(crystals(2))
    plan, _ = plan_of(made[0], batch)
    if equal_edges:
        plan = replace(plan, passes=(plan.passes[0], replace(plan.passes[1], pos=plan.passes[0].pos)))
    expected, found = (gradients(model, batch, plan) for model in made)
    assert set(expected) == set(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_running_the_clean_pass_again_changes_no_gradient(experts, direct, checkpointing):
    """`scd.recompute_clean_pass`, with dropout of experts, and on top of activation checkpointing."""
    config = model_config(
        direct=direct, experts=experts, activation_checkpointing=checkpointing, **(DROPPING if experts else {})
    )
    batch, found = batch_of(crystals(2)), []
    for recompute in (False, True):
        model = stirred(converted({"scd": {"prob": 1, "recompute_clean_pass": recompute}}, config)).train()
        plan, _ = plan_of(model, batch)
        assert plan.passes[0].recompute == recompute
        found.append(gradients(model, batch, plan))
    expected, again = found
    assert set(expected) == set(again)
    assert all(torch.equal(expected[name], again[name]) for name in expected)


def test_activation_checkpointing_would_take_the_wrong_experts(monkeypatch):
    """What the guard of the claim above is for: the same step without it has other gradients, and no error."""
    config = model_config(experts=4, activation_checkpointing=True, **DROPPING)
    batch, found = batch_of(crystals(2)), []
    for guarded in (True, False):
        if not guarded:
            monkeypatch.setattr(ESCNMDMoeAdapter, "recomputed", lambda self, heads: [])
        model = stirred(converted(BLOCKS["scd"], config)).train()
        plan, _ = plan_of(model, batch)
        plan = replace(plan, passes=(plan.passes[0], replace(plan.passes[1], pos=plan.passes[0].pos)))
        found.append(gradients(model, batch, plan))
    of_experts = [f"{n}.weights" for n, module in model.named_modules() if isinstance(module, MOLE)]
    assert any(not torch.allclose(found[0][name], found[1][name], rtol=0.01) for name in of_experts)


def test_the_state_of_a_pass_is_that_of_the_pass_in_which_it_was_first_entered():
    adapter = converted(BLOCKS["scd"], model_config(experts=2)).adapter
    experts = adapter.backbone.global_mole_tensors
    experts.expert_mixing_coefficients, experts.mole_sizes = "first", 1
    state = adapter.state_of_pass()
    assert isinstance(state, StateOfPass)
    with state.restored():
        pass
    experts.expert_mixing_coefficients, experts.mole_sizes = "second", 2
    with state.restored():
        assert (experts.expert_mixing_coefficients, experts.mole_sizes) == ("first", 1)
    assert (experts.expert_mixing_coefficients, experts.mole_sizes) == ("second", 2)


@pytest.mark.parametrize("name", ["backbone.blocks.0.edge_wise.so2_conv_1.fc_m0.weights", "backbone.norm.affine_weight",
                                  "denoising.scd.modulation.blocks.0.mlp.3.weight"])  # fmt: skip
def test_gradients_of_a_conservative_model_are_those_of_finite_differences(name, monkeypatch):
    """In a step with forces from the energy's gradient and a noisy pass behind them, in double precision."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # what is float32 on purpose,
    monkeypatch.setattr(torch.Tensor, "detach", lambda tensor: tensor)  # and where SCD stops gradients on purpose
    model = stirred(converted(BLOCKS["scd"], model_config(direct=False, experts=2, stress=True))).double()
    batch = batch_of(crystals(2)).apply(lambda x: x.double() if x.is_floating_point() else x)
    plan, _ = plan_of(model, batch)
    plan = replace(plan, passes=tuple(replace(run, pos=run.pos.double()) for run in plan.passes))
    parameter, gradient = dict(model.named_parameters())[name], gradients(model, batch, plan)[name]
    direction = torch.randn_like(parameter, generator=torch.Generator().manual_seed(0))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter += sign * 1e-5 * direction
        values.append(gradients(model, batch, plan, value=True))
        with torch.no_grad():
            parameter -= sign * 1e-5 * direction
    assert float((gradient * direction).sum()) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4)


# --- symmetry ---------------------------------------------------------------------------------------------------------


def noise_of(model, atoms, turn=None, order=None, shift=None, step=1):
    """The noise that a model predicts for a structure and a noise that turn, move and change order with it."""
    turn = torch.eye(3) if turn is None else turn
    plan, _ = plan_of(model, batch_of([atoms]), step=step, conditioned=[True])
    batch = batch_of([atoms])
    order = torch.arange(len(atoms)) if order is None else order
    shift = torch.zeros(3) if shift is None else shift
    batch.cell = batch.cell @ turn
    for key in ("pos", "forces"):
        batch[key] = batch[key] @ turn
    batch.pos = (batch.pos + shift)[order]
    batch.atomic_numbers, batch.forces = batch.atomic_numbers[order], batch.forces[order]

    def moved(run):
        encoding = run.encoding and ((run.encoding[0] @ turn)[order], run.encoding[1][order], run.encoding[2][order])
        return replace(run, pos=(run.pos @ turn + shift)[order], encoding=encoding)

    noise = model(batch, replace(plan, passes=tuple(moved(run) for run in plan.passes)))[NOISE].detach()
    back = torch.empty_like(noise)
    back[order] = noise
    return back @ turn.T


def test_predicted_noise_turns_moves_and_is_reordered_with_the_structure():
    """To the precision to which the host's own random frames of the edges leave the prediction as it is."""
    turn = torch.from_numpy(np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]).float()
    turn = turn * torch.linalg.det(turn)  # no reflection
    for block in ({"scd": {"condition": ["self", "forces"]}}, {"dens": {"prob": 1}}):
        model = stirred(converted(block, model_config(experts=2))).eval()
        atoms = crystal(0, (1, 1, 2))
        expected = noise_of(model, atoms)
        frames = max(float((noise_of(model, atoms) - expected).abs().max()) for _ in range(5))
        bound = max(20 * frames, 1e-5 * float(expected.abs().max()))
        order = torch.from_numpy(np.random.default_rng(1).permutation(len(atoms)))
        found = {
            "turned": noise_of(model, atoms, turn=turn),
            "reordered": noise_of(model, atoms, order=order),
            "moved": noise_of(model, atoms, shift=torch.tensor([0.3, -0.2, 0.1])),
        }
        assert float(expected.abs().max()) > 100 * bound
        for name, noise in found.items():
            assert float((noise - expected).abs().max()) < bound, name
