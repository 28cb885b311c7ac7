"""Self-conditioned denoising: what a condition does to the model, and that without one nothing is left of it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from fairchem.core.models.equiformer_v2.equiformer_v2 import EquiformerV2Backbone
from fairchem.core.models.escn.escn import eSCN

from fairchem_scd.denoising.conditions import ConditionHead
from fairchem_scd.denoising.plan import NOISE, VALIDATION, Pass, Plan
from fairchem_scd.denoising.structures import structures_of
from fairchem_scd.denoising.tasks import build_tasks
from fairchem_scd.errors import ConfigError
from fairchem_scd.testing import collate, run, stirred, with_conditioned
from tests.support.models import BACKBONES, fixed_edge_frames, plain_and_denoising

RESOLUTIONS = [
    ("equiformer_v2", {"norm_type": "rms_norm_sh"}),
    ("escn", {"lmax_list": [2, 1], "mmax_list": [2, 1]}),
]


@pytest.fixture(autouse=True)
def _fixed_frames(monkeypatch):
    """Edge frames are random in the host: two passes would use other random numbers than one."""
    for backbone in (EquiformerV2Backbone, eSCN):
        monkeypatch.setattr(backbone, "_init_edge_rot_mat", fixed_edge_frames)


def models(name, options=None, **settings):
    """The host's plain model and ours with SCD, in training mode."""
    plain, ours = plain_and_denoising(name, {"scd": settings}, **(options or {}))
    return plain.train(), ours.train()


def task_of(supervised=True, **settings):
    return build_tasks({"scd": settings}, supervised)[0]["scd"]


def plan_of(batch, supervised=True, *, seed=0, step=VALIDATION, **settings):
    """The plan of a step, and its corruption. In validation every structure is told its embedding."""
    task, structures = task_of(supervised, **settings), structures_of(batch)
    corruption = task.corrupt(structures, seed=seed, step=step)
    return Plan("scd", task.passes(structures, corruption, seed=seed, step=step)), corruption


# --- no condition, no trace ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), RESOLUTIONS)
def test_with_these_options_too_a_condition_that_is_not_told_leaves_no_trace(name, options, rows):
    """As is claimed of every backbone. A condition that is told changes nothing at initialisation; later it does."""
    plain, model = models(name, options)
    batch = collate(rows[:3])
    plan, _ = plan_of(batch)
    first, last = plan.passes
    assert torch.equal(run(model, batch, plan)[NOISE], run(model, batch, with_conditioned(plan, False))[NOISE])
    stirred(model)
    alone = run(model, batch, Plan("scd", (replace(first, embed=False), replace(last, conditioned=None))))
    dropped = run(model, batch, with_conditioned(plan, False))
    assert torch.equal(dropped[NOISE], alone[NOISE])
    assert (run(model, batch, plan)[NOISE] - dropped[NOISE]).abs().max() > 1e-3 * dropped[NOISE].abs().max()
    # The conditioned pass's own outputs are the host's when nothing is told.
    corrupted = copy.deepcopy(batch)
    corrupted.pos = last.pos
    silent = replace(last, outputs=True, conditioned=torch.zeros_like(last.conditioned))
    outputs = run(model, batch, Plan("scd", (first, silent)))
    for key, value in run(plain, corrupted).items():
        assert torch.equal(outputs[key], value), key
    # And the clean pass's are, whatever follows it.
    for key, value in run(plain, batch).items():
        assert torch.equal(dropped[key], value), key
        assert torch.equal(run(model, batch)[key], value), key


