"""GemNet-T, GemNet-OC and DimeNet++: backbones whose edges have features, and whose atoms no vectors."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from fairchem.core.common.registry import registry
from fairchem.core.models.base import HydraModel
from fairchem.core.modules.scaling import ScaleFactor

from fairchem_scd import ConfigError
from fairchem_scd.denoising.edge_vector import EdgeVectorHead
from fairchem_scd.denoising.plan import NOISE, Plan
from fairchem_scd.fairchem1 import checkpoint
from fairchem_scd.fairchem1.legacy import hydra_key, to_hydra
from fairchem_scd.testing import (
    SCD,
    collate,
    gradients,
    make_trainer,
    plan_of,
    rotation,
    run,
    self_supervised,
    slabs,
    stirred,
    training_config,
)
from tests.support.claims import (
    GEMNET_OC_GRADIENT,
    GEMNET_OC_HEADS,
    ConservativeGemNetOC,
    ConservativeGemNetT,
    DimeNetPlusPlus,
    GemNetOC,
    GemNetT,
)
from tests.support.runs import folder_of

CLAIMS = {
    "gemnet_t": GemNetT(),
    "gemnet_t conservative": ConservativeGemNetT(),
    "gemnet_oc": GemNetOC(),
    "gemnet_oc conservative": ConservativeGemNetOC(),
    "dimenetplusplus": DimeNetPlusPlus(),
}


# --- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemnet_t conservative", "gemnet_oc conservative", "dimenetplusplus"])
def test_energies_alone_train_with_denoising_and_no_derivatives(name, tmp_path):
    claims = CLAIMS[name]
    config = claims.config(tmp_path, {"scd": {"prob": 0.5}, "noisy_nodes": {"prob": 0.5}})
    config["model"]["backbone"]["regress_forces"] = False
    config.update(outputs={"energy": {"level": "system"}}, loss_functions=[{"energy": {"fn": "mae", "coefficient": 1}}])
    config["evaluation_metrics"] = {"primary_metric": "energy_mae", "metrics": {"energy": ["mae"]}}
    trainer = make_trainer(config, tmp_path)
    trainer.train(disable_eval_tqdm=True)
    assert trainer.step == 2
    assert not trainer._unwrapped_model.adapter.conservative


@pytest.mark.parametrize("name", ["gemnet_t", "gemnet_oc"])
def test_direct_forces_without_their_head_are_refused(name):
    claims = CLAIMS[name]
    heads = {"energy": claims.heads["energy"]}
    with pytest.raises(ConfigError, match=r"direct_forces is true.*set it to false"):
        to_hydra({"name": "hydra", "backbone": dict(claims.backbone), "heads": heads})


def test_quadruplets_in_a_conservative_model_are_warned_of(caplog):
    backbone = {**GEMNET_OC_GRADIENT, "quad_interaction": True}
    to_hydra({"name": "hydra", "backbone": backbone, "heads": {"energy": GEMNET_OC_HEADS["energy"]}})
    assert "quad_interaction" in caplog.text


# --- the head ---------------------------------------------------------------------------------------------------------


def test_the_head_on_edges_turns_and_knows_no_order():
    torch.manual_seed(0)
    head, turn = EdgeVectorHead(6), rotation()
    features, directions, targets = torch.randn(20, 6), torch.randn(20, 3), torch.randint(0, 5, (20,))
    data = type("Data", (), {"pos": torch.zeros(6, 3)})()

    def vectors(edges: torch.Tensor, turned: torch.Tensor = directions) -> torch.Tensor:
        emb = {"edge_embedding": features[edges], "edge_vec": turned[edges], "edge_idx": targets[edges]}
        return head(data, emb)["vectors"]

    expected = vectors(torch.arange(20))
    assert expected[:5].any(dim=1).all()
    assert not expected[5].any()  # it has no edges
    torch.testing.assert_close(vectors(torch.arange(20), directions @ turn), expected @ turn)
    torch.testing.assert_close(vectors(torch.randperm(20)), expected)
    (scale,) = head(data, {"edge_embedding": features.half(), "edge_vec": directions, "edge_idx": targets}).values()
    torch.testing.assert_close(scale, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["gemnet_t", "gemnet_oc conservative", "dimenetplusplus"])
def test_edges_of_the_head_are_those_of_the_hosts_graph_from_source_to_target(name):
    claims = CLAIMS[name]
    model, batch = claims.ours({"noisy_nodes": {}}), claims.batch(2)
    seen = {}
    model.denoising["noisy_nodes"]["noise_head"].register_forward_hook(lambda m, args, out: seen.update(args[1]))
    run(model, batch, plan_of(batch, {"noisy_nodes": {}})[0])
    plan, _ = plan_of(batch, {"noisy_nodes": {}})
    batch.pos = plan.passes[0].pos
    kinds = {"gemnet_oc conservative": {"cutoff": 4.0, "max_neighbors": 300}}.get(name, {})
    graph = model.backbone.generate_graph(batch, **kinds)
    expected = torch.cat([-graph.edge_distance_vec / graph.edge_distance[:, None], graph.edge_index[1][:, None]], dim=1)
    found = torch.cat([seen["edge_vec"].detach(), seen["edge_idx"][:, None]], dim=1)
    assert len(found) == len(expected)
    distance = torch.cdist(found, expected)
    assert float(distance.min(dim=0).values.max()) < 1e-3
    assert float(distance.min(dim=1).values.max()) < 1e-3


# --- what the adapters say --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLAIMS)
def test_elements_beyond_the_table_are_known(name):
    model = CLAIMS[name].ours(SCD)
    batch, highest = CLAIMS[name].batch(1), model.adapter.max_num_elements - 1
    batch.atomic_numbers[:] = highest
    assert run(model, batch)["energy"].isfinite().all()
    batch.atomic_numbers[:] = highest + 1
    with pytest.raises(IndexError):
        run(model, batch)


@pytest.mark.parametrize("name", CLAIMS)
def test_features_are_those_that_are_embedded_and_have_no_graph_of_the_energy(name):
    model, batch = CLAIMS[name].ours(SCD).eval(), CLAIMS[name].batch()
    model.requires_grad_(False)
    features = model.features(copy.deepcopy(batch))
    assert features.shape == (len(batch.pos), model.adapter.scalar_channels)
    assert not features.requires_grad
    expected = model.denoising["scd"]["condition_head"](features, batch.batch, len(batch.natoms))
    assert torch.equal(model.embed(copy.deepcopy(batch)), expected)
    assert features.std(dim=0).min() > 1e-3


@pytest.mark.parametrize("name", CLAIMS)
def test_outputs_are_not_computed_where_nobody_reads_them(name):
    model, batch = CLAIMS[name].ours(SCD), CLAIMS[name].batch(1)
    ran = []
    for module in model.adapter.readout():
        for part in module.modules():
            part.register_forward_hook(lambda m, args, out: ran.append(m))
    plan, _ = plan_of(batch, SCD, supervised=False)
    run(model, batch, plan)
    expected = {model.backbone.mlp_rbf_out} if name.startswith("gemnet") else set()
    if name != "gemnet_oc":  # whose noise head reads a part of the same blocks
        weighted = {m for m in ran if list(m.parameters(recurse=False))}
        assert weighted <= {part for m in expected for part in m.modules()}
    ran.clear()
    run(model, batch, plan_of(batch, SCD)[0])
    assert ran


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLAIMS)
def test_parts_are_graphs_of_their_own(name):
    block = {"scd": {"embed_tags": [0, 1], "denoise_tags": [2], "all_atoms": True}}
    model, rows = stirred(CLAIMS[name].ours(block)), slabs(8)
    batch = collate([row for row in rows if int((row.tags == 2).sum()) == 2][:2])
    plan, corruption = plan_of(batch, block)
    assert plan.passes[-1].subset is not None
    out, found = gradients(model, batch, plan)
    assert torch.equal(out[NOISE].any(dim=1), corruption.mask)
    assert all(found[key] is not None for key, p in model.named_parameters() if p.requires_grad)


# --- scale factors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemnet_t", "gemnet_oc"])
def test_a_scale_file_is_read_as_in_the_host_and_its_factors_stay(name, tmp_path):
    claims = CLAIMS[name]
    scales = _scale_factors(claims.plain().backbone)
    values = {key: 0.5 + i / len(scales) for i, key in enumerate(scales)}
    (tmp_path / "scales.json").write_text(json.dumps(values))
    made = type(claims)()
    made.backbone = {**claims.backbone, "scale_file": str(tmp_path / "scales.json")}
    plain, model, batch = made.plain(), stirred(made.ours(SCD)), made.batch()
    plan, _ = plan_of(batch, SCD)
    gradients(model, batch, plan)
    assert _scale_factors(model.backbone) == pytest.approx(values)
    for each in (model(copy.deepcopy(batch)), run(model, batch, plan)):
        for key, value in run(plain, batch).items():
            assert torch.equal(each[key], value), key
    assert not torch.allclose(run(claims.plain(), batch)["forces"], value, rtol=0.1)


def _scale_factors(backbone: torch.nn.Module) -> dict[str, float]:
    """By the names that a scale file has for them."""
    found = {key: module for key, module in backbone.named_modules() if isinstance(module, ScaleFactor)}
    return {module.name or key: float(module.scale_factor) for key, module in found.items()}


# --- gradients of gradients -------------------------------------------------------------------------------------------


@contextmanager
def _float64() -> Iterator[None]:
    """Host and package ask for float32 by name, and as what is usual."""
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double), mock.patch("torch.float", torch.float64):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", [name for name, claims in CLAIMS.items() if "forces" not in claims.heads])
def test_a_step_on_gradient_forces_beside_denoising_has_the_right_slope(name):
    """Against central differences along a random direction of the backbone's weights, in float64."""
    model, batch = stirred(CLAIMS[name].ours(SCD)).eval().double(), CLAIMS[name].batch(2)
    plan, _ = plan_of(batch, SCD)
    plan = Plan(plan.task, tuple(replace(each, pos=each.pos.double()) for each in plan.passes))
    batch = batch.apply(lambda x: x.double() if x.is_floating_point() else x)
    with torch.no_grad():
        for block in model.denoising["scd"]["modulation"].blocks:
            block.mlp[0].weight[:, model.adapter.scalar_channels :] = 0  # sg(x̂) has a slope, but by design no gradient
    generator = torch.Generator().manual_seed(3)
    weights = [p for p in model.backbone.parameters() if p.requires_grad]
    direction = [p.detach() * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in weights]

    def loss() -> torch.Tensor:
        out = run(model, batch, plan)
        return out["energy"].square().sum() + 10 * out["forces"].square().sum() + out[NOISE].square().sum()

    def at(distance: float) -> float:
        with torch.no_grad():
            for p, d in zip(weights, direction, strict=True):
                p += distance * d
        value = float(loss().detach())
        with torch.no_grad():
            for p, d in zip(weights, direction, strict=True):
                p -= distance * d
        return value

    with _float64():
        found = torch.autograd.grad(loss(), weights)
        difference = (at(1e-5) - at(-1e-5)) / 2e-5
    slope = sum(float((g * d).sum()) for g, d in zip(found, direction, strict=True))
    assert abs(slope - difference) < 1e-5 * abs(difference)


