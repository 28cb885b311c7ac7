"""Claims that take a GPU: `pytest -m gpu`. Without one they are skipped, and one line at the end says so.

FAIRCHEM_SCD_GPU_TESTS_ON=cpu runs their code on the CPU, to see that it runs. That shows nothing about a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before the first product of matrices: without it cuBLAS may add up in another order each time.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

HERE = Path(__file__).parent
INSTEAD = os.environ.get("FAIRCHEM_SCD_GPU_TESTS_ON")
MISSING = not INSTEAD and not torch.cuda.is_available()
WHY = "torch sees no CUDA device"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if MISSING:
                item.add_marker(pytest.mark.skip(reason=WHY))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if WHY in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(f"tests/gpu: {WHY}, so all {len(skipped)} tests were skipped")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(INSTEAD or "cuda:0")


@pytest.fixture(autouse=True)
def _same_order_of_sums() -> Iterator[None]:
    """Sums over edges in the same order each time, wherever torch has such a kernel."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
