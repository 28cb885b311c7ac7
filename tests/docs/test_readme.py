"""The README is short, and says what is so."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from fairchem_scd.denoising.settings_page import page
from fairchem_scd.denoising.tasks import build_tasks

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def yaml_blocks(text: str) -> list[dict]:
    return [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]


def test_the_readme_is_short_and_in_the_order_in_which_a_reader_asks():
    assert len(README.splitlines()) <= 165
    assert re.findall(r"^## (.*)$", README, re.MULTILINE) == [
        "Install",
        "Quick start",
        "Three lines in your config",
        "Backbones",
        "What it costs and buys",
        "Before and after training",
        "More",
        "Cite",
    ]


def test_the_page_of_the_settings_is_current():
    assert (ROOT / "docs" / "settings.md").read_text() == page(), "run python -m fairchem_scd.denoising.settings_page"


def test_the_lines_to_add_are_a_valid_block():
    block, second = yaml_blocks(README)
    assert list(build_tasks(block["task"]["denoising"])[0]) == ["scd"]
    assert block["trainer"] == "fairchem_scd.EquiformerV2DenoisingTrainer"
    unit = second["runner"]["train_eval_unit"]
    assert list(build_tasks(unit["denoising"])[0]) == ["scd"]
    assert unit["_target_"] == "fairchem_scd.DenoisingTrainEvalUnit"


def test_the_lines_that_pre_train_are_a_valid_block():
    block, _ = yaml_blocks((ROOT / "docs" / "pretraining.md").read_text())
    assert list(build_tasks(block["task"]["denoising"])[0]) == ["scd"]
    assert block["trainer"] == "fairchem_scd.EquiformerV2DenoisingTrainer"
    assert (block["outputs"], block["loss_functions"]) == ({}, [])


def test_ci_runs_every_command():
    ci = (ROOT / ".ci" / "run").read_text()
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        for block in re.findall(r"```bash\n(uv run .*?)```", text, re.DOTALL):
            for command in block.splitlines():
                # Those of fairchem-scd run in test_docs.py.
                assert command.startswith("uv run fairchem-scd ") or command in ci, command


def test_no_stand_in_text_is_left():
    meant = ("PYG_WHEELS", "CONTRIBUTING", "OMP_NUM_THREADS")
    assert not [word for word in re.findall(r"[A-Z_]{10,}", README) if word not in meant], "capitals: a placeholder?"
