"""The README says what is so."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from pydantic import BaseModel

from fairchem_scd.config import CellRepeatSettings, DropPathSettings, _Denoising
from fairchem_scd.tasks import _TASKS, build_tasks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def _default(value):
    if isinstance(value, (tuple, frozenset)):
        return f"[{', '.join(value)}]"
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value).lower()


def _rows(model: type[BaseModel], prefix: str) -> list[str]:
    return [
        f"| `{prefix}{key}` | `{_default(field.default)}` | {field.description} |".replace("|F|", r"\|F\|")
        for key, field in model.model_fields.items()
    ]


def test_settings_table_is_current():
    rows = [row for name, task in _TASKS.items() for row in _rows(task.Settings, f"{name}.")]
    rows += _rows(_Denoising, "")
    rows += [*_rows(DropPathSettings, "drop_path."), *_rows(CellRepeatSettings, "repeat_cells.")]
    expected = "\n".join(rows)
    assert expected in README, f"the README's table should read\n{expected}"


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
    for block in re.findall(r"```bash\n(uv run .*?)```", README, re.DOTALL):
        for command in block.splitlines():
            assert command in ci, command


def test_no_stand_in_text_is_left():
    assert not re.search(r"[A-Z]{10,}", README.replace("PYG_WHEELS", "")), "capitals: a placeholder?"
