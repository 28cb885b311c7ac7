"""Noisy nodes on plain structures."""

from __future__ import annotations

import logging

import pytest

from fairchem_scd.denoising.tasks import build_tasks


@pytest.mark.parametrize(
    ("std", "trained", "warned"),
    [(0.005, {"energy", "forces"}, True), (0.0005, {"energy", "forces"}, False), (0.005, {"gap"}, False)],
)
def test_noise_that_spoils_force_labels_is_warned_of(std, trained, warned, caplog):
    tasks, _ = build_tasks({"noisy_nodes": {"std": std}})
    with caplog.at_level(logging.WARNING):
        tasks["noisy_nodes"].check(trained, trained)
    assert ("noise on the labels" in caplog.text) == warned
