"""Every command and every piece of Python in README and docs runs, in order, on sample data."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from fairchem_scd.commands import main
from tests.support.command_line import fairchem, fairchem_scd

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md") if "```bash" in path.read_text())
# The sample configs, smaller: what is tested is that the commands fit together.
SMALLER = {
    r"num_structures: 240": "num_structures: 24",
    r"num_structures: 48": "num_structures: 8",
    r"max_epochs: \d+": "max_epochs: 1",
    r"(sphere_channels|edge_channels|ffn_hidden_channels): 32": r"\1: 8",
    r"max_radius: 6.0": "max_radius: 4.0",
    r"num_layers: 2": "num_layers: 1",
    r"(lmax_list|mmax_list): \[2\]": r"\1: [1]",
}


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each block that is meant to be run, in order."""
    found = re.findall(r"^```(bash|python)\n(.*?)^```", page.read_text(), re.S | re.M)
    return [(language, text) for language, text in found if "pip install" not in text]


def follow(command: str) -> None:
    words = shlex.split(command)
    assert words[:2] == ["uv", "run"], f"a command that a reader cannot copy: {command}"
    if words[2] == "fairchem-scd":
        fairchem_scd(*words[3:])
        return
    assert words[2] == "fairchem"
    # Its default, the working directory, is that of the time of its import.
    fairchem(*words[3:], "--run-dir", ".")


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """What a reader has: the configs, and nothing else."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for path in (tmp_path / "configs").rglob("*.yml"):
        text = path.read_text()
        for long, short in SMALLER.items():
            text = re.sub(long, short, text)
        path.write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_from_top_to_bottom(page, clone):
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, page.name, "exec"), {})
            continue
        for command in text.strip().splitlines():
            follow(command)


def test_the_readme_runs_from_top_to_bottom(clone):
    for language, text in blocks(ROOT / "README.md"):
        if language == "bash":
            for command in text.strip().splitlines():
                if "pytest" not in command:
                    follow(command)


def test_links_lead_somewhere():
    for page in (ROOT / "docs").glob("*.md"):
        for target in re.findall(r"\]\(((?!http)[^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_commands_that_the_text_names_exist():
    pages = [page.read_text() for page in (ROOT / "docs").glob("*.md")]
    named = {name for page in pages for name in re.findall(r"fairchem-scd (\w+)", page)}
    assert named <= set(main.list_commands(None))
    for name in main.list_commands(None):
        assert CliRunner().invoke(main, [name, "--help"]).exit_code == 0
