"""pyproject.toml declares what is imported, and nothing else: for every user, and for the users of each fairchem."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
OWN = {"fairchem_scd", "tests", "benchmarks", "toy"}  # the last is the backbone of docs/adding-a-backbone.md
# Declared for the host, which needs them and does not declare them or not these versions; pyproject.toml says why.
FOR_THE_HOST = {1: {"torch-sparse"}, 2: {"lmdb", "ase-db-backends"}}
# Tools, which are run and not imported.
TOOLS = {"ruff", "pytest-xdist"}
# The package of a module that may not be installed, where its name is another than the module's.
OPTIONAL = {"umap": ["umap-learn"], "hydra": ["hydra-core"], "google": ["protobuf"], "yaml": ["pyyaml"]}
OPTIONAL |= {"fairchem": ["fairchem-core"]}
# Where the code for one host is.
OF_A_HOST = {
    1: ("fairchem_scd/fairchem1", "fairchem_scd/testing", "tests/fairchem1", "tests/runs", "tests/support"),
    2: ("fairchem_scd/fairchem2", "fairchem_scd/commands/fairchem2", "tests/fairchem2", "benchmarks/fairchem2"),
}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def imported(*places: str, without: Iterable[str] = ()) -> dict[str, Path]:
    """Modules of other packages that some files, or files in folders, import: by first name, with a file that does."""
    found = {}
    left_out = [ROOT / place for place in without]
    for path in (path for place in map(ROOT.joinpath, places) for path in (place, *place.rglob("*.py"))):
        if path.is_dir() or any(place in (path, *path.parents) for place in left_out):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            found |= {name.split(".")[0]: path.relative_to(ROOT) for name in names}
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names | OWN}


def names(requirements: Iterable[str]) -> set[str]:
    """The normalised names of the packages that requirements ask for."""
    found = (re.match(r"[\w.-]+", requirement)[0] for requirement in requirements)
    return {normalised(name) for name in found} - {"fairchem-scd"}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def providers(module: str) -> set[str]:
    """The packages of which any brings a module; one of the module's name always counts, be it installed or not."""
    return {normalised(name) for name in (module, *packages_distributions().get(module, OPTIONAL.get(module, [])))}


def base(project: dict[str, Any]) -> set[str]:
    """What everyone has, whatever fairchem is theirs, and what the extras bring that need none."""
    extras = project["project"]["optional-dependencies"]
    free = [name for key, extra in extras.items() if not key.startswith("fairchem") for name in extra]
    return names(project["project"]["dependencies"]) | names(free)


def host(project: dict[str, Any], major: int) -> set[str]:
    return names(project["project"]["optional-dependencies"][f"fairchem{major}"])


def development(project: dict[str, Any]) -> set[str]:
    return names(project["dependency-groups"]["dev"])


def test_what_the_package_imports_is_declared_for_each_fairchem(project):
    own = [folder for folder in OF_A_HOST[2] if folder.startswith("fairchem_scd/")]
    folders = {1: imported("fairchem_scd", without=OF_A_HOST[2]), 2: imported(*own)}
    for major, found in folders.items():
        declared = base(project) | host(project, major)
        assert not {name: path for name, path in found.items() if not providers(name) & declared}


def test_the_methods_import_nothing_that_only_one_fairchem_brings(project):
    found = imported("fairchem_scd/denoising")
    declared = names(project["project"]["dependencies"])
    assert not {name: path for name, path in found.items() if not providers(name) & declared}


def test_what_tests_and_tools_import_is_declared(project):
    declared = base(project) | host(project, 1) | development(project)
    folders = ("tests", "benchmarks", "slurm", "docs")
    found = imported(*folders, without=OF_A_HOST[2])
    assert not {name: path for name, path in found.items() if not providers(name) & declared}


def test_what_is_declared_is_imported_or_said_to_be_for_another_reason(project):
    everywhere = {provider for name in imported("fairchem_scd") for provider in providers(name)}
    assert base(project) - everywhere == set()
    for major, reasons in FOR_THE_HOST.items():
        own = {p for name in imported("fairchem_scd", without=OF_A_HOST[3 - major]) for p in providers(name)}
        assert host(project, major) - own == reasons
    everywhere |= {provider for name in imported("tests", "benchmarks") for provider in providers(name)}
    assert development(project) - everywhere == TOOLS


def test_the_second_environment_takes_the_extra_and_what_its_tests_import(project):
    tomllib = pytest.importorskip("tomllib")
    second = tomllib.loads((ROOT / "hosts" / "fairchem2" / "pyproject.toml").read_text())
    assert second["project"]["dependencies"] == ["fairchem-scd[fairchem2,parquet,testing]"]
    declared = base(project) | host(project, 2) | development(second)
    found = imported(*OF_A_HOST[2], "tests/denoising")
    assert not {name: path for name, path in found.items() if not providers(name) & declared}
