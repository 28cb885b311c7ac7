"""The README says what is so."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from fairchem_scd.config import Settings, _Denoising
from fairchem_scd.tasks import _TASKS, build_tasks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def _default(value):
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value).lower()


def _rows(model: type[Settings], prefix: str) -> list[str]:
    return [
        f"| `{prefix}{key}` | `{_default(field.default)}` | {field.description} |".replace("|F|", r"\|F\|")
        for key, field in model.model_fields.items()
    ]


def test_settings_table_is_current():
    rows = [row for name, task in _TASKS.items() for row in _rows(task.Settings, f"{name}.")]
    expected = "\n".join([*rows, *_rows(_Denoising, "")])
    assert expected in README, f"the README's table should read\n{expected}"


def test_the_lines_to_add_are_a_valid_block():
    block = yaml.safe_load(re.search(r"```yaml\n(.*?)```", README, re.DOTALL)[1])
    assert list(build_tasks(block["task"]["denoising"])[0]) == ["dens"]
    assert block["trainer"] == "fairchem_scd.EquiformerV2DenoisingTrainer"


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_ci_runs_the_two_commands():
    ci = (ROOT / ".ci" / "run").read_text()
    for command in re.search(r"```bash\n(uv run .*?)```", README, re.DOTALL)[1].splitlines():
        assert command in ci, command


def test_no_stand_in_text_is_left():
    assert not re.search(r"[A-Z]{10,}", README.replace("PYG_WHEELS", "")), "capitals: a placeholder?"