# --- legacy models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gemnet_t", {}),
        ("gemnet_t conservative", {"extensive": False}),
        ("gemnet_oc", {"num_global_out_layers": 1, "forces_coupled": True}),
        ("gemnet_oc conservative", {"scale_backprop_forces": True, "output_init": "zeros"}),
        ("dimenetplusplus", {}),
    ],
)
def test_the_hydra_computes_what_the_legacy_model_does_bit_for_bit(name, options, training):
    claims = CLAIMS[name]
    backbone = {key: value for key, value in {**claims.backbone, **options}.items() if key != "model"}
    block = {"name": name.split()[0], **backbone}
    hydra_block, dens = to_hydra(block)
    assert dens == {}
    assert to_hydra(hydra_block) == (hydra_block, {})
    assert {key: hydra_block["backbone"][key] for key in backbone} == backbone
    for head, expected in claims.heads.items():
        assert hydra_block["heads"][head]["module"] == expected["module"]
    original, converted = _built(block), _built({**hydra_block, "denoising": SCD})
    state = {hydra_key(key): value + 0.01 for key, value in original.state_dict().items()}
    original.load_state_dict({key: value + 0.01 for key, value in original.state_dict().items()})
    keys = converted.load_state_dict(state, strict=False)
    assert not keys.unexpected_keys
    assert all(key.startswith("denoising.") for key in keys.missing_keys)
    original.train(training), converted.train(training)
    expected, expected_gradients = gradients(original, claims.batch())
    out, found = gradients(converted, claims.batch())
    assert set(out) == set(expected) == {"energy", "forces"}
    assert expected["forces"].any()
    for key, value in expected.items():
        assert torch.equal(out[key], value), key
    for key, value in expected_gradients.items():
        other = found[hydra_key(key)]
        assert (value is None and other is None) or torch.equal(other, value), key


