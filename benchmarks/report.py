"""Tables and figures of docs/evidence.md, drawn from the files of results.

    python -m benchmarks.report

Tables are written between the marks `<!-- begin NAME -->` and `<!-- end NAME -->` of the page, figures to
docs/figures. Nothing is trained. A figure without results yet is not drawn.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from benchmarks.figures import draw_curves, draw_labels, draw_ladder
from benchmarks.results import Results
from benchmarks.tables import (
    Record,
    arms_table,
    compute_table,
    cost_table,
    ladder_table,
    saved_table,
    trained,
)
from fairchem_scd.plots import style

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "evidence.md"


def tables(learning: list[Record], condition: list[Record]) -> dict[str, str]:
    """All tables of the page, by the name of their mark."""
    few = trained(learning, "few", "energies")
    before = [r for r in learning if "arm" not in r["run"]]
    return {
        "few": arms_table(few),
        "saved": saved_table(few),
        "compute": compute_table(
            [*before, *(r for r in few if r["run"]["labels"] == 24), *trained(learning, "compute")]
        ),
        "heads": arms_table(trained(learning, "heads")),
        "equiformer": arms_table(trained(learning, "equiformer")),
        "beside": arms_table(trained(learning, "long")),
        "tune": arms_table(trained(learning, "tune"), split="held_out"),
        "cost": cost_table(learning),
        "ladder": ladder_table(condition),
    }


def fill(page: str, contents: dict[str, str]) -> str:
    """The page with new contents between its marks. Marks without contents are an error, the reverse is not."""

    def put(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- begin {name} -->\n{contents[name]}\n<!-- end {name} -->"

    return re.sub(r"<!-- begin (\w+) -->\n.*?<!-- end \1 -->", put, page, flags=re.DOTALL)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="FOLDER", help="of the two files")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="markdown to fill in")
    options = parser.parse_args(arguments)
    learning, condition = (Results(options.results / f"{name}.jsonl").records() for name in ("learning", "condition"))
    options.page.write_text(fill(options.page.read_text(), tables(learning, condition)))
    figures = options.page.parent / "figures"
    figures.mkdir(exist_ok=True)
    with style.printed():
        for draw, records, name in (
            (draw_labels, trained(learning, "few", "energies"), "few_labels"),
            (draw_curves, trained(learning, "long"), "beside_labels"),
            (draw_ladder, condition, "condition"),
        ):
            if records:
                draw(records, figures / f"{name}.png")


if __name__ == "__main__":
    main()
