"""The engine, beyond what is claimed of every backbone: a denoising pass does what the host's own DeNS does."""

from __future__ import annotations

import copy

import pytest
import torch
from fairchem.core.models.base import HydraModel

from fairchem_scd.denoising.plan import NOISE
from fairchem_scd.testing import collate, gradients, plan_of
from tests.support.models import hydra_arguments, plain_and_denoising

DENS = {"dens": {"prob": 1.0}}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("equiformer_v2", {"alpha_drop": 0.1, "drop_path_rate": 0.1}),
        ("equiformer_v2", {"activation_checkpoint": True}),
        ("escn", {"lmax_list": [2, 1], "mmax_list": [2, 1]}),
    ],
)
def test_without_a_plan_the_model_is_the_hosts_bit_for_bit_with_these_options_too(name, options, rows):
    plain, ours = plain_and_denoising(name, {**DENS, "noisy_nodes": {"prob": 0}}, **options)
    batch = collate(rows[:3])
    for training in (True, False):
        expected, expected_gradients = gradients(plain.train(training), batch)
        out, found = gradients(ours.train(training), batch)
        assert set(out) == set(expected)
        for key in expected:
            assert torch.equal(out[key], expected[key])
        for key, gradient in expected_gradients.items():
            if gradient is None:  # frozen by the host
                assert found[key] is None
            else:
                assert torch.equal(found[key], gradient), key


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
    plan, corruption = plan_of(batch, DENS, step=1)
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
