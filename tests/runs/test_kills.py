"""What a kill leaves is whole. The long form is `python -m benchmarks.soak kills`."""

from __future__ import annotations

from benchmarks.soak import kills


def test_fifty_kills_lose_at_most_the_steps_since_the_last_checkpoint(tmp_path):
    """By SIGKILL and SIGTERM, in making sample data, in set-up, in steps, in writing checkpoints, in validation."""
    tally = kills(50, tmp_path)
    assert tally["kills"] == 50
    assert tally["after steps"] >= 5
    assert tally["before any checkpoint"] >= 5
    assert tally["runs"] >= 1
