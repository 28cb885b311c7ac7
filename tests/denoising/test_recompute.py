"""`recompute_clean_pass`: gradients to the bit, and the activations of one pass at a time."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from fairchem_scd.denoising.plan import NOISE, Plan
from fairchem_scd.denoising.recompute import recomputed
from fairchem_scd.errors import ConfigError
from tests.denoising.support import clusters, gradients, models, plan_of, stirred

CPU = torch.device("cpu")
CASES = {
    "beside labels": ({}, True),
    "pre-training": ({}, False),
    "told forces too": ({"condition": ["self", "forces"]}, True),
    "a clean pass without an embedding": ({"condition": []}, True),
    "a mask token, which changes the blocks in the clean pass": ({"null_condition": "mask_token"}, True),
    "an embedding without a gradient, beside labels": ({"stop_gradient_condition": True}, True),
    "subsets": ({"embed_tags": [0], "denoise_tags": [2]}, True),
    "subsets, pre-training": ({"embed_tags": [0], "denoise_tags": [2]}, False),
}


def model_and_plans(settings, supervised=True, batch=None):
    """A model, and the plan of a step as it is without the setting and with it."""
    model = stirred(models({"scd": {**settings, "recompute_clean_pass": True}}, supervised)[1])
    plan, _ = plan_of(model, clusters() if batch is None else batch, step=3)
    return model, Plan("scd", tuple(replace(run, recompute=False) for run in plan.passes)), plan


def assert_same(first, second):
    (out, slopes), (out_again, slopes_again) = first, second
    for key, value in out.items():
        assert torch.equal(out_again[key], value), key
    for key, value in slopes.items():
        assert torch.equal(slopes_again[key], value) if value is not None else slopes_again[key] is None, key


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "supervised"), CASES.values(), ids=CASES)
def test_outputs_and_gradients_are_the_same_to_the_bit(settings, supervised):
    model, kept, plan = model_and_plans(settings, supervised)
    assert [run.recompute for run in plan.passes] == [True] * (len(plan.passes) - 1) + [False]
    first = gradients(model, clusters(), kept)
    assert any(slope is not None and slope.any() for slope in first[1].values())
    assert_same(first, gradients(model, clusters(), plan))
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_random_numbers_of_the_pass_are_drawn_again_and_those_after_it_are_not_moved():
    model, kept, plan = model_and_plans({})
    for block in model.backbone.blocks:
        block.norm = torch.nn.Sequential(block.norm, torch.nn.Dropout(0.5))
    results, after = [], []
    for each in (kept, plan):
        torch.manual_seed(0)
        results.append(gradients(model, clusters(), each))
        after.append(torch.rand(4))
    assert_same(*results)
    assert torch.equal(*after)


def test_autocast_is_that_of_the_forward():
    model, kept, plan = model_and_plans({})

    def step(each):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(clusters(), each)
        sum(value.float().square().sum() for value in out.values()).backward()  # as trainers do, outside of it
        return out, {name: p.grad for name, p in model.named_parameters()}

    assert_same(step(kept), step(plan))
    assert not torch.equal(step(plan)[0]["energy"], model(clusters(), plan)["energy"])  # it was on


def test_what_is_written_into_the_batch_before_backward_has_no_influence():
    model, kept, plan = model_and_plans({})
    expected = gradients(model, clusters(), kept)
    model.zero_grad()
    batch = clusters()
    out = model(batch, plan)
    batch.edges = batch.natoms = None
    batch.atomic_numbers = batch.atomic_numbers + 1
    sum(value.square().sum() for value in out.values()).backward()
    assert_same(expected, (out, {name: p.grad for name, p in model.named_parameters()}))


def test_backward_can_be_called_twice_on_a_graph_that_is_kept():
    model, _, plan = model_and_plans({})
    loss = sum(value.square().sum() for value in model(clusters(), plan).values())
    weights = [p for p in model.parameters() if p.requires_grad]
    once = torch.autograd.grad(loss, weights, retain_graph=True)
    assert all(map(torch.equal, once, torch.autograd.grad(loss, weights)))


def test_a_derivative_inside_the_function_runs_it_no_further_time():
    weight, x, runs = torch.tensor([0.3, -0.2], requires_grad=True), torch.tensor([1.0, 2.0]), []

    def force():
        runs.append(len(runs))
        at = x.clone().requires_grad_()
        energy = ((weight * at).tanh() + at.square() * weight.square()).sum()
        return torch.autograd.grad(energy, at, create_graph=True)[0]

    (expected,) = torch.autograd.grad(force().square().sum(), weight)
    runs.clear()
    found = recomputed(force, CPU)
    assert runs == [0]
    assert torch.equal(torch.autograd.grad(found.square().sum(), weight)[0], expected)
    assert runs == [0, 1]


# --- memory -----------------------------------------------------------------------------------------------------------


class Activations:
    """Which activations of the toy's blocks are alive, by run of the backbone."""

    def __init__(self, model):
        self.runs = []
        self.before_run = lambda: None
        model.backbone.register_forward_pre_hook(self._begin)
        for block in model.backbone.blocks:
            block.filter.register_forward_hook(lambda _, args, out: self.runs[-1].append(self._reference(out)))

    def _begin(self, *_):
        self.before_run()
        self.runs.append([])

    @staticmethod
    def _reference(tensor):
        return StorageWeakRef(tensor.untyped_storage())

    def alive(self, run):
        return [not reference.expired() for reference in self.runs[run]]


