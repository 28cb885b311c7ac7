"""What all tests share. It imports no host: tests/denoising runs where none is installed."""

from __future__ import annotations

import functools
import os
from collections import Counter
from pathlib import Path

# Before torch is imported: the suite's models are too small to gain from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The host's sampler compiles one small function in every process of several ranks, for longer than they train here.
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")

import pytest
import torch
from e3nn.o3 import _s2grid

pytest.register_assert_rewrite("tests.support")

_LONG = ("test_kills.py", "test_rank_runs.py", "test_resume.py", "test_slurm.py", "test_submitit.py")
"""Files that take longest: begun first, so that with -n 2 neither process waits for the other at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in _LONG, -sizes[item.path], item.path))


_compute_grid = _s2grid.spherical_harmonics_s2_grid


@functools.cache
def _known_grid(*arguments: object) -> tuple[torch.Tensor, ...]:
    return _compute_grid(*arguments[:-1])


def _grid(lmax: int, beta: int, alpha: int, dtype: object = None, device: object = None) -> tuple[torch.Tensor, ...]:
    """e3nn's function, each result of which is computed once.

    It generates and compiles code at every call: nine tenths of the time that a tiny EquiformerV2 takes to build.
    """
    return tuple(t.clone() for t in _known_grid(lmax, beta, alpha, dtype, device, torch.get_default_dtype()))


_s2grid.spherical_harmonics_s2_grid = _grid


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
