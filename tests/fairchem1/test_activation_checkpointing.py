"""Activation checkpointing, by which blocks run twice: under the same rotations, random numbers and conditions."""

from __future__ import annotations

import copy

import pytest
import torch

from fairchem_scd import DenoisingHydra
from fairchem_scd.testing import SCD, collate, gradients, plan_of, run, stirred
from tests.support.models import (
    ESEN,
    ESEN_GRADIENT_HEAD,
    ESEN_HEADS,
    ESEN_SMOOTH,
    edge_frames_without_chance,
    hydra_arguments,
)

SWITCH = {"equiformer_v2": "activation_checkpoint", "esen": "activation_checkpointing"}
MODELS = {
    "equiformer_v2": hydra_arguments("equiformer_v2"),
    "equiformer_v2 with dropout": hydra_arguments("equiformer_v2", alpha_drop=0.2, drop_path_rate=0.2),
    "esen": {"backbone": ESEN, "heads": ESEN_HEADS, "pass_through_head_outputs": True},
    "esen conservative": {"backbone": ESEN_SMOOTH, "heads": ESEN_GRADIENT_HEAD, "pass_through_head_outputs": True},
}
DENS = {"dens": {"prob": 1.0}}
BOTH_CONDITIONS = {"scd": {"condition": ["self", "forces"]}}
CASES = [
    ("equiformer_v2", DENS, True),
    ("equiformer_v2", BOTH_CONDITIONS, True),
    ("equiformer_v2", BOTH_CONDITIONS, False),
    ("equiformer_v2", {"scd": {"null_condition": "mask_token"}}, True),
    ("equiformer_v2", {"scd": {"embed_tags": [0, 1], "denoise_tags": [2]}}, True),
    ("equiformer_v2 with dropout", SCD, True),
    *((name, block, True) for name in ("esen", "esen conservative") for block in (DENS, SCD)),
]


def model_of(name, block, **backbone):
    arguments = copy.deepcopy(MODELS[name])
    arguments["backbone"].update(backbone)
    torch.manual_seed(0)
    return stirred(DenoisingHydra(denoising=block, **arguments)).train()


def checkpointed(name, block):
    return model_of(name, block, **{SWITCH[name.split()[0]]: True})


@pytest.fixture(autouse=True)
def _edge_frames_without_chance():
    with edge_frames_without_chance():
        yield


@pytest.mark.parametrize(("name", "block", "supervised"), CASES)
def test_it_gives_the_same_gradients(name, block, supervised, rows):
    model, saving, batch = model_of(name, block), checkpointed(name, block), collate(rows[:2])
    plan, _ = plan_of(batch, block, supervised, step=1)
    (expected, expected_gradients), (out, found) = (gradients(one, batch, plan) for one in (model, saving))
    for key, value in expected.items():
        assert torch.equal(out[key], value), key
    for key, gradient in expected_gradients.items():
        assert torch.equal(found[key], gradient) if gradient is not None else found[key] is None, key
    assert_nothing_left(saving)


def test_a_pass_that_fails_leaves_nothing_behind(rows):
    model, batch = checkpointed("equiformer_v2", SCD), collate(rows[:1])
    plan, _ = plan_of(batch, SCD)
    broken = copy.deepcopy(batch)
    broken.atomic_numbers = broken.atomic_numbers + 1000
    with pytest.raises((AssertionError, IndexError)):
        run(model, broken, plan)
    assert_nothing_left(model)


def assert_nothing_left(model):
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert "blocks" not in vars(model.backbone)
