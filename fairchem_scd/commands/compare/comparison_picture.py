"""A picture of a comparison: each validation error against the training step, a colour for each arm."""

from __future__ import annotations

import math

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from fairchem_scd.commands import pictures
from fairchem_scd.commands.compare.comparison import Comparison


def draw(found: Comparison) -> Figure:
    """A panel for each error; a line for each run."""
    with pictures.printed():
        columns = 2 if len(found.errors) == 4 else min(len(found.errors), 3)
        rows = math.ceil(len(found.errors) / columns)
        width = pictures.SINGLE if columns == 1 else pictures.DOUBLE
        figure = pictures.new_figure(width, 2.4 * rows)
        panels = [*figure.subplots(rows, columns, squeeze=False).flat]
        for axes, error in zip(panels, found.errors, strict=False):
            for i, (arm, curves) in enumerate(error.curves.items()):
                i %= len(pictures.LINES)
                for number, curve in enumerate(curves):
                    axes.plot(
                        curve.steps,
                        curve.values,
                        color=pictures.COLORS[i],
                        linestyle=pictures.LINES[i],
                        marker=pictures.MARKERS[i] if len(curve.steps) < 30 else "",
                        linewidth=0.9,
                        markersize=2.5,
                        label=arm if number == 0 else None,
                    )
            axes.set(xlabel="training step", ylabel=error.name + (f" ({error.unit})" if error.unit else ""))
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        for axes in panels[len(found.errors) :]:
            axes.set_visible(False)
        figure.axes[0].legend()
        return figure
