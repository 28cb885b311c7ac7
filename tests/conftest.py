"""Fixtures that the tests share."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported: the suite's models are too small to gain from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.support import slabs


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def rows() -> list:
    """Eight labelled slabs."""
    return slabs(8)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which sample LMDBs are kept for the whole session."""
    return tmp_path_factory.mktemp("data")