def test_each_structure_of_a_batch_is_told_or_not_for_itself(rows):
    model = stirred(models("equiformer_v2")[1])
    batch = collate(rows[:2])
    plan, _ = plan_of(batch)
    both, none = (
        run(model, batch, with_conditioned(plan, True))[NOISE],
        run(model, batch, with_conditioned(plan, False))[NOISE],
    )
    last = replace(plan.passes[-1], conditioned=torch.tensor([True, False]))
    mixed = run(model, batch, replace(plan, passes=(plan.passes[0], last)))[NOISE]
    n = int(batch.natoms[0])
    torch.testing.assert_close(mixed[:n], both[:n], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mixed[n:], none[n:], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(mixed[:n], none[:n], rtol=1e-2)


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_gradients_reach_the_clean_pass_through_the_embedding_and_are_cut_where_asked(name, rows):
    """Against central differences along a random direction of the backbone's weights."""
    _, model = models(name)
    stirred(model).eval()
    with torch.no_grad():
        for block in model.denoising["scd"]["modulation"].blocks:
            block.mlp[0].weight[:, model.adapter.scalar_channels :] = 0  # sg(x̂) has a slope, but by design no gradient
        if name == "escn":
            model.backbone.sphere_embedding.weight *= 1000  # its first features are too small for float32 differences
            for head in ("fc1", "fc2", "fc3"):
                getattr(model.denoising["scd"]["noise_head"].force_block, head).weight *= 3
    batch = collate(rows[:2])
    weights = [p for n, p in model.backbone.named_parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(3)
    direction = [p.detach() * torch.randn(p.shape, generator=generator) for p in weights]
    probe = torch.randn(len(batch.pos), 3, generator=generator)

    def shifted(step):
        with torch.no_grad():
            for p, d in zip(weights, direction, strict=True):
                p += step * d

    def value(plan, embedding=None):
        """What the condition changes in the noise: the clean pass's embedding, or a given one."""
        with pytest.MonkeyPatch.context() as patch:
            if embedding is not None:
                patch.setattr(ConditionHead, "forward", lambda self, *_: embedding)
            noise, without = (run(model, batch, each)[NOISE] for each in (plan, with_conditioned(plan, False)))
        return ((noise - without) * probe).sum()

    def difference(*arguments, step=1e-3):
        values = []
        for sign in (1, -1):
            shifted(sign * step)
            with torch.no_grad():
                values.append(float(value(*arguments)))
            shifted(-sign * step)
        return (values[0] - values[1]) / (2 * step)

    slopes, differences = {}, {}
    for stop in (False, True):
        plan, _ = plan_of(batch, supervised=False, std_reg=0, stop_gradient_condition=stop)
        gradients = torch.autograd.grad(value(plan), weights, allow_unused=True)
        slopes[stop] = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True) if g is not None)
        differences[stop] = difference(plan, model.embed(batch).detach() if stop else None)
    scale = max(abs(slope) for slope in slopes.values())
    for stop in slopes:
        assert abs(slopes[stop] - differences[stop]) < 0.02 * scale, (slopes, differences)
    # The part through the embedding, by itself.
    through, expected = slopes[False] - slopes[True], differences[False] - differences[True]
    assert abs(through - expected) < 0.1 * abs(through), (slopes, differences)


@pytest.mark.parametrize("supervised", [True, False])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("equiformer_v2", {"condition": ["self", "forces"]}),
        ("equiformer_v2", {"stop_gradient_condition": True}),
        ("equiformer_v2", {"null_condition": "mask_token", "condition_drop": 0.5}),
        # An adsorbate of two atoms alone would have one neighbour an atom, and attention weights without a gradient.
        ("equiformer_v2", {"embed_tags": [2], "denoise_tags": [0, 1]}),
        ("equiformer_v2", {"condition": []}),
    ],
)
def test_everything_that_trains_has_a_gradient_in_every_step_and_not_zero_where_used(name, settings, supervised, rows):
    block = {"scd": {"prob": 0.5, **settings}, "noisy_nodes": {"prob": 0.5}}
    plain, model = plain_and_denoising(name, block)
    stirred(model.train())
    batch = collate([row for row in rows if int((row.tags == 2).sum()) == 2][:3])
    # Some host parameters have no influence by construction, such as the l = 0 bias of a vector head.
    plain.train()
    sum(value.square().sum() for value in run(plain, batch).values()).backward()
    idle = {n for n, p in plain.named_parameters() if p.grad is not None and not p.grad.any()}
    heads = {n.removeprefix("output_heads.forces.") for n in idle}
    plans = (plan_of(batch, supervised, step=step, **settings)[0] for step in range(1, 100))
    # A step with and without a condition.
    plan = next(
        p for p in plans if p.passes[-1].conditioned is None or len(set(p.passes[-1].conditioned.tolist())) == 2
    )
    sum(value.square().sum() for value in run(model, batch, plan).values()).backward()
    for key, p in model.named_parameters():
        if not p.requires_grad:
            continue
        assert p.grad is not None, key
        if "noisy_nodes" in key or (key.startswith("output_heads") and not supervised):
            assert not p.grad.any(), key
        elif key not in idle and key.split("noise_head.")[-1] not in heads:
            assert p.grad.any(), key


