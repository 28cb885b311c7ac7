"""The tests of this folder need fairchem-core 2.x; where another host is installed they are left out, with one line."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest

try:
    _HOST = version("fairchem-core")
except PackageNotFoundError:
    _HOST = "none"

if _HOST.startswith("2."):
    pytest.register_assert_rewrite("tests.fairchem2.support")
else:
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header() -> list[str]:
    if _HOST.startswith("2."):
        return []
    return [f"tests/fairchem2: left out, since they need fairchem-core 2.x (installed: {_HOST})"]


@pytest.fixture(autouse=True)
def _no_process_group_is_left() -> None:
    yield
    from fairchem.core.common import distutils

    if distutils.initialized():  # a run that raised leaves it, and the next could not begin
        distutils.cleanup()
