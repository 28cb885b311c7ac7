"""pyproject.toml declares what is imported, and nothing else."""

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
FOR_THE_HOST = {"scipy", "torch-sparse"}
# Tools, which are run and not imported.
TOOLS = {"ruff", "pytest-xdist"}
# The package of a module that may not be installed, where its name is another than the module's.
OPTIONAL = {"umap": ["umap-learn"]}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def imported(*folders: str) -> dict[str, Path]:
    """Modules of other packages that the files in some folders import, by their first name, and a file that does."""
    found = {}
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
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


def runtime(project: dict[str, Any]) -> set[str]:
    return names(project["project"]["dependencies"])


def optional(project: dict[str, Any]) -> set[str]:
    return names(name for extra in project["project"]["optional-dependencies"].values() for name in extra)


def development(project: dict[str, Any]) -> set[str]:
    return names(project["dependency-groups"]["dev"])


def test_what_the_package_imports_is_declared(project):
    declared = runtime(project) | optional(project)
    missing = {name: path for name, path in imported("fairchem_scd").items() if not providers(name) & declared}
    assert not missing


def test_what_tests_and_tools_import_is_declared(project):
    declared = runtime(project) | optional(project) | development(project)
    folders = ("tests", "benchmarks", "slurm", "docs")
    missing = {name: path for name, path in imported(*folders).items() if not providers(name) & declared}
    assert not missing


def test_what_is_declared_is_imported_or_said_to_be_for_another_reason(project):
    used = {provider for name in imported("fairchem_scd") for provider in providers(name)}
    assert (runtime(project) | optional(project)) - used == FOR_THE_HOST
    used |= {provider for name in imported("tests", "benchmarks") for provider in providers(name)}
    assert development(project) - used == TOOLS