def _built(block: dict[str, Any]) -> torch.nn.Module:
    block = copy.deepcopy(block)
    return registry.get_model_class(block.pop("name"))(**block)


# --- pre-training, and what comes of it -------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["scd", "noisy_nodes"])
@pytest.mark.parametrize("name", ["gemnet_t", "gemnet_oc", "dimenetplusplus"])
def test_pre_training_moves_what_it_trains_and_its_backbone_is_plain_fairchem(name, task, data, tmp_path):
    claims = CLAIMS[name]
    config = self_supervised(training_config(data, claims.arguments(), {task: {}}))
    trainer = make_trainer(config, tmp_path)
    model = trainer._unwrapped_model
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    trainer.train(disable_eval_tqdm=True)
    frozen = {id(p) for module in (*model.adapter.element_embeddings(), *model.adapter.readout())
              for p in module.parameters()}  # fmt: skip
    for key, p in model.named_parameters():
        scale = key.endswith("scale_factor")
        assert p.requires_grad != (id(p) in frozen or scale), key
        assert torch.equal(p, before[key]) == (id(p) in frozen or scale), key
    stored = checkpoint.read(folder_of(trainer) / "checkpoint.pt")
    path = tmp_path / "backbone.pt"
    torch.save(checkpoint.export(stored, weights="raw", backbone_only=True), path)
    plain = HydraModel(finetune_config={"starting_checkpoint": str(path)}, heads=claims.arguments()["heads"])
    weights = dict(plain.backbone.named_parameters())
    for key, p in model.backbone.named_parameters():
        assert torch.equal(weights[key], p), key


