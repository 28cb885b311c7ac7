"""The package has the names of the installed host, and says of the other's how to get them."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from importlib import metadata

import pytest

import fairchem_scd
from fairchem_scd import host

ONE, TWO = "DenoisingTrainer", "DenoisingTrainEvalUnit"
OWN, OTHER = (ONE, TWO) if host.installed_major() == 1 else (TWO, ONE)


@pytest.fixture
def package_on(monkeypatch):
    """The package as it is where a version of fairchem-core is installed, by its metadata; None: none is."""

    def imported(version: str | None):
        def told(name: str) -> str:
            if version is None:
                raise metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(metadata, "version", told)
        return importlib.reload(fairchem_scd)

    yield imported
    monkeypatch.undo()
    importlib.reload(fairchem_scd)


def test_the_names_are_those_of_the_installed_host():
    assert OWN in fairchem_scd.__all__
    assert OTHER not in fairchem_scd.__all__
    assert getattr(fairchem_scd, OWN).__module__.startswith(host.WINGS[host.installed_major()])
    for name in fairchem_scd.__all__:
        getattr(fairchem_scd, name)


@pytest.mark.parametrize(
    ("version", "name", "major", "command"),
    [("1.10.0", TWO, 2, "uv run --project hosts/fairchem2"), ("2.24.0", ONE, 1, "uv run")],
)
def test_a_name_of_the_other_host_says_which_is_installed_and_how_to_get_it(package_on, version, name, major, command):
    package = package_on(version)
    with pytest.raises(ImportError) as error:
        getattr(package, name)
    for part in (f"fairchem_scd.{name}", f"{major}.x", version, f"fairchem-scd[fairchem{major}]", f"`{command}`"):
        assert part in str(error.value)


@pytest.mark.parametrize("name", [ONE, TWO, "register_task"])
def test_without_a_host_a_name_says_what_to_install(package_on, name):
    package = package_on(None)
    expected = "no fairchem-core is installed; install it with pip install 'fairchem-scd[fairchem"
    with pytest.raises(ImportError, match=re.escape(expected)):
        getattr(package, name)


def test_a_version_of_fairchem_that_is_not_known_is_no_host(package_on):
    package = package_on("3.0.0")
    with pytest.raises(ImportError, match=r"fairchem-core 3\.0\.0 is installed"):
        getattr(package, ONE)


@pytest.mark.skipif(host.installed_major() == 1, reason="it works there")
def test_the_claims_for_backbones_of_fairchem_1_say_where_they_belong():
    with pytest.raises(ImportError, match=r"fairchem_scd\.testing is for fairchem-core 1\.x"):
        importlib.import_module("fairchem_scd.testing")


def test_a_name_of_neither_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'DenoisingUnit'"):
        fairchem_scd.DenoisingUnit  # noqa: B018


def test_importing_the_package_imports_no_host_and_no_torch():
    code = "import sys, fairchem_scd; print([m for m in ('fairchem.core', 'torch') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_fairchem_that_has_lost_a_name_is_said_to_be_another_than_the_tested_one(package_on, monkeypatch):
    package = package_on("2.25.0")

    def gone(module: str) -> None:
        raise ImportError("cannot import name 'Task'")

    monkeypatch.setattr(importlib, "import_module", gone)
    with pytest.raises(ImportError, match=r"fairchem-core 2\.25\.0 has changed .*'Task'.*tested with 2\.24"):
        getattr(package, TWO)
    package = package_on("2.24.3")
    with pytest.raises(ImportError, match=r"^cannot import name 'Task'$"):
        getattr(package, TWO)
