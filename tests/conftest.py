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

pytest.register_assert_rewrite("tests.support")

_LONG = ("test_kills.py", "test_rank_runs.py", "test_resume.py", "test_slurm.py", "test_submitit.py")
"""Files that take longest: begun first, so that with -n 2 neither process waits for the other at the end."""


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
