"""The settings: defaults that stand alone, and one clear error for what cannot be meant."""

from __future__ import annotations

import pytest

from fairchem_scd.denoising.tasks import build_tasks
from fairchem_scd.errors import ConfigError


def test_an_empty_block_is_complete_and_is_the_oc20_2m_run():
    dens = build_tasks({"dens": {}})[0]["dens"].settings
    assert (dens.prob, dens.std, dens.corrupt_ratio, dens.coefficient) == (0.5, 0.1, 0.5, 10)
    assert dens.schedule is None
    assert not dens.all_atoms
    assert dens.train_outputs == ("energy",)


def test_a_task_set_to_null_is_off():
    assert list(build_tasks({"dens": None, "noisy_nodes": {}})[0]) == ["noisy_nodes"]
    assert build_tasks({})[0] == build_tasks(None)[0] == {}


@pytest.mark.parametrize(
    ("block", "probabilities"),
    [
        ({"dens": {}}, {"dens": 0.5}),
        ({"noisy_nodes": {}}, {"noisy_nodes": 1.0}),
        ({"dens": {"prob": 0.25}, "noisy_nodes": {}}, {"dens": 0.25, "noisy_nodes": 0.75}),
    ],
)
def test_a_task_without_a_probability_takes_what_the_others_leave(block, probabilities):
    assert {name: task.settings.prob for name, task in build_tasks(block)[0].items()} == probabilities


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        build_tasks({"dens": {}})[0]["dens"].settings.std = 1.0


def test_numbers_that_yaml_reads_as_strings_are_numbers():
    assert build_tasks({"noisy_nodes": {"std": "5e-4"}})[0]["noisy_nodes"].settings.std == 5e-4


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"dens": {"stdd": 0.1}}, r"task\.denoising\.dens\.stdd: unknown key; did you mean 'std'\?"),
        ({"densss": {}}, r"task\.denoising\.densss: unknown key; did you mean 'dens'\?"),
        ({"dens": {"prob": 1.5}}, r"dens\.prob: .*less than or equal to 1 \(got 1\.5\)"),
        ({"dens": {"prob": -0.1}}, r"dens\.prob: .*greater than or equal to 0"),
        ({"dens": {"std": 0}}, r"dens\.std: .*greater than 0 \(got 0\)"),
        ({"dens": {"std": float("nan")}}, r"dens\.std: .*finite"),
        ({"dens": {"std": "wide"}}, r"dens\.std: .*number.*'wide'"),
        ({"dens": {"std": True}}, r"dens\.std: expected a number, not a boolean"),
        ({"dens": {"num_steps": 50}}, r"task\.denoising\.dens: .*missing: std_low, std_high"),
        ({"dens": {"num_steps": 5, "std_low": 0.3, "std_high": 0.1}}, "must not exceed"),
        ({"dens": {"num_steps": 5, "std_low": 0, "std_high": 0.1}}, r"dens\.std_low: .*greater than 0"),
        ({"dens": {"std": 0.1, "num_steps": 5, "std_low": 0.1, "std_high": 0.2}}, "exclude each other"),
        ({"dens": {"sigma_encoding": True}}, "sigma_encoding needs a noise schedule"),
        ({"dens": {"corrupt_ratio": 0}}, r"dens\.corrupt_ratio: .*greater than 0"),
        ({"dens": {"corrupt_ratio": 1.2}}, r"dens\.corrupt_ratio: .*less than or equal to 1"),
        ({"dens": {"coefficient": -1}}, r"dens\.coefficient"),
        ({"dens": {"prob": 0.7}, "noisy_nodes": {"prob": 0.7}}, r"dens\.prob = 0\.7.*sum to at most 1"),
        ({"dens": 3}, r"task\.denoising\.dens: .*\(got 3\)"),
        ({"noisy_nodes": {"loss": "huber"}}, r"noisy_nodes\.loss: .*'mse'"),
        ({"restart": "perhaps", "dens": {}}, r"task\.denoising\.restart"),
    ],
)
def test_what_cannot_be_meant_is_one_clear_error(block, message):
    with pytest.raises(ConfigError, match=message):
        build_tasks(block)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("scd", r"^task\.denoising: expected tasks, such as \{scd: \{\}\} \(got 'scd'\)$"),
        ({"scd": True}, r"^task\.denoising\.scd: expected settings in braces, which may be none: \{\} \(got True\)$"),
    ],
)
def test_what_is_no_block_is_told_what_a_block_looks_like(block, message):
    with pytest.raises(ConfigError, match=message):
        build_tasks(block)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        build_tasks({"dens": {"prob": 2, "stdd": 0.1, "corrupt_ratio": 3}})
    assert all(key in str(error.value) for key in ("prob", "stdd", "corrupt_ratio"))