@pytest.mark.parametrize("recompute", [True, False])
def test_activations_of_one_pass_are_held_at_a_time(recompute):
    model, kept, plan = model_and_plans({})
    activations = Activations(model)
    out = model(clusters(), plan if recompute else kept)
    assert len(activations.runs) == 2
    assert activations.alive(0) == [not recompute] * 2  # of the clean pass
    assert activations.alive(1) == [True] * 2
    seen = []
    activations.before_run = lambda: seen.append((activations.alive(0), activations.alive(1)))
    sum(value.square().sum() for value in out.values()).backward()
    assert seen == ([([False] * 2, [False] * 2)] if recompute else [])  # at the second run the noisy pass is done with
    assert not any(alive for run in range(len(activations.runs)) for alive in activations.alive(run))


def test_of_a_pass_that_has_no_gradient_nothing_is_run_again():
    """In pre-training with `stop_gradient_condition` the clean pass keeps nothing; without gradients none does."""
    model, _, plan = model_and_plans({"stop_gradient_condition": True}, supervised=False)
    activations = Activations(model)
    gradients(model, clusters(), plan)
    assert len(activations.runs) == 2
    model, _, plan = model_and_plans({})
    activations = Activations(model)
    with torch.no_grad():
        model(clusters(), plan)
    assert len(activations.runs) == 2


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_model_that_does_not_compute_the_same_twice_is_told_so_in_backward():
    model, _, plan = model_and_plans({})
    first, calls = model.backbone.blocks[0], []

    def now_and_then(module, args, out):
        calls.append(1)
        return tuple(value * value.exp() for value in out) if len(calls) > 2 else None

    first.register_forward_hook(now_and_then)
    out = model(copy.deepcopy(clusters()), plan)
    with pytest.raises(RuntimeError, match=r"recompute_clean_pass: .*tensors were saved.* Set recompute_clean_pass to"):
        out[NOISE].sum().backward()


def test_where_there_is_no_clean_pass_the_setting_is_refused():
    block = {"scd": {"condition": ["forces"], "recompute_clean_pass": True}}
    model_and_plans({"condition": ["forces"]})  # beside labels there is one
    with pytest.raises(ConfigError, match="recompute_clean_pass: there is no clean pass"):
        models(block, supervised=False)[1].denoising_tasks["scd"].check((), ())