def test_an_embedding_of_a_part_does_not_see_the_rest(rows):
    _, model = models("equiformer_v2", embed_tags=[2])
    model.eval()
    batch = collate([row for row in rows if int((row.tags == 2).sum()) == 2][:2])
    moved = copy.deepcopy(batch)
    moved.pos = batch.pos + 0.2 * (batch.tags != 2)[:, None] * torch.randn(len(batch.pos), 3)
    with torch.no_grad():
        torch.testing.assert_close(model.embed(moved), model.embed(batch), rtol=1e-4, atol=1e-5)
        moved.pos = batch.pos + 0.2 * (batch.tags == 2)[:, None] * torch.randn(len(batch.pos), 3)
        assert not torch.allclose(model.embed(moved), model.embed(batch), rtol=1e-3)


@pytest.mark.parametrize("name", BACKBONES)
def test_parts_of_two_structures_do_not_see_each_other(name, rows):
    settings = {"embed_tags": [0, 1], "denoise_tags": [2]}
    model = stirred(models(name, **settings)[1]).eval()
    pair = [row for row in rows if int((row.tags == 2).sum()) == 2][:2]  # a single atom has nothing to denoise
    whole = collate(pair)
    with torch.no_grad():
        together = run(model, whole, plan_of(whole, **settings)[0])
        alone = [run(model, b, plan_of(b, **settings)[0]) for b in (collate([row]) for row in pair)]
        # What the second structure is does not matter to the first.
        other = collate([pair[0], rows[-1]])
        mixed = run(model, other, plan_of(other, **settings)[0])
    assert together[NOISE].any()
    for key in together:
        scale = float(together[key].abs().max())
        torch.testing.assert_close(together[key], torch.cat([out[key] for out in alone]), atol=1e-4 * scale, rtol=1e-4)
        count = len(alone[0][key])
        torch.testing.assert_close(mixed[key][:count], alone[0][key], atol=1e-4 * scale, rtol=1e-4)


# --- parts of a structure --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_an_adsorbate_is_denoised_as_a_graph_of_its_own_under_its_slab(name, rows):
    """The noise is that of the model on the adsorbate alone, told the embedding of the slab alone."""
    settings = {"embed_tags": [0, 1], "denoise_tags": 2, "std_reg": 0}
    model = stirred(models(name, **settings)[1]).eval()
    row = next(row for row in rows if int((row.tags == 2).sum()) == 2)
    batch = collate([row])
    plan, corruption = plan_of(batch, supervised=False, **settings)
    assert corruption.mask.equal(batch.tags == 2)
    assert corruption.noise.sum(dim=0).abs().max() < 1e-6, "a part that moves as a whole cannot know by how much"

    def part(pos, chosen):
        out = copy.deepcopy(row)
        for key in ("atomic_numbers", "fixed", "tags", "forces"):
            out[key] = row[key][chosen]
        out.pos, out.natoms = pos[chosen], int(chosen.sum())
        return collate([out])

    slab = part(row.pos, row.tags != 2)
    adsorbate = part(row.pos + corruption.noise, row.tags == 2)
    with torch.no_grad():
        found = run(model, batch, plan)[NOISE]
        embedding = model.embed(slab)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ConditionHead, "forward", lambda self, *_: embedding)
            passes = (Pass(adsorbate.pos, outputs=False, embed=True),)
            passes += (Pass(adsorbate.pos, conditioned=torch.tensor([True]), outputs=False, noise=True),)
            expected = run(model, adsorbate, Plan("scd", passes))[NOISE]
    scale = float(expected.abs().max())
    torch.testing.assert_close(found[batch.tags == 2], expected, atol=1e-4 * scale, rtol=1e-4)
    assert not found[batch.tags != 2].any()


def test_outputs_beside_a_part_come_from_the_whole_structure(rows):
    settings = {"embed_tags": [2], "denoise_tags": [0, 1]}
    plain, model = models("equiformer_v2", **settings)
    batch = collate(rows[:4])
    assert {1, 2} <= set(torch.bincount(batch.batch[batch.tags == 2]).tolist()), "adsorbates of one atom and of two"
    plan, corruption = plan_of(batch, **settings)
    out, expected = run(model, batch, plan), run(plain, batch)
    for key in expected:
        assert torch.equal(out[key], expected[key])
    assert corruption.mask.equal((batch.tags != 2) & (batch.fixed == 0))
    # An adsorbate of one atom would be a graph without edges: it is not embedded, and its slab is told nothing.
    sizes = torch.zeros(4).index_add_(0, batch.batch, (batch.tags == 2).float())
    assert plan.passes[-1].conditioned.equal(sizes > 1)


