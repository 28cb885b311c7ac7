"""DeNS settings in the words of its authors and of fairchem's own DeNS trainer."""

from __future__ import annotations

import pytest

from fairchem_scd.denoising.tasks import build_tasks
from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1.dens_aliases import denoising_block

THEIRS = {
    "use_denoising_pos": True,
    "denoising_pos_coefficient": 25,
    "denoising_pos_params": {
        "prob": 0.25, "fixed_noise_std": True, "std": 0.15, "num_steps": 50, "std_low": "None", "std_high": "None",
        "corrupt_ratio": 0.4, "all_atoms": True,
    },
}  # fmt: skip


def test_the_authors_keys_are_read():
    dens = build_tasks(denoising_block({}, THEIRS, {}))[0]["dens"].settings
    assert (dens.prob, dens.std, dens.corrupt_ratio, dens.coefficient) == (0.25, 0.15, 0.4, 25)
    assert dens.all_atoms
    assert dens.schedule is None


def test_the_authors_schedule_is_the_default_of_their_flag():
    params = {"prob": 0.5, "num_steps": 3, "std_low": 0.01, "std_high": 0.04, "std": "None"}
    block = denoising_block({}, {**THEIRS, "denoising_pos_params": params}, {})
    dens = build_tasks(block)[0]["dens"].settings
    assert dens.schedule == pytest.approx((0.01, 0.02, 0.04))
    assert dens.corrupt_ratio is None


def test_their_flag_off_means_no_task():
    assert denoising_block({}, {**THEIRS, "use_denoising_pos": False}, {}) == {}


@pytest.mark.parametrize(
    ("task", "optim", "message"),
    [
        ({"denoising": {"dens": {}}}, THEIRS, "both set up denoising"),
        ({"denoising": True}, {}, "expected a block"),
        ({"denosing": {"dens": {}}}, {}, r"task\.denosing: unknown key; did you mean 'denoising'\?"),
        ({}, {**THEIRS, "denoising_pos_params": None}, "params.prob: missing"),
        ({}, {**THEIRS, "denoising_pos_coefficient": None}, "denoising_pos_coefficient: missing"),
        ({}, {**THEIRS, "denoising_pos_params": {"prob": 0.5, "fixed_noise_std": True}}, "params.std: missing"),
        ({}, {**THEIRS, "denoising_pos_params": {"prob": 0.5}}, "noise schedule.*needs num_steps, std_low, std_high"),
        ({}, {**THEIRS, "denoising_pos_params": {"prob": 0.5, "sdt": 1}}, "params.sdt: unknown key"),
        ({}, {**THEIRS, "denoising_pos_params": {"std": 1}}, "params.prob: missing"),
    ],
)
def test_errors_in_the_authors_words_name_their_keys(task, optim, message):
    with pytest.raises(ConfigError, match=message):
        denoising_block(task, optim, {})
