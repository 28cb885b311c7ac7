"""The tests of this folder need fairchem-core 2.x; tests/conftest.py leaves them out where it is not installed."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.fairchem2.support")


@pytest.fixture(autouse=True)
def _no_process_group_is_left() -> None:
    yield
    from fairchem.core.common import distutils

    if distutils.initialized():  # a run that raised leaves it, and the next could not begin
        distutils.cleanup()
