"""Where nothing is denoised, this host's unit trains what the host's own does, to the last bit."""

from __future__ import annotations

import logging

import pytest
import torch
from fairchem.core.units.mlip_unit.mlip_unit import MLIPTrainEvalUnit

from fairchem_scd.fairchem2.unit import DenoisingTrainEvalUnit
from tests.fairchem2.support import batch_of, crystals, differences, model_config, plain_state, train_on, unit_of

MODELS = {
    "direct": model_config(),
    "conservative": model_config(direct=False, stress=True),
    "experts with dropout": model_config(
        experts=4, moe_dropout=0.3, use_composition_embedding=True, composition_dropout=0.2
    ),
}


class Seeded(MLIPTrainEvalUnit):
    """The host's unit, with a step's random numbers set as ours sets them."""

    def train_step(self, state, data):
        torch.manual_seed(self.train_progress.num_steps_completed)
        super().train_step(state, data)


def batches():
    return [batch_of(crystals(2, seed)) for seed in (0, 2, 4)]


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_ordinary_steps_are_those_of_the_host_bit_for_bit(model, monkeypatch):
    monkeypatch.setattr(DenoisingTrainEvalUnit, "_seed", lambda self, number, what: torch.manual_seed(number))
    host = unit_of(model=model, cls=Seeded)
    ours = unit_of({"scd": {"prob": 0}, "dens": {"prob": 0}}, model=model)
    for unit in (host, ours):
        train_on(unit, batches())
    expected, found = plain_state(host), plain_state(ours)
    assert {"model", "ema", "optim", "progress", "scheduler"} == set(expected)
    assert differences(expected, found) == []
    assert len(ours.state_dict()["model"]) > len(expected["model"]), "nothing was added that could make a difference"


@pytest.mark.parametrize("block", [{}, {"scd": None}])
def test_a_block_without_a_task_is_the_hosts_unit_random_numbers_included(block):
    host, ours = unit_of(), unit_of(block)
    for unit in (host, ours):
        torch.manual_seed(3)
        train_on(unit, batches())
    assert differences(plain_state(host), ours.state_dict()) == []


def test_the_hosts_loop_complains_of_nothing_that_it_does_not_complain_of_in_a_plain_run(caplog):
    said = []
    for block in (None, {"scd": {"prob": 0.5}}):
        unit = unit_of(block)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            train_on(unit, batches())
        said.append({record.getMessage() for record in caplog.records})
    assert said[1] <= said[0]


def test_the_comparison_sees_other_random_numbers():
    """Without this the claims above would hold for nothing."""
    states = []
    for seed in (3, 4):
        unit = unit_of()
        torch.manual_seed(seed)
        train_on(unit, batches())
        states.append(plain_state(unit))
    assert differences(*states) != []
