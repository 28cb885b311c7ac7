"""The README says what is so."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from fairchem_scd.settings_reference import blocks, page, shown
from fairchem_scd.tasks import build_tasks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def _row(prefix, key, field):
    meaning = field.description.replace("|", r"\|")
    return f"| `{prefix}{key}` | `{shown(field.default)}` | {meaning} |"


def test_settings_tables_are_current():
    prefixed = {f"{name}." if name else "": block for name, block in blocks().items()}
    rows = [_row(prefix, *item) for prefix, block in prefixed.items() for item in block.model_fields.items()]
    expected = "\n".join(rows)
    assert expected in README, f"the README's table should read\n{expected}"
    assert (ROOT / "docs" / "settings.md").read_text() == page(), "run python -m fairchem_scd.settings_reference"


def test_the_lines_to_add_are_a_valid_block():
    blocks = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)]
    tasks = [list(build_tasks(block["task"]["denoising"])[0]) for block in blocks if "task" in block]
    assert tasks == [["scd"], ["scd"]]
    assert blocks[0]["trainer"] == "fairchem_scd.EquiformerV2DenoisingTrainer"
    assert (blocks[1]["outputs"], blocks[1]["loss_functions"]) == ({}, [])


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_ci_runs_every_command():
    ci = (ROOT / ".ci" / "run").read_text()
    for block in re.findall(r"```bash\n(?:export .*?\n)?(uv run .*?)```", README, re.DOTALL):
        for command in block.splitlines():
            # Those of fairchem-scd run in test_docs.py.
            assert command.startswith("uv run fairchem-scd ") or command in ci, command


def test_no_stand_in_text_is_left():
    assert not re.search(r"[A-Z]{10,}", README.replace("PYG_WHEELS", "")), "capitals: a placeholder?"
