"""`fairchem-scd add` on a config of fairchem 2.x: one `_target_`, one block, and nothing else."""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path

import pytest
import yaml

from fairchem_scd.commands.fairchem2.config_file import plain, read_config
from tests.fairchem2.command_line import fairchem_scd
from tests.fairchem2.support import run_config

CONFIGS = Path(__file__).parents[2] / "configs" / "fairchem2"
HOSTS = "fairchem.core.units.mlip_unit.mlip_unit.MLIPTrainEvalUnit"
OURS = "fairchem_scd.DenoisingTrainEvalUnit"


@pytest.fixture
def whole(tmp_path):
    """A config in one file, as its user wrote it."""
    text = yaml.safe_dump(run_config(tmp_path), sort_keys=False)
    path = tmp_path / "whole.yaml"
    path.write_text(f"# our run of May\n{text}")
    return path


def changed(before: str, after: str) -> tuple[list[str], list[str]]:
    """Lines that are gone, and lines that are new."""
    lines = [line for line in difflib.ndiff(before.splitlines(), after.splitlines()) if line[0] in "+-"]
    return [line[2:].strip() for line in lines if line[0] == "-"], [
        line[2:].strip() for line in lines if line[0] == "+"
    ]


@pytest.mark.parametrize("task", ["scd", "dens", "noisy_nodes"])
def test_one_target_and_one_block_change_and_every_other_line_stays(task, whole, tmp_path):
    out = tmp_path / "out.yaml"
    result = fairchem_scd("add", task, whole, out)
    gone, new = changed(whole.read_text(), out.read_text())
    assert gone == [f"_target_: {HOSTS}"]
    assert new == [f"_target_: {OURS}", "denoising:", f"{task}: {{}}"]
    assert f"fairchem -c {out}" in result.output


def test_the_composed_config_is_what_it_was_but_for_the_two(whole, tmp_path):
    out = tmp_path / "out.yaml"
    fairchem_scd("add", "scd", whole, out, "--set", "prob=0.5", "--set", "std=1e-1")
    expected = plain(read_config(whole))
    expected["runner"]["train_eval_unit"] |= {"_target_": OURS, "denoising": {"scd": {"prob": 0.5, "std": 0.1}}}
    assert plain(read_config(out)) == expected


def test_a_config_of_several_files_gets_the_lines_in_the_first(tmp_path):
    shutil.copytree(CONFIGS, tmp_path / "configs")
    config, out = tmp_path / "configs" / "plain_sample.yaml", tmp_path / "configs" / "mine.yaml"
    fairchem_scd("add", "scd", config, out)
    unit = yaml.safe_load(out.read_text())["runner"]["train_eval_unit"]
    assert unit == {"_target_": OURS, "denoising": {"scd": {}}}
    expected = plain(read_config(config))
    expected["runner"]["train_eval_unit"] |= {"_target_": OURS, "denoising": {"scd": {}}}
    assert plain(read_config(out)) == expected
    assert sorted(path.name for path in out.parent.glob("mine*")) == ["mine.yaml"]


def test_a_second_task_shares_the_steps_with_the_first(whole, tmp_path):
    fairchem_scd("add", "dens", whole, tmp_path / "one.yaml")
    result = fairchem_scd("add", "scd", tmp_path / "one.yaml", tmp_path / "two.yaml")
    assert "Share of the steps: dens 0.5, scd 0.5" in result.output
    gone, new = changed((tmp_path / "one.yaml").read_text(), (tmp_path / "two.yaml").read_text())
    assert (gone, new) == ([], ["scd: {}"])


def test_a_dry_run_writes_nothing(whole, tmp_path):
    result = fairchem_scd("add", "scd", whole, tmp_path / "out.yaml", "--dry-run")
    assert f"+    _target_: {OURS}" in result.output
    assert not (tmp_path / "out.yaml").exists()


def test_what_cannot_be_done_is_said_in_one_line(whole, tmp_path):
    def error(*words):
        result = fairchem_scd("add", *words, code=1)
        assert result.output.count("Error: ") == 1
        return result.output

    fairchem_scd("add", "scd", whole, tmp_path / "scd.yaml")
    out = tmp_path / "out.yaml"
    assert "denoising.scd is there already" in error("scd", tmp_path / "scd.yaml", out)
    assert "did you mean 'std'?" in error("scd", whole, out, "--set", "stdd=1")
    other = tmp_path / "other.yaml"
    other.write_text(whole.read_text().replace(HOSTS, "my_package.Unit"))
    assert "'my_package.Unit' has no counterpart" in error("scd", other, out)
    one = tmp_path / "one.yml"
    one.write_text("trainer: forces\n")
    assert "is for fairchem-core 1.x, and fairchem-core 2." in error("scd", one, out)
    empty = tmp_path / "empty.yaml"
    empty.write_text("job: {}\n")
    assert "runner.train_eval_unit._target_ is missing" in error("scd", empty, out)
    assert "no_such.yaml: No such file" in error("scd", tmp_path / "no_such.yaml", out)
    assert not out.exists()


def test_files_that_defaults_name_stay_within_reach(tmp_path):
    shutil.copytree(CONFIGS, tmp_path / "configs")
    config = tmp_path / "configs" / "plain_sample.yaml"
    elsewhere = fairchem_scd("add", "scd", config, tmp_path / "out.yaml", code=1)
    assert f"write the new file to {config.parent}" in elsewhere.output
    ending = fairchem_scd("add", "scd", config, config.with_name("out.yml"), code=1)
    assert "name it out.yaml" in ending.output


def test_structures_without_labels_are_pre_trained(tmp_path):
    config = tmp_path / "pretrain.yaml"
    config.write_text(yaml.safe_dump(run_config(tmp_path, tasks=[])))
    assert "Share of the steps: scd 1, pre-training" in fairchem_scd("add", "scd", config, tmp_path / "out.yaml").output
