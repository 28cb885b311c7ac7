"""benchmarks/gpu.py, on tiny models: it runs, also where there is no GPU, and every kind of step has its row."""

from __future__ import annotations

import pytest

from benchmarks import gpu

STEPS = {
    "plain",
    "DeNS, denoising step",
    "SCD beside energy and forces",
    "SCD, pre-training",
    "SCD, recompute_clean_pass",
    "SCD, activation_checkpoint",
    "plain, activation_checkpoint",
    "host's own DeNS, denoising step",
}


@pytest.mark.slow
def test_every_kind_of_step_has_its_time_and_memory(tmp_path):
    lines = gpu.main(["--quick", "--out", str(tmp_path / "costs.md")])
    assert (tmp_path / "costs.md").read_text().splitlines() == lines
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| Equiformer")]
    assert sorted(row[1] for row in rows) == sorted([*STEPS, *STEPS])
    for row in rows:
        milliseconds, ratio, memory, held = (float(row[i]) for i in (2, 3, 5, 6))
        assert min(milliseconds, ratio, memory, held) > 0, row


def test_no_group_begins_after_the_minutes_are_over(monkeypatch):
    monkeypatch.setattr(gpu, "measure", lambda *_: pytest.fail("a group was measured"))
    lines = gpu.main(["--quick", "--minutes", "-1"])
    assert [line for line in lines if "left out: -1 minutes were over" in line] == lines[-2:]
