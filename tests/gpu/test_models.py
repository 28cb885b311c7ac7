"""One call of a model on a GPU: it computes what it computes on the CPU, and without a plan what the host's does."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch

from fairchem_scd.denoising.plan import NOISE
from fairchem_scd.testing import collate, plan_of, stirred
from fairchem_scd.testing.backbone_claims.models import relative_error
from tests.support import claims
from tests.support.models import edge_frames_without_chance

BACKBONES = {name: each for name, each in vars(claims).items() if hasattr(each, "heads") and hasattr(each, "batch")}
SCD, DENS = {"scd": {}}, {"dens": {"prob": 1.0}}
SUBSETS = {"scd": {"embed_tags": [0, 1], "denoise_tags": [2]}}
BLOCKS = {"scd": SCD, "subsets": SUBSETS, "dens": DENS}
WITHOUT_VECTORS = ("GemNetT", "ConservativeGemNetT", "GemNetOC", "ConservativeGemNetOC", "DimeNetPlusPlus")


def cases(*blocks):
    """A backbone and a block; forces are a condition where atoms have vector features."""
    for name, each in BACKBONES.items():
        for block in blocks:
            if block != "dens" or name not in WITHOUT_VECTORS:
                yield pytest.param(each(), BLOCKS[block], id=f"{name}, {block}")


def call(model, batch, plan=None, *, autocast=False, supervised=True):
    """Outputs of a call in training mode, and the gradients of the sum of their squares; on the CPU, in float32."""
    device = next(model.parameters()).device
    batch = copy.deepcopy(batch).to(device)
    model.zero_grad()
    torch.manual_seed(7)
    with torch.autocast(device.type, dtype=torch.bfloat16) if autocast else nullcontext():
        out = model(batch) if plan is None else model(batch, plan.to(device))
    sum(value.float().square().sum() for value in out.values()).backward()
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {key: value.detach().float().cpu() for key, value in out.items()}, gradients


def assert_close(expected, found, tolerance):
    for values, others in zip(expected, found, strict=True):
        assert values.keys() == others.keys()
        for key, value in values.items():
            if value.any():
                assert relative_error(value, others[key]) <= tolerance, key


def assert_equal(expected, found):
    for values, others in zip(expected, found, strict=True):
        for key, value in values.items():
            assert torch.equal(others[key], value), key


@pytest.mark.parametrize(("made", "block"), cases(*BLOCKS))
def test_outputs_and_gradients_are_the_cpus_within_float32(made, block, device):
    with edge_frames_without_chance():
        model, batch = stirred(made.ours(block)), made.batch(3)
        plan, _ = plan_of(batch, block, step=1)
        there = copy.deepcopy(model).to(device)
        assert {p.device for p in there.parameters()} == {device}
        (out, slopes), (out_there, slopes_there) = call(model, batch, plan), call(there, batch, plan)
    assert out[NOISE].any()
    assert_close([out], [out_there], 1e-4)
    assert_close([slopes], [slopes_there], 1e-3)


@pytest.mark.parametrize("name", BACKBONES)
def test_without_a_plan_the_model_is_the_hosts_bit_for_bit(name, device):
    made = BACKBONES[name]()
    plain, model, batch = made.plain().to(device), stirred(made.ours(SCD)).to(device), made.batch(3)
    expected, again, found = call(plain, batch), call(plain, batch), call(model, batch)
    found = (found[0], {key: value for key, value in found[1].items() if key in expected[1]})
    assert_equal([expected[0]], [found[0]])
    if all(torch.equal(again[1][key], value) for key, value in expected[1].items()):
        assert_equal(expected, found)
    else:  # the host's own backward is not the same twice
        assert_close(expected, found, 1e-4)


@pytest.mark.parametrize(("made", "block"), cases("scd", "subsets"))
def test_recomputing_the_clean_pass_gives_the_same_gradients(made, block, device):
    """With the device's random numbers, which edge frames are drawn from."""
    model, batch = stirred(made.ours(block)).to(device), made.batch(3)
    block_again = {"scd": {**block["scd"], "recompute_clean_pass": True}}
    plan, plan_again = plan_of(batch, block, step=1)[0], plan_of(batch, block_again, step=1)[0]
    kept, again = call(model, batch, plan), call(model, batch, plan_again)
    assert_equal([kept[0]], [again[0]])
    assert_close(kept, again, 1e-5)


@pytest.mark.parametrize(("made", "block"), cases(*BLOCKS))
def test_bf16_is_as_near_to_float32_as_the_hosts_own_model(made, block, device):
    with edge_frames_without_chance():
        batch, plain = made.batch(3), made.plain().to(device)
        try:
            (full, _), (half, slopes) = call(plain, batch), call(plain, batch, autocast=True)
        except RuntimeError as error:
            pytest.skip(f"the host's model does not run in bf16: {str(error).splitlines()[0]}")
        if not all(value.isfinite().all() for value in half.values()):
            pytest.skip("the host's own outputs are not finite in bf16")
        slack = max(0.25, *(3 * relative_error(value, half[key]) for key, value in full.items()))
        trains = all(value.isfinite().all() for value in slopes.values())
        model = stirred(made.ours(block), 0.3).to(device)
        plan, _ = plan_of(batch, block, step=1)
        (out, _), (half, slopes) = call(model, batch, plan), call(model, batch, plan, autocast=True)
    assert_close([out], [half], slack)
    if not trains:
        pytest.skip("the outputs are near; the host's own gradients are not finite in bf16")
    assert all(value.isfinite().all() for value in slopes.values())


def test_an_embedding_is_the_cpus(device, rows):
    made = claims.EquiformerV2()
    with edge_frames_without_chance():
        model, batch = made.ours(SUBSETS).eval(), collate(rows[:3])
        there = copy.deepcopy(model).to(device)
        with torch.no_grad():
            expected, found = model.embed(batch), there.embed(collate(rows[:3]).to(device))
    assert relative_error(expected, found.cpu()) <= 1e-4
