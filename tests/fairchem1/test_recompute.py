"""`recompute_clean_pass` on the host's models, where a pass draws random numbers or is itself run in parts.

That it changes nothing else is claimed of every backbone (`BackboneClaims`), and of the engine in tests/denoising.
"""

from __future__ import annotations

import copy

import pytest
import torch

from fairchem_scd import DenoisingHydra
from fairchem_scd.testing import collate, make_trainer, plan_of, stirred
from tests.support.configs import pretraining, tiny_config
from tests.support.models import ESEN, ESEN_GRADIENT_HEAD, ESEN_HEADS, ESEN_SMOOTH, hydra_arguments

ESEN_MODEL = {"backbone": ESEN, "heads": ESEN_HEADS, "pass_through_head_outputs": True}
CONSERVATIVE = {"backbone": ESEN_SMOOTH, "heads": ESEN_GRADIENT_HEAD, "pass_through_head_outputs": True}
CHANCE = {"alpha_drop": 0.2, "drop_path_rate": 0.2}
MODELS = {
    "equiformer_v2, dropout, drop path": (hydra_arguments("equiformer_v2", **CHANCE), {}),
    "equiformer_v2, also with activation checkpointing": (
        hydra_arguments("equiformer_v2", activation_checkpoint=True, **CHANCE),
        {},
    ),
    "equiformer_v2, subsets": (hydra_arguments("equiformer_v2"), {"embed_tags": [0, 1], "denoise_tags": [2]}),
    "equiformer_v2, mask token": (hydra_arguments("equiformer_v2"), {"null_condition": "mask_token"}),
    "escn": (hydra_arguments("escn"), {}),
    "esen": (ESEN_MODEL, {"condition": ["self", "forces"]}),
    "esen, conservative": (CONSERVATIVE, {}),
}
AGAIN = {"recompute_clean_pass": True}


def gradients_of_a_step(model, batch, plan, autocast=False):
    """Outputs and gradients of a step whose random numbers begin anew, edge frames included."""
    model.zero_grad()
    torch.manual_seed(7)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = model(copy.deepcopy(batch), plan)
    sum(value.float().square().sum() for value in out.values()).backward()
    return out, {name: p.grad for name, p in model.named_parameters()}


def assert_same(kept, again):
    for key, value in kept[0].items():
        assert torch.equal(again[0][key], value), key
    for name, value in kept[1].items():
        assert torch.equal(again[1][name], value) if value is not None else again[1][name] is None, name


@pytest.mark.parametrize(("arguments", "settings"), MODELS.values(), ids=MODELS)
def test_dropout_drop_path_and_edge_frames_are_those_of_the_forward(arguments, settings, rows):
    batch, results, models = collate(rows[:2]), [], []
    for more in ({}, AGAIN):
        torch.manual_seed(0)
        block = {"scd": {**settings, **more}}
        models.append(stirred(DenoisingHydra(denoising=block, **copy.deepcopy(arguments))).train())
        results.append(gradients_of_a_step(models[-1], batch, plan_of(batch, block, step=1)[0]))
    assert_same(*results)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in models[1].modules())
    torch.manual_seed(8)  # chance has its part in it
    other = models[1](copy.deepcopy(batch), plan_of(batch, block, step=1)[0])
    assert not all(torch.equal(other[key], value) for key, value in results[1][0].items())


def test_autocast_is_that_of_the_forward(rows):
    batch, results = collate(rows[:2]), []
    for more in ({}, AGAIN):
        torch.manual_seed(0)
        model = stirred(DenoisingHydra(denoising={"scd": more}, **hydra_arguments("equiformer_v2"))).train()
        plan, _ = plan_of(batch, {"scd": more}, step=1)
        results.append(gradients_of_a_step(model, batch, plan, autocast=True))
    assert_same(*results)
    full, _ = gradients_of_a_step(model, batch, plan)
    assert not torch.equal(full["energy"], results[1][0]["energy"])


@pytest.mark.parametrize("config", [tiny_config, pretraining])
def test_a_run_ends_with_the_same_weights(config, data, tmp_path):
    """Through the host's loop: clipping, moving average and validation included."""
    ends = []
    for name, more in (("kept", {}), ("again", AGAIN)):
        trainer = make_trainer(config(data, denoising={"scd": more}), tmp_path / name, identifier=name)
        trainer.train(disable_eval_tqdm=True)
        ends.append(trainer._unwrapped_model.state_dict())
    assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())
