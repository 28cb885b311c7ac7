"""Every command and every piece of Python in README and docs runs, in order, on sample data."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import step_cost
from fairchem_scd.commands import main
from tests.support.command_line import fairchem, fairchem_scd

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT, ROOT / "docs", ROOT / "configs", ROOT / "benchmarks"]
TEXTS = [text for folder in FOLDERS for text in folder.glob("*.md")]
FAIRCHEM_2 = ("fairchem2", "fine-tuning-uma")  # tests/fairchem2/test_docs.py runs these
PAGES = sorted(p for p in (ROOT / "docs").glob("*.md") if "```bash" in p.read_text() and p.stem not in FAIRCHEM_2)
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
    if words[2:5] == ["python", "-m", "benchmarks.step_cost"]:
        # Hours as they stand. Tried are the options, and one small model in the place of all.
        options = step_cost._parse(words[5:])
        step_cost.main(["--quick", "--backbones", options.backbones[0], "--tasks", options.tasks[0]])
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
        if "tblite" in text:
            # In a process of its own: this one has loaded PyTorch, and after that tblite's library cannot be loaded.
            subprocess.run([sys.executable, "-W", "ignore", "-c", text], check=True)
        elif language == "python":
            exec(compile(text, page.name, "exec"), {})
        else:
            for command in text.strip().splitlines():
                follow(command)


def test_the_readme_runs_from_top_to_bottom(clone):
    for language, text in blocks(ROOT / "README.md"):
        if language == "bash":
            for command in text.strip().splitlines():
                if "pytest" not in command:
                    follow(command)


def anchors(page: Path) -> set[str]:
    """The names by which links reach the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for path, anchor in re.findall(r"\]\(((?!http)[^)#]*)#?([^)]*)\)", page.read_text()):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_files_that_the_text_names_exist():
    folders = "|".join(("benchmarks", "configs", "docs", "fairchem_scd", "slurm", "tests"))
    for page in [*TEXTS, *(ROOT / "configs").rglob("*.yml")]:
        for path in re.findall(rf"(?<![\w/.])(?:{folders})/[\w./-]*\w", page.read_text()):
            made_by_a_command = Path(path).name.startswith("my_")
            assert made_by_a_command or (ROOT / path).exists(), f"{page.relative_to(ROOT)}: {path}"


def test_modules_that_the_text_runs_exist():
    for page in [*TEXTS, *(ROOT / "benchmarks").rglob("*.py")]:
        for module in re.findall(r"python -m (benchmarks[\w.]*\w)", page.read_text()):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{page.name}: {module}"


def test_the_table_of_configs_has_them_all():
    text = (ROOT / "configs" / "README.md").read_text()
    assert {path.name for path in (ROOT / "configs").glob("*.yml")} == set(re.findall(r"\]\((\w+\.yml)\)", text))


def test_commands_that_the_text_names_exist():
    pages = [page.read_text() for page in TEXTS]
    named = {name for page in pages for name in re.findall(r"(?:`|uv run |fairchem2 )fairchem-scd (\w+)", page)}
    assert named <= set(main.list_commands(None))
    for name in main.list_commands(None):
        assert CliRunner().invoke(main, [name, "--help"]).exit_code == 0
