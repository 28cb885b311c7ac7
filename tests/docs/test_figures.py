"""The pictures of the documentation show the figures of its tables."""

from __future__ import annotations

import csv
import re
import runpy
from pathlib import Path

FIGURES = Path(__file__).parents[2] / "docs" / "figures"


def texts(picture: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", picture.read_text())


def test_the_picture_of_the_cost_is_the_one_that_its_script_draws(tmp_path):
    script = runpy.run_path(str(FIGURES / "step_cost.py"))
    script["draw"](tmp_path / "cost.svg")
    drawn = texts(tmp_path / "cost.svg")
    assert texts(FIGURES / "cost.svg") == drawn, "run python docs/figures/step_cost.py"
    for step in script["measured"]().values():
        assert {f"{step['time']:.3f}", f"{step['memory']:.3f}"} <= set(drawn)


def test_what_the_picture_is_drawn_from_is_the_table_of_the_page():
    page = (FIGURES.parent / "cost.md").read_text()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    cells = {row[0].removesuffix(" ᵃ"): dict(zip(("4", "12"), row[1:], strict=False)) for row in table}
    with (FIGURES / "step_cost.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        said = cells[row["step"]][row["blocks"]].replace("*", "")
        assert said == f"{row['time']} ({row['low']}–{row['high']})", row
    for blocks in ("4", "12"):
        memories = {row["step"]: row["memory"] for row in rows if row["blocks"] == blocks and row["memory"]}
        dens, scd = ([memory for step, memory in memories.items() if ("DeNS" in step) == own] for own in (True, False))
        assert set(dens) == {cells["peak memory of DeNS, this package's and fairchem's"][blocks]}
        assert ", ".join(scd) == cells["peak memory of these five"][blocks]
