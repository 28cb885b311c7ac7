"""What docs/scaling.md says that a step sends, counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.communication import COUNT, PUBLISHED, SCALE, SIZES, Calls, call_rows, calls_of_steps, sizes

PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Calls]:
    return calls_of_steps(tmp_path_factory.mktemp("ranks"))


def test_the_table_of_calls_is_current(calls):
    for row in call_rows(calls):
        assert row in PAGE


def test_calls_are_of_the_sizes_that_the_page_names(calls):
    named = {COUNT: 8, SCALE: 16, SIZES: 4 * 16}
    for made in calls.values():
        small = [(kind, size) for kind, size in made if kind not in ("gradients", "buffers")]
        assert all(named[kind] == size for kind, size in small)


def test_scd_sends_gradients_once_and_one_count_more_than_an_ordinary_step(calls):
    """Which has one more than the plain host: of ranks that met a bad row."""
    assert [kind for kind, _ in calls["SCD beside energy and forces"]].count(COUNT) == 4
    assert [kind for kind, _ in calls["DeNS, ordinary step"]] == [SIZES, "buffers", COUNT, COUNT, COUNT, "gradients"]
    assert [kind for kind, _ in calls["plain"]] == [SIZES, "buffers", COUNT, COUNT, "gradients"]


def test_the_table_of_sizes_is_current():
    for what, (parameters, _) in sizes(PUBLISHED[0]).items():
        assert f"| {what} | {parameters:,} | {4e-6 * parameters:.1f} | " in PAGE
