"""Draw the cost of a training step, as the README shows it: cost.svg beside this file, from step_cost.csv.

    uv run python docs/figures/step_cost.py [OUT]

The figures are those of docs/cost.md, which has the commands that measured them. They are ratios to the plain step of
the same config: the median of the time with its 95% interval, and the peak memory.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

HERE = Path(__file__).parent
BLOCKS = "12"
# Steps of the picture, from top to bottom: name in step_cost.csv, label, colour.
STEPS = (
    ("DeNS, mean at p = 0.5", "DeNS on half of the steps", "#1b6ca8"),
    ("SCD beside energy and forces, every step", "SCD beside energy and forces, every step", "#c8553d"),
    ("SCD, pre-training", "SCD, pre-training", "#c8553d"),
    ("SCD, pre-training, `stop_gradient_condition`", "SCD, pre-training, stop_gradient_condition", "#e0a08f"),
    (
        "SCD beside energy and forces, `recompute_clean_pass`",
        "SCD beside energy and forces, recompute_clean_pass",
        "#e0a08f",
    ),
    (
        "SCD beside energy and forces, `activation_checkpoint`",
        "SCD beside energy and forces, activation_checkpoint",
        "#e0a08f",
    ),
)
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "cost",  # the same file from the same figures
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 9,
}


def measured(blocks: str = BLOCKS) -> dict[str, dict[str, float]]:
    """Time, low, high and memory of each step that is drawn, by its name in step_cost.csv."""
    with (HERE / "step_cost.csv").open() as file:
        rows = {row["step"]: row for row in csv.DictReader(file) if row["blocks"] == blocks}
    return {name: {key: float(rows[name][key]) for key in ("time", "low", "high", "memory")} for name, _, _ in STEPS}


def draw(out: Path) -> None:
    """Write the picture."""
    steps = measured()
    with mpl.rc_context(STYLE):
        figure, (times, memories) = plt.subplots(1, 2, figsize=(9, 2.6), sharey=True, width_ratios=(3.4, 2.2))
        for place, (name, _, colour) in enumerate(STEPS):
            step = steps[name]
            spread = [[step["time"] - step["low"]], [step["high"] - step["time"]]]
            style = {"height": 0.62, "color": colour}
            times.barh(place, step["time"], xerr=spread, error_kw={"ecolor": "#333333", "elinewidth": 1}, **style)
            memories.barh(place, step["memory"], **style)
            times.text(step["high"] + 0.05, place, f"{step['time']:.3f}", va="center")
            memories.text(step["memory"] + 0.05, place, f"{step['memory']:.3f}", va="center")
        times.set_yticks(range(len(STEPS)), [label for _, label, _ in STEPS])
        times.invert_yaxis()
        for axes, title, end in ((times, "time of a step", 3.7), (memories, "peak memory", 2.5)):
            axes.axvline(1, color="#333333", linewidth=1, linestyle="--")
            axes.set(title=f"{title} (plain step = 1)", xlim=(0, end))
            axes.title.set_size(9)
            axes.tick_params(length=0)
            for side in ("top", "right", "left"):
                axes.spines[side].set_visible(False)
        figure.tight_layout()
        figure.savefig(out, facecolor="white", metadata={"Date": None, "Creator": None})
        plt.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "cost.svg")
