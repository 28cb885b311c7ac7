"""New heads of scalars start at zero in fine-tuning, and wherever they are asked to; all others start as the host's."""

from __future__ import annotations

import logging

import hydra
import pytest
import torch
from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint

from fairchem_scd.denoising.quiet_heads import quieten
from fairchem_scd.fairchem2.backbones import adapter_for
from tests.fairchem2.support import (
    UMA,
    UNIT,
    batch_of,
    crystals,
    inner,
    mixture,
    model_config,
    tasks_config,
    train_on,
    unit_of,
    with_rotations_fixed,
)

LAST = {f"output_heads.energy.energy_block.4.{part}" for part in ("weight", "bias")}
HEADS = {
    "energy": {"module": f"{UMA}.escn_md.MLP_Energy_Head"},
    "forces": {"module": f"{UMA}.escn_md.Linear_Force_Head"},
}


def single_head():
    model, _ = mixture("ab", direct=True)
    for head in model["heads"].values():
        head["module"] = f"{UMA}.escn_moe.DatasetSpecificSingleHeadWrapper"
        head["dataset_names"] = sorted(head.pop("dataset_mapping"))
    return model


MODELS = {
    "direct": (model_config(stress=True), "energy"),
    "a linear head": (
        model_config(heads={**HEADS, "energy": {"module": f"{UMA}.escn_md.Linear_Energy_Head"}}),
        "energy",
    ),
    "the energy's gradient": (model_config(direct=False, stress=True, experts=2), "efs"),
    "experts, direct": (mixture("ab", direct=True)[0], "energy"),
    "experts, the energy's gradient": (mixture("ab", direct=False)[0], "efs"),
    "a head for several data sets": (single_head(), "energy"),
}


def mixed(model):
    """A batch of data sets that the model knows."""
    batch = batch_of(crystals(4))
    if "mo" not in model["backbone"]["dataset_mapping"]:
        batch.dataset = ["a", "b", "a", "b"]
    return batch


def flat(out, path=""):
    """What a model returned, by the names of the innermost dictionaries; embeddings are no predictions."""
    found = {}
    for key, value in out.items():
        name = f"{path}/{key}"
        found.update(flat(value, name) if isinstance(value, dict) else {name: value})
    return {name: value for name, value in found.items() if "embeddings" not in name}


@pytest.mark.parametrize(("config", "name"), MODELS.values(), ids=MODELS)
def test_a_quiet_head_predicts_zero_and_learns_from_the_first_step_on_and_others_stay(config, name):
    torch.manual_seed(1)
    model = hydra.utils.instantiate(config).train()
    with with_rotations_fixed():
        before = flat(model(mixed(config)))
        assert quieten(model.output_heads, adapter_for(model.backbone), readout=False) == [name]
        after = flat(model(mixed(config)))
    assert before.keys() == after.keys()
    for key, value in after.items():
        direct = not config["backbone"]["direct_forces"] or "energy" in key
        assert before[key].any(), key
        assert not value.any() if direct else torch.equal(value, before[key]), key
    sum((value - 1).square().sum() for value in after.values()).backward()
    head = model.output_heads[name]
    assert all(p.grad is not None for p in head.parameters())
    assert any(p.grad.any() for layer in adapter_for(model.backbone).scalar_layers(head) for p in layer.parameters())


# --- in a unit --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The inference checkpoint of a model with heads."""
    torch.manual_seed(5)
    config = model_config(heads=HEADS)
    weights = hydra.utils.instantiate(config).state_dict()
    average = {"n_averaged": torch.tensor(1), **{f"module.{name}": value for name, value in weights.items()}}
    path = tmp_path_factory.mktemp("start") / "inference_ckpt.pt"
    torch.save(MLIPInferenceCheckpoint(config, weights, average, tasks_config()), path)
    return path


def finetuning(start, heads=HEADS):
    """The host's function that starts from a checkpoint, with new heads unless they are None."""
    new = {} if heads is None else {"heads": heads}
    return {"_target_": f"{UNIT}.initialize_finetuning_model", "checkpoint_location": str(start), **new}


def weights_of(unit):
    """The host's weights of a unit's model, as they are now."""
    state = inner(unit).state_dict().items()
    return {name: value.clone() for name, value in state if not name.startswith("denoising.")}


@pytest.mark.parametrize(
    ("block", "fine_tunes", "quiet"),
    [
        ({"noisy_nodes": {}}, True, True),
        ({"noisy_nodes": {}, "quiet_heads": False}, True, False),
        ({}, True, False),
        ({"quiet_heads": True}, True, True),
        ({"scd": {}}, False, False),
        ({"scd": {}, "quiet_heads": True}, False, True),
    ],
    ids=["fine-tuning", "off", "without a task", "without a task, on", "from scratch", "from scratch, on"],
)
def test_new_heads_start_quietly_in_fine_tuning_and_where_asked(block, fine_tunes, quiet, start):
    model = finetuning(start) if fine_tunes else model_config(heads=HEADS)
    found, expected = unit_of(block, model=model), weights_of(unit_of(model=model))  # the host's own unit
    for name, value in weights_of(found).items():
        assert torch.equal(value, expected[name]) != (quiet and name in LAST), name
    average = found.ema_model.module.module.state_dict()
    for name, value in weights_of(found).items():
        assert torch.equal(average[name], value), "the average starts there too"
    assert any(expected[name].any() for name in LAST)
    assert any(weights_of(found)[name].any() for name in LAST) != quiet
    train_on(found, [batch_of(crystals(2))])
    assert all(weights_of(found)[name].any() for name in LAST)


@pytest.mark.parametrize("asked", [None, True])
def test_heads_that_come_from_the_checkpoint_stay_as_they_are(asked, start):
    unit = unit_of({"noisy_nodes": {}, "quiet_heads": asked}, model=finetuning(start, heads=None))
    kept = torch.load(start, weights_only=False).model_state_dict
    for name, value in weights_of(unit).items():
        assert torch.equal(value, kept[name]), name


def test_fine_tuning_by_a_head_for_vectors_alone_says_nothing_unless_it_was_asked_for(start, caplog):
    tasks = tasks_config()[1:]
    with caplog.at_level(logging.INFO):
        unit_of({"noisy_nodes": {}}, model=finetuning(start, {"forces": HEADS["forces"]}), tasks=tasks)
        assert "start quietly" not in caplog.text
        unit_of({"quiet_heads": True}, model=finetuning(start))
    assert "denoising turns on no task: no step denoises, but new heads start quietly" in caplog.text
    assert "heads that start quietly, with a last layer of zeros: energy" in caplog.text
