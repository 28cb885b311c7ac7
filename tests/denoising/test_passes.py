"""The pass engine on a model in plain torch: what a plan does, and that without one nothing of it is left."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from fairchem_scd.denoising.passes import atom_features, embed, frozen_in_pretraining
from fairchem_scd.denoising.plan import NOISE, Pass, Plan
from fairchem_scd.denoising.structures import structures_of
from fairchem_scd.errors import ConfigError
from tests.denoising.support import clusters, gradients, models, plan_of, stirred, with_conditioned

ALL = {"dens": {"prob": 0.25}, "scd": {"prob": 0.5}, "noisy_nodes": {"prob": 0.25}}
SUBSETS = {"scd": {"embed_tags": [0], "denoise_tags": [2], "std_reg": 0}}
BLOCKS = {
    "dens": {"dens": {}},
    "dens with a schedule": {"dens": {"num_steps": 3, "std_low": 0.01, "std_high": 0.1, "sigma_encoding": True}},
    "dens without forces": {"dens": {"force_encoding": False}},
    "scd": {"scd": {}},
    "scd with forces": {"scd": {"condition": ["self", "forces"], "noise_scale": "running"}},
    "scd without a condition": {"scd": {"condition": []}},
    "scd of subsets": SUBSETS,
    "noisy nodes": {"noisy_nodes": {}},
}


def model_of(block, supervised=True):
    return models(block, supervised)[1]


def run(model, batch, *plan):
    return model(copy.deepcopy(batch), *plan)


# --- no condition, no trace -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_without_a_plan_the_model_is_the_plain_one_bit_for_bit(training):
    plain, model = models(ALL)
    plain.train(training), stirred(model).train(training)
    expected, expected_gradients = gradients(plain, clusters())
    out, found = gradients(model, clusters())
    assert set(out) == set(expected)
    assert all(torch.equal(out[key], value) for key, value in expected.items())
    assert all(torch.equal(found[key], value) for key, value in expected_gradients.items())
    added = [value for key, value in found.items() if key not in expected_gradients]
    assert added
    assert all(value is not None and not value.any() for value in added) if training else added == [None] * len(added)


@pytest.mark.parametrize("after_training", [True, False])
def test_a_dropped_or_absent_condition_is_the_plain_backbone(after_training):
    plain, model = models({"scd": {}})
    if after_training:
        stirred(model)
    batch = clusters()
    plan, _ = plan_of(model, batch)
    first, last = plan.passes
    absent = run(model, batch, with_conditioned(plan, None))
    dropped = run(model, batch, with_conditioned(plan, False))
    assert torch.equal(dropped[NOISE], absent[NOISE])
    outputs = run(model, batch, Plan("scd", (first, replace(with_conditioned(plan, False).passes[-1], outputs=True))))
    corrupted = copy.deepcopy(batch)
    corrupted.pos = last.pos
    for key, value in plain(corrupted).items():
        assert torch.equal(outputs[key], value)
    for key, value in plain(copy.deepcopy(batch)).items():  # of the clean pass, whatever follows it
        assert torch.equal(run(model, batch, plan)[key], value)


def test_a_mask_token_stands_for_the_condition_in_every_pass():
    """The authors' form: it is told in plain passes and in those of other tasks too, so the model is not the host's."""
    plain, model = models({"scd": {"null_condition": "mask_token", "prob": 0.5}, "dens": {}})
    stirred(model)
    batch = clusters()
    plan, _ = plan_of(model, batch, "scd")
    first, last = plan.passes
    out, expected = run(model, batch), run(model, batch, Plan("scd", (replace(first, embed=False),)))
    for key, value in plain(copy.deepcopy(batch)).items():
        assert torch.equal(out[key], expected[key])
        assert not torch.allclose(out[key], value, rtol=1e-3)
    dropped = run(model, batch, with_conditioned(plan, False))[NOISE]
    assert torch.equal(dropped, run(model, batch, Plan("scd", (first, replace(last, conditioned=None))))[NOISE])
    dens, _ = plan_of(model, batch, "dens", step=1)
    before = run(model, batch, dens)[NOISE]
    with torch.no_grad():
        model.denoising["scd"]["condition_head"].mask_token.normal_()
    assert not torch.allclose(run(model, batch, with_conditioned(plan, False))[NOISE], dropped, rtol=1e-3)
    assert not torch.allclose(run(model, batch, dens)[NOISE], before, rtol=1e-3)
    assert not torch.allclose(atom_features(model, batch, model.adapter), plain.backbone(batch)["node_embedding"])


def test_hooks_are_gone_after_a_pass_even_when_it_fails():
    model = model_of({"scd": {"condition": ["self", "forces"]}})
    batch = clusters()
    plan, _ = plan_of(model, batch)
    broken = copy.deepcopy(batch)
    broken.atomic_numbers = broken.atomic_numbers + 1000
    with pytest.raises(IndexError):
        model(broken, plan)
    run(model, batch, plan)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


# --- what passes do ---------------------------------------------------------------------------------------------------


# DeNS trains noise in the place of forces: it needs labels.
CASES = {
    f"{name}, {'beside labels' if supervised else 'alone'}": (block, supervised)
    for name, block in BLOCKS.items()
    for supervised in (True, False)
    if supervised or "dens" not in block
}


@pytest.mark.parametrize(("block", "supervised"), CASES.values(), ids=CASES)
def test_every_parameter_has_a_gradient_in_a_step_and_not_zero_where_it_is_used(block, supervised):
    (task,) = block
    others = {name: {"prob": 0} for name in ALL if name != task}
    model = stirred(model_of({**others, **block}, supervised))
    batch = clusters()
    plans = [plan_of(model, batch, task, step=step)[0] for step in range(1, 100)]
    # A step in which some structures are told their embedding and some are not, where any are.
    told = [None if p.passes[-1].conditioned is None else p.passes[-1].conditioned.tolist() for p in plans]
    plan = next(p for p, each in zip(plans, told, strict=True) if each is None or set(each) == {True, False})
    _, found = gradients(model, batch, plan)
    for name, gradient in found.items():
        assert gradient is not None, name
        of_another = name.startswith("denoising.") and not name.startswith(f"denoising.{task}.")
        if of_another or (name.startswith("output_heads") and not supervised):
            assert not gradient.any(), name
        else:
            assert gradient.any(), name


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_outputs_come_from_their_pass_and_the_batch_stays_as_it_is(block):
    plain, model = models(block)
    batch = clusters()
    keys = set(vars(batch))
    plan, corruption = plan_of(model, batch, step=1)
    out = model(batch, plan)
    assert set(vars(batch)) == keys
    assert all(
        torch.equal(value, vars(batch)[key]) for key, value in vars(clusters()).items() if torch.is_tensor(value)
    )
    assert set(out) == {"energy", "forces", NOISE}
    assert out[NOISE].shape == corruption.noise.shape
    seen = copy.deepcopy(batch)
    if "scd" not in block:  # whose outputs are of the clean structure
        seen.pos = batch.pos + corruption.noise
    expected = plain(seen)
    hears_forces = model.denoising_tasks[plan.task].conditions_on_forces and "scd" not in block
    for key, value in expected.items():
        assert torch.equal(out[key], value) != hears_forces, key


def test_the_embedding_of_a_structure_reaches_that_structure_alone():
    model = stirred(model_of({"scd": {}}))
    batch = clusters()
    plan, _ = plan_of(model, batch)
    first, last = plan.passes
    moved = first.pos.clone()
    moved[0] += 0.3  # an atom of the first structure, in the pass that embeds
    before, after = (
        run(model, batch, Plan("scd", (replace(first, pos=pos), last)))[NOISE] for pos in (first.pos, moved)
    )
    n = int(batch.natoms[0])
    assert (after - before)[:n].abs().max() > 1e-3 * before.abs().max()
    assert torch.equal(after[n:], before[n:])


def test_a_later_pass_is_told_the_latest_embedding():
    model = stirred(model_of({"scd": {}}))
    batch = clusters()
    plan, _ = plan_of(model, batch)
    first, last = plan.passes
    earlier = replace(first, pos=first.pos + torch.randn(first.pos.shape), outputs=False)
    out = run(model, batch, Plan("scd", (earlier, first, last)))
    assert torch.equal(out[NOISE], run(model, batch, plan)[NOISE])


def test_an_embedding_can_be_cut_off_from_the_pass_that_made_it():
    batch = clusters()
    slopes = {}
    for cut in (False, True):
        model = stirred(model_of({"scd": {"std_reg": 0, "stop_gradient_condition": cut}}, supervised=False))
        plan, _ = plan_of(model, batch)
        first, last = plan.passes
        pos = first.pos.clone().requires_grad_()
        run(model, batch, Plan("scd", (replace(first, pos=pos), last)))[NOISE].square().sum().backward()
        slopes[cut] = pos.grad
        assert all(p.grad is not None for p in model.parameters())
    assert slopes[False].any()
    assert slopes[True] is None


def test_a_subset_is_a_graph_of_its_own_under_the_embedding_of_another():
    model = stirred(model_of(SUBSETS, supervised=False))
    batch = clusters()
    plan, corruption = plan_of(model, batch)
    found = run(model, batch, plan)[NOISE]
    assert torch.equal(corruption.mask, batch.tags == 2)
    assert not found[batch.tags != 2].any()

    def only(chosen, pos):
        part = copy.deepcopy(batch)
        part.pos, part.atomic_numbers, part.batch = pos[chosen], batch.atomic_numbers[chosen], batch.batch[chosen]
        part.natoms = torch.bincount(part.batch)
        return part

    embedded, denoised = only(batch.tags == 0, batch.pos), only(batch.tags == 2, batch.pos + corruption.noise)
    condition = model.denoising["scd"].condition
    scalars = model.backbone(embedded)["node_embedding"]
    c = condition.embed(scalars, embedded.batch, 3)
    torch.testing.assert_close(model.embed(copy.deepcopy(batch)), c)
    with model.adapter.in_pass(condition.bind(c, torch.ones(3, dtype=torch.bool), denoised.batch), ()):
        expected = model.denoising["scd"]["noise_head"](denoised, model.backbone(denoised))["forces"]
    torch.testing.assert_close(found[batch.tags == 2], expected)


def test_forces_are_heard_on_corrupted_atoms_alone():
    model = stirred(model_of({"dens": {}}))
    batch = clusters()
    plan, corruption = plan_of(model, batch, step=2)
    (only,) = plan.passes
    assert corruption.mask.any()
    assert not corruption.mask.all()

    def noise(forces):
        return run(model, batch, Plan("dens", (replace(only, encoding=(forces, *only.encoding[1:])),)))[NOISE]

    forces = batch.forces
    others = torch.where(corruption.mask[:, None], forces, torch.randn(forces.shape))
    assert torch.equal(noise(others), noise(forces))
    assert not torch.allclose(noise(-forces), noise(forces), rtol=1e-2)
    none = run(model, batch, Plan("dens", (replace(only, encoding=None),)))
    silent = replace(only, encoding=(forces, torch.zeros_like(corruption.mask), only.encoding[2]))
    assert torch.equal(run(model, batch, Plan("dens", (silent,)))[NOISE], none[NOISE])


# --- embeddings, pre-training -----------------------------------------------------------------------------------------


def test_where_there_is_no_atom_to_embed_the_embedding_is_zero():
    model = model_of({"scd": {"embed_tags": [2]}})
    batch = clusters()
    batch.tags[batch.batch == 1] = 0
    batch.tags[(batch.batch == 2).nonzero()[0, 0] + 3] = 0  # one atom: a graph without edges
    made = model.embed(copy.deepcopy(batch))
    assert made[0].any()
    assert not made[1:].any()
    batch.tags[:] = 0
    assert not model.embed(batch).any()


def test_a_model_without_a_condition_cannot_embed():
    model = model_of({"dens": {}})
    with pytest.raises(ConfigError, match="no condition head"):
        embed(model, clusters(), structures_of(clusters()))


@pytest.mark.parametrize("form", ["identity", "mask_token"])
def test_pre_training_freezes_element_embeddings_heads_and_a_mask_token(form):
    model = model_of({"scd": {"null_condition": form}}, supervised=False)
    frozen = {id(p) for p in frozen_in_pretraining(model)}
    names = {name for name, p in model.named_parameters() if id(p) in frozen}
    expected = {"backbone.elements.weight", *(f"output_heads.{n}" for n, _ in model.output_heads.named_parameters())}
    token = {"denoising.scd.condition_head.mask_token"} if form == "mask_token" else set()
    assert names == expected | token


def test_a_plan_may_have_any_passes():
    """Two passes with the user's heads: the later one's outputs are returned."""
    model = model_of({"noisy_nodes": {}})
    batch = clusters()
    other = batch.pos + 0.1 * torch.randn(batch.pos.shape)
    out = run(model, batch, Plan("noisy_nodes", (Pass(batch.pos), Pass(other))))
    moved = copy.deepcopy(batch)
    moved.pos = other
    assert set(out) == {"energy", "forces"}
    assert torch.equal(out["energy"], run(model, moved)["energy"])
