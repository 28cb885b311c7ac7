"""What a kill leaves is whole. The long form is `python -m benchmarks.soak kills`."""

from __future__ import annotations

import pytest

from benchmarks.soak import kills


@pytest.mark.parametrize("count", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_kills_lose_at_most_the_steps_since_the_last_checkpoint(count, tmp_path):
    """By SIGKILL and SIGTERM, in making sample data, in set-up, in steps, in writing checkpoints, in validation."""
    tally = kills(count, tmp_path)
    assert tally["kills"] == count
    assert tally["after steps"] >= count / 10
    assert tally["before any checkpoint"] >= count / 10
    assert tally["runs"] >= 1