@pytest.mark.parametrize("name", ["gemnet_t", "gemnet_oc"])
def test_an_export_holds_the_average_whole_and_needs_no_scale_file(name, data, tmp_path):
    """A part of GemNet's modules has two names each, and its scale factors came from a file."""
    claims, scales = CLAIMS[name], tmp_path / "scales.json"
    scales.write_text(json.dumps(dict.fromkeys(_scale_factors(claims.plain().backbone), 1.5)))
    arguments = claims.arguments()
    arguments["backbone"]["scale_file"] = str(scales)
    trainer = make_trainer(training_config(data, arguments, SCD), tmp_path)
    trainer.train(disable_eval_tqdm=True)
    stored = checkpoint.read(folder_of(trainer) / "checkpoint.pt")
    exported = {each: checkpoint.export(stored, weights=each) for each in ("raw", "ema")}
    scales.unlink()
    model = trainer._unwrapped_model
    names = [key for key, p in model.named_parameters() if p.requires_grad]
    average = dict(zip(names, trainer.ema.shadow_params, strict=True))
    assert any(not torch.equal(average[key], p) for key, p in model.named_parameters() if key in average)
    for each, expected in (("raw", dict(model.named_parameters())), ("ema", average)):
        config = exported[each]["config"]["model"]
        plain = HydraModel(**{key: value for key, value in config.items() if key != "name"})
        plain.load_state_dict({key.removeprefix("module."): v for key, v in exported[each]["state_dict"].items()})
        assert set(_scale_factors(plain.backbone).values()) == {1.5}
        for key, p in plain.named_parameters():
            assert torch.equal(p, expected.get(key, model.get_parameter(key))), (each, key)


@pytest.mark.parametrize("name", ["gemnet_t", "gemnet_oc", "dimenetplusplus"])
def test_a_converted_model_decays_what_its_legacy_model_did(name):
    block = {"name": name, **{key: value for key, value in CLAIMS[name].backbone.items() if key != "model"}}
    original, converted = _built(block), _built({**to_hydra(block)[0], "denoising": SCD})
    spared = converted.no_weight_decay()
    host = {key for key in spared if not key.startswith("denoising.")}
    assert host == {hydra_key(key) for key in original.no_weight_decay()}
    added = dict(converted.denoising.named_parameters(prefix="denoising"))
    assert {key for key, p in added.items() if p.dim() < 2} == spared - host
