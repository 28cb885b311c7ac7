"""What all tests share. It imports no host: tests/denoising runs where none is installed."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

# Before torch is imported: the suite's models are too small to gain from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The host's sampler compiles one small function in every process of several ranks, for longer than they train here.
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")

import pytest
import torch

from fairchem_scd.host import installed_major

pytest.register_assert_rewrite("tests.support")

_HERE = Path(__file__).parent
_OF_A_HOST = dict.fromkeys(
    ("fairchem1", "runs", "commands", "benchmarks", "docs", "gpu", "test_stand_ins_and_real.py"), 1
)
_OF_A_HOST["fairchem2"] = 2
"""Folders and files of tests that need fairchem-core of one major version."""

_left_out = set()

_LONG = ("test_kills.py", "test_rank_runs.py", "test_resume.py", "test_slurm.py", "test_submitit.py")
"""Files that take longest: begun first, so that with -n 2 neither process waits for the other at the end."""


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """True for tests of a host that is not installed here."""
    # Its first part, and not the whole: a folder that the command line names is collected without being asked for.
    name = collection_path.relative_to(_HERE).parts[0] if _HERE in collection_path.parents else None
    if _OF_A_HOST.get(name) in (None, installed_major()):
        return None
    _left_out.add(name)
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for major in sorted({_OF_A_HOST[name] for name in _left_out}):
        names = ", ".join(f"tests/{name}" for name in sorted(_left_out) if _OF_A_HOST[name] == major)
        terminalreporter.write_line(f"Skipped, since fairchem-core {major}.x is not installed here: {names}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in _LONG, -sizes[item.path], item.path))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def rows() -> list:
    """Eight labelled slabs, as rows of fairchem 1.x."""
    from fairchem_scd.testing import slabs  # not above: tests/denoising runs where no host is installed

    return slabs(8)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which sample LMDBs are kept for the whole session."""
    return tmp_path_factory.mktemp("data")
