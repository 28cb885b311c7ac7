"""The engine: an unconditioned model is the host's, and a denoising pass does what the host's own DeNS does."""

from __future__ import annotations

import copy

import pytest
import torch
from fairchem.core.models.base import HydraModel

from fairchem_scd.corruption import Corruption
from fairchem_scd.tasks import NOISE, Pass, Plan, build_tasks, structures_of
from tests.support import BACKBONES, collate, hydra_arguments, plain_and_denoising

DENS = {"dens": {"prob": 1.0}}


def run(model, batch, *args, seed=7):
    """Outputs and gradients of one call, under a fixed random state (edge frames are random)."""
    torch.manual_seed(seed)
    out = model(copy.deepcopy(batch), *args)
    model.zero_grad()
    sum(value.sum() for value in out.values()).backward()
    return out, {name: p.grad for name, p in model.named_parameters()}


def dens_plan(batch, seed=0, step=1, block=DENS):
    task = build_tasks(block)[0]["dens"]
    structures = structures_of(batch)
    corruption = task.corrupt(structures, seed=seed, step=step)
    return Plan("dens", task.passes(structures, corruption, seed=seed, step=step)), corruption


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("equiformer_v2", {}),
        ("equiformer_v2", {"alpha_drop": 0.1, "drop_path_rate": 0.1}),
        ("equiformer_v2", {"activation_checkpoint": True}),
        ("escn", {}),
        ("escn", {"lmax_list": [2, 1], "mmax_list": [2, 1]}),
    ],
)
def test_without_a_plan_the_model_is_the_hosts_bit_for_bit(name, options, training, rows):
    plain, ours = plain_and_denoising(name, {**DENS, "noisy_nodes": {"prob": 0}}, **options)
    plain.train(training), ours.train(training)
    batch = collate(rows[:3])
    expected, expected_gradients = run(plain, batch)
    out, gradients = run(ours, batch)
    assert set(out) == set(expected)
    for key in expected:
        assert torch.equal(out[key], expected[key])
    for key, gradient in expected_gradients.items():
        if gradient is None:  # frozen by the host
            assert gradients[key] is None
        else:
            assert torch.equal(gradients[key], gradient), key


