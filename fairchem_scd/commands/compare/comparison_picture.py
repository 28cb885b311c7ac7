"""A picture of a comparison: each validation error against the training step, a colour for each arm."""

from __future__ import annotations

import math
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fairchem_scd.commands import pictures
from fairchem_scd.commands.compare.comparison import Comparison

_MARKED = 30
"""Curves of fewer points have markers: that of a run is the same in all panels, so that an odd seed can be found."""

_WIDE = 3
"""Errors that differ by this factor have a logarithmic axis."""


def draw(found: Comparison) -> Figure:
    """A panel for each error; a colour and line for each config, a marker for each run of it."""
    with pictures.printed():
        count = len(found.errors)
        columns = 2 if count == 4 else min(count, 3)
        rows = math.ceil(count / columns)
        figure = pictures.new_figure(pictures.SINGLE if columns == 1 else pictures.DOUBLE, 2.4 * rows)
        panels = [*figure.subplots(rows, columns, squeeze=False).flat]
        for axes, error in zip(panels, found.errors, strict=False):
            styles = zip(cycle(pictures.COLORS), cycle(pictures.LINES), strict=False)
            for (name, curves), (color, line) in zip(error.curves.items(), styles, strict=False):
                for number, (curve, marker) in enumerate(zip(curves, cycle(pictures.MARKERS), strict=False)):
                    axes.plot(
                        curve.steps,
                        curve.values,
                        color=color,
                        linestyle=line,
                        marker=marker if len(curve.steps) < _MARKED else "",
                        linewidth=0.9,
                        markersize=2.5,
                        label=name if number == 0 else None,
                    )
            values = np.concatenate([curve.values for curves in error.curves.values() for curve in curves])
            if (span := np.nanmax(values) / np.nanmin(values)) > _WIDE:
                pictures.log_scale(axes, span)
            axes.set(xlabel="training step", ylabel=error.heading)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        for axes in panels[count:]:
            axes.set_visible(False)
        panels[0].legend()
        return figure
