"""Bad input ends in one clear message before the first step, under the keys that the user wrote."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from fairchem.core.models.allscaip.AllScAIP import AllScAIPBackbone
from fairchem.core.models.escaip.EScAIP import EScAIPBackbone
from fairchem.core.units.mlip_unit.mlip_unit import MLIPTrainEvalUnit

from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem2 import refusals
from fairchem_scd.fairchem2.unit import DenoisingTrainEvalUnit
from tests.fairchem2.support import UMA, batch_of, cluster, crystals, model_config, task, train_on, unit_of

KEY = "runner.train_eval_unit"
FORCES_ALONE = model_config(heads={"forces": {"module": f"{UMA}.escn_md.Linear_Force_Head"}})
OTHER_LOSS = {"_target_": "fairchem.core.modules.loss.L2NormLoss"}

CASES = {
    "an unknown key": ({"scd": {"stdd": 0.1}}, {}, f"{KEY}.denoising.scd.stdd: unknown key; did you mean 'std'?"),
    "an unknown task": ({"scdd": {}}, {}, f"{KEY}.denoising.scdd: unknown key; did you mean 'scd'?"),
    "a wrong value": ({"scd": {"std": -1}}, {}, f"{KEY}.denoising.scd.std: Input should be greater than 0"),
    "probabilities": (
        {"scd": {"prob": 0.8}, "dens": {"prob": 0.8}},
        {},
        "the probabilities must sum to at most 1",
    ),
    "a task beside the block": ({}, {"scd": {}}, f"{KEY}.scd: unknown; denoising tasks stand in {KEY}.denoising"),
    "the block misspelt": ({}, {"denoise": {}}, f"{KEY}.denoise: unknown key; did you mean 'denoising'?"),
    "the block of the first host": ({}, {"task": {"denoising": {}}}, f"{KEY}.task: unknown"),
    "dens without forces": (
        {"dens": {}},
        {"tasks": [task("energy")]},
        f"{KEY}.tasks: none with property: forces, and {KEY}.denoising.dens trains noise in their place",
    ),
    "dens with a force loss that hides its items": (
        {"dens": {}},
        {"tasks": [task("energy"), task("forces", loss_fn=OTHER_LOSS)]},
        "the loss_fn of forces is L2NormLoss",
    ),
    "outputs that are not there": (
        {"dens": {"train_outputs": ["stress"]}},
        {},
        f"{KEY}.denoising.dens.train_outputs: 'stress' is not an output; outputs: energy",
    ),
    "noise on the labelled view": ({"scd": {"std_reg": 0.1}}, {}, f"{KEY}.denoising.scd.std_reg: the clean pass"),
    "fsdp": ({"scd": {}}, {"train_strategy": "fsdp"}, f"{KEY}.train_strategy: fsdp cannot start"),
    "graph parallelism": (
        {"scd": {}},
        {"job": {"graph_parallel": {"group_size": 2}}},
        "job.graph_parallel.group_size: 2: a pass of a denoising task needs all atoms",
    ),
    "graphs from the data": (
        {"scd": {}},
        {"model": model_config(otf_graph=False)},
        f"{KEY}.model.backbone.otf_graph is false: a corrupted structure needs a graph of its own",
    ),
    "a mask token": ({"scd": {"null_condition": "mask_token"}}, {}, f"{KEY}.denoising.scd.null_condition: only on"),
    "parts of structures": ({"scd": {"denoise_tags": [1]}}, {}, f"{KEY}.denoising.scd.denoise_tags: only on"),
    "drop path": ({"scd": {}, "drop_path": {}}, {}, f"{KEY}.denoising.drop_path: only on fairchem 1.x"),
    "repeated cells": ({"scd": {}, "repeat_cells": {}}, {}, f"{KEY}.denoising.repeat_cells: only on fairchem 1.x"),
    "drop path for each atom": ({"scd": {}, "drop_path_per": "atom"}, {}, f"{KEY}.denoising.drop_path_per: only on"),
    "a condition to judge where there is none": (
        {"scd": {"judge_condition": True, "condition": []}},
        {},
        f"{KEY}.denoising.scd: judge_condition: of the embedding, but condition does not name 'self'",
    ),
    "quiet heads where no head has scalars": (
        {"noisy_nodes": {}, "quiet_heads": True},
        {"model": FORCES_ALONE, "tasks": [task("forces")]},
        f"{KEY}.denoising.quiet_heads: none of {KEY}.model.heads is a new one of scalars whose last layer is known: "
        "forces; leave",
    ),
    "restart": ({"scd": {}, "restart": True}, {}, f"{KEY}.denoising.restart: only on fairchem 1.x"),
    "pre-training with ordinary steps": (
        {"scd": {"prob": 0.5}},
        {"tasks": [], "model": model_config(heads={})},
        f"{KEY}.denoising.scd.prob: 0.5: without tasks ({KEY}.tasks) every step must denoise",
    ),
}


@pytest.mark.parametrize(("block", "changes", "message"), CASES.values(), ids=CASES)
def test_what_cannot_be_trained_ends_before_training_with_the_key_and_the_reason(block, changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        unit_of(block, **changes)


@pytest.mark.parametrize("cls", [EScAIPBackbone, AllScAIPBackbone, torch.nn.Linear])
def test_backbones_without_an_adapter_are_refused_by_name_with_those_that_have_one(cls):
    backbone = cls.__new__(cls)
    torch.nn.Module.__init__(backbone)
    model = torch.nn.Module()
    model.backbone, model.output_heads = backbone, torch.nn.ModuleDict()
    name = cls.__name__.removesuffix("Backbone")
    with pytest.raises(ConfigError, match=rf"{KEY}\.model\.backbone: .*{name}(.|\n)*eSCNMDMoeBackbone"):
        refusals.check_model(model)


def test_a_train_strategy_that_nobody_knows_is_the_hosts_to_refuse():
    with pytest.raises(ValueError, match="Unknown Training Strategy zero"):
        unit_of({"scd": {}}, train_strategy="zero")


def test_a_model_that_is_no_hydra_is_refused():
    with pytest.raises(ConfigError, match=rf"{KEY}\.model: Linear is no hydra"):
        refusals.check_model(torch.nn.Linear(1, 1))


def test_a_block_without_a_task_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        unit_of({})
    assert f"{KEY}.denoising turns on no task: this trains as the host's unit would" in caplog.text


# --- the host's version -----------------------------------------------------------------------------------------------


def test_all_that_is_overridden_is_in_the_list_of_what_is_checked():
    overridden = {
        getattr(MLIPTrainEvalUnit, name)
        for name in vars(DenoisingTrainEvalUnit)
        if not name.startswith("__") and callable(getattr(MLIPTrainEvalUnit, name, None))
    }
    assert overridden
    assert overridden <= set(refusals._SIGNATURES), "the list in refusals.py lacks a method"
    refusals.check_host()


def test_another_signature_is_an_error_and_another_minor_version_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(refusals, "version", lambda name: "2.31.0")
    with caplog.at_level(logging.WARNING):
        refusals.check_host()
    assert "fairchem-core 2.31.0: fairchem-scd was tested with 2.24" in caplog.text

    def train_step(self, state, data, more):
        """The host's, in some later version."""

    monkeypatch.setitem(refusals._SIGNATURES, train_step, ("self", "state", "data"))
    with pytest.raises(ConfigError, match=r"fairchem-core 2\.31\.0: .*train_step\(self, state, data, more\) was"):
        unit_of({"scd": {}})


# --- data -------------------------------------------------------------------------------------------------------------


def test_forces_as_a_condition_need_the_label():
    unit = unit_of({"scd": {"condition": ["forces"]}}, tasks=[task("energy")])
    batch = batch_of([cluster(0)])
    batch.__keys__.discard("forces")
    with pytest.raises(ConfigError, match=rf"{KEY}\.denoising\.scd needs 'forces', which the data does not have"):
        train_on(unit, [batch])


def test_noisy_nodes_beside_forces_are_warned_of_under_the_users_key(caplog):
    with caplog.at_level(logging.WARNING):
        unit_of({"noisy_nodes": {"std": 0.05}})
    assert f"{KEY}.denoising.noisy_nodes.std: 0.05 Å. The force labels belong" in caplog.text
    train_on(unit_of({"noisy_nodes": {}}), [batch_of(crystals(1))])