def test_a_structure_with_one_movable_atom_has_nothing_to_denoise_and_stays_out(rows):
    single = next(row for row in rows if int((row.tags == 2).sum()) == 1)
    batch = collate([single, single])
    settings = {"embed_tags": [0, 1], "denoise_tags": [2]}
    plan, corruption = plan_of(batch, supervised=False, **settings)
    assert not corruption.mask.any()
    _, model = models("equiformer_v2", **settings)
    out = run(model, batch, plan)
    out[NOISE].sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# --- conditions ------------------------------------------------------------------------------------------------------


def test_both_conditions_are_heard(rows):
    settings = {"condition": ["self", "forces"]}
    model = stirred(models("equiformer_v2", **settings)[1])
    batch = collate(rows[:2])
    plan, _ = plan_of(batch, **settings)
    last = plan.passes[-1]
    without = {
        "forces": replace(last, encoding=None),
        "self": replace(last, conditioned=torch.zeros_like(last.conditioned)),
    }
    whole = run(model, batch, plan)[NOISE]
    for what, changed in without.items():
        out = run(model, batch, replace(plan, passes=(plan.passes[0], changed)))[NOISE]
        assert (out - whole).abs().max() > 1e-3 * whole.abs().max(), what


def test_without_a_self_condition_nothing_is_embedded(rows):
    assert len(plan_of(collate(rows[:1]), supervised=False, condition=[])[0].passes) == 1
    assert set(models("escn", condition=[])[1].denoising["scd"]) == {"noise_head"}


@pytest.mark.parametrize(("name", "options"), [("equiformer_v2", {}), ("escn", {})])
def test_a_mask_token_stands_for_the_condition_in_every_pass(name, options, rows):
    """The authors' form: it is told in plain passes too, so the model is not the host's."""
    plain, model = models(name, options, null_condition="mask_token")
    stirred(model)
    batch = collate(rows[:2])
    plan, _ = plan_of(batch, null_condition="mask_token")
    first, last = plan.passes
    expected = run(model, batch, Plan("scd", (replace(first, embed=False),)))
    out = run(model, batch)
    for key in out:
        assert torch.equal(out[key], expected[key])
        assert not torch.allclose(out[key], run(plain, batch)[key], rtol=1e-3)
    dropped = run(model, batch, with_conditioned(plan, False))[NOISE]
    absent = run(model, batch, Plan("scd", (first, replace(last, conditioned=None))))[NOISE]
    assert torch.equal(dropped, absent)
    with torch.no_grad():
        model.denoising["scd"]["condition_head"].mask_token.normal_()
    assert not torch.allclose(run(model, batch, with_conditioned(plan, False))[NOISE], dropped, rtol=1e-3)


# --- settings and adapters -------------------------------------------------------------------------------------------


def test_a_backbone_whose_adapter_cannot_modulate_is_refused_by_name():
    from fairchem_scd import DenoisingHydra
    from fairchem_scd.denoising.adapter import _ADAPTERS
    from fairchem_scd.fairchem1.backbones import ESCNAdapter, Fairchem1Adapter, register_adapter
    from tests.support.models import hydra_arguments

    class Bare(Fairchem1Adapter):
        host_class, names = ESCNAdapter.host_class, ESCNAdapter.names
        encoding_spec, vector_head, encoded = (
            ESCNAdapter.encoding_spec,
            ESCNAdapter.vector_head,
            ESCNAdapter.encoded,
        )

    register_adapter(Bare)
    try:
        with pytest.raises(ConfigError, match=r"Bare, the adapter of escn_backbone, does not say how to embed"):
            DenoisingHydra(denoising={"scd": {}}, **hydra_arguments("escn"))
        DenoisingHydra(denoising={"dens": {}, "scd": {"condition": []}}, **hydra_arguments("escn"))
    finally:
        _ADAPTERS[ESCNAdapter.host_class] = ESCNAdapter