def test_constructing_the_model_leaves_the_random_state_as_the_host_would():
    torch.manual_seed(3)
    HydraModel(**hydra_arguments("equiformer_v2"))
    expected = torch.rand(4)
    torch.manual_seed(3)
    from fairchem_scd import DenoisingHydra

    DenoisingHydra(denoising=DENS, **hydra_arguments("equiformer_v2"))
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("options", [{}, {"norm_type": "rms_norm_sh", "share_atom_edge_embedding": True}])
def test_dens_pass_is_that_of_the_hosts_own_dens_model(rows, options):
    """Same weights, same corrupted structures, same forces told: energy, forces and noise within 1e-5."""
    _, ours = plain_and_denoising("equiformer_v2", DENS, **options)
    arguments = hydra_arguments("equiformer_v2", **options)
    arguments["backbone"]["model"] = "equiformer_v2_dens_backbone"
    arguments["heads"] = {
        "energy": {"module": "eqV2_DeNS_scalar_head"},
        "forces": {"module": "eqV2_DeNS_vector_head"},
    }
    theirs = HydraModel(**arguments)
    state = theirs.state_dict()
    for key, value in ours.state_dict().items():
        key = key.replace("energy.energy_block", "energy.scalar_block")
        key = key.replace("denoising.dens.noise_head.force_block", "output_heads.forces.denoising_pos_block")
        key = key.replace("forces.force_block", "forces.vector_block")
        if key == "denoising.dens.encoding.force_weight":
            state["backbone.force_embedding.weight"] = value[:, :, None]
        else:
            assert key in state, key
            state[key] = value
    state["backbone.force_embedding.bias"].zero_()
    theirs.load_state_dict(state)

    batch = collate(rows[:3])
    plan, corruption = dens_plan(batch)
    assert corruption.mask.any()
    assert not corruption.mask.all()
    corrupted = copy.deepcopy(batch)
    corrupted.pos = batch.pos + corruption.noise
    corrupted.denoising_pos_forward, corrupted.noise_mask = True, corruption.mask
    torch.manual_seed(7)
    expected = theirs(corrupted)
    torch.manual_seed(7)
    out = ours(batch, plan)
    hybrid = torch.where(corruption.mask[:, None], out[NOISE], out["forces"])
    torch.testing.assert_close(out["energy"], expected["energy"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hybrid, expected["forces"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_noise_prediction_turns_with_the_structure_and_the_told_forces(name, rows):
    _, model = plain_and_denoising(name, DENS)
    with torch.no_grad():
        model.denoising["dens"]["encoding"].force_weight.uniform_(-1, 1)
    model.eval()
    batch = collate(rows[:2])
    plan, _ = dens_plan(batch)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))
    rotation = rotation * torch.det(rotation).sign()
    turned = copy.deepcopy(batch)
    turned.cell = batch.cell @ rotation
    turned.pos = batch.pos @ rotation
    forces, mask, sigma = plan.passes[0].encoding
    moved = Pass(plan.passes[0].pos @ rotation, encoding=(forces @ rotation, mask, sigma), noise=True)
    with torch.no_grad():
        plain = model(copy.deepcopy(batch))
        plain_turned = model(copy.deepcopy(turned))
        out = model(copy.deepcopy(batch), plan)
        out_turned = model(turned, Plan("dens", (moved,)))
        deaf = model(copy.deepcopy(batch), Plan("dens", (Pass(plan.passes[0].pos, noise=True),)))
    scale = out[NOISE].abs().max()
    assert not torch.allclose(out[NOISE], deaf[NOISE], atol=float(1e-2 * scale)), "the forces are not heard"
    # As good as the plain backbone's own symmetry (its grids are of finite resolution), with room for noise.
    slack = (plain["forces"] @ rotation - plain_turned["forces"]).abs().max() / plain["forces"].abs().max()
    error = (out[NOISE] @ rotation - out_turned[NOISE]).abs().max() / scale
    assert error <= max(3 * float(slack), 1e-4), (float(error), float(slack))
    torch.testing.assert_close(out["energy"], out_turned["energy"], rtol=max(3 * float(slack), 1e-4), atol=1e-4)


@pytest.mark.parametrize("name", BACKBONES)
def test_predictions_do_not_depend_on_the_neighbours_in_the_batch(name, rows, monkeypatch):
    _, model = plain_and_denoising(name, DENS)
    model.eval()
    whole = collate(rows[:2])
    plan, _ = dens_plan(whole)
    with torch.no_grad():
        together = model(whole, plan)
        alone = []
        for row in rows[:2]:
            single = collate([row])
            part, _ = dens_plan(single)
            alone.append(model(single, part))
    for key in together:
        torch.testing.assert_close(together[key], torch.cat([out[key] for out in alone]), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_parameter_has_a_gradient_and_a_task_moves_its_own(name, rows):
    plain, model = plain_and_denoising(name, {"dens": {"prob": 0.5}, "noisy_nodes": {"prob": 0.5}})
    plain.train(), model.train()
    batch = collate(rows[:3])
    # Some host parameters have no influence by construction, such as the l = 0 bias of a vector head.
    _, plain_gradients = run(plain, batch)
    idle = {n.removeprefix("output_heads.forces.") for n, g in plain_gradients.items() if g is not None and not g.any()}
    plan, _ = dens_plan(batch)
    for arguments, used in (((), set()), ((plan,), {"dens"})):
        _, gradients = run(model, batch, *arguments)
        for parameter_name, p in model.named_parameters():
            gradient = gradients[parameter_name]
            if not p.requires_grad:
                continue
            assert gradient is not None, parameter_name
            if parameter_name.startswith("denoising."):
                task, module, rest = parameter_name.removeprefix("denoising.").split(".", 2)
                expected = task in used and not (module == "noise_head" and rest in idle)
                assert bool(gradient.any()) == expected, parameter_name


@pytest.mark.parametrize("name", BACKBONES)
def test_an_atom_without_a_force_leaves_no_trace(name, rows):
    """No bias: a pass that tells no forces is the pass without a condition, bit for bit."""
    _, model = plain_and_denoising(name, DENS)
    batch = collate(rows[:2])
    n = len(batch.pos)
    told = (batch.forces, torch.zeros(n, dtype=torch.bool), torch.zeros(n))
    out, _ = run(model, batch, Plan("dens", (Pass(batch.pos, encoding=told, noise=True),)))
    silent, _ = run(model, batch, Plan("dens", (Pass(batch.pos, noise=True),)))
    for key in out:
        assert torch.equal(out[key], silent[key])


def test_activation_checkpointing_gives_the_same_gradients(rows):
    _, model = plain_and_denoising("equiformer_v2", DENS)
    _, saving = plain_and_denoising("equiformer_v2", DENS, activation_checkpoint=True)
    saving.load_state_dict(model.state_dict())
    model.train(), saving.train()
    batch = collate(rows[:2])
    plan, _ = dens_plan(batch)
    _, expected = run(model, batch, plan)
    _, gradients = run(saving, batch, plan)
    for key, gradient in expected.items():
        assert (gradient is None and gradients[key] is None) or torch.equal(gradients[key], gradient), key


def test_a_pass_takes_its_hooks_away_with_it_even_when_it_fails(rows):
    _, model = plain_and_denoising("equiformer_v2", DENS)
    batch = collate(rows[:1])
    plan, _ = dens_plan(batch)
    broken = copy.deepcopy(batch)
    broken.atomic_numbers = broken.atomic_numbers + 1000
    with pytest.raises((AssertionError, IndexError)):
        model(broken, plan)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_corruption_moves_to_a_device_whole():
    corruption = Corruption(torch.zeros(2, 3), torch.ones(2, dtype=torch.bool), torch.ones(1), torch.zeros(2).long())
    assert corruption.to(torch.device("meta")).noise.is_meta
