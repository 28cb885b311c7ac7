"""The style of all pictures: as wide as journal columns, text of 8 pt, colours that differ in print without colour too.

    with pictures.printed():
        figure = pictures.new_figure(pictures.SINGLE, 2.6)
        axes = figure.subplots()
        axes.plot(x, y, color=pictures.COLORS[0], linestyle=pictures.LINES[0])
        pictures.save(figure, "curves.pdf")

Figures are made without pyplot, so nothing global is kept and no display is needed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from fairchem_scd.commands.files import check_output, whole_file
from fairchem_scd.errors import ConfigError

SINGLE, DOUBLE = 3.5, 7.0
"""Widths of one and of two columns, inches."""

COLORS = ("#332288", "#CC6677", "#88CCEE", "#117733", "#DDCC77", "#882255", "#44AA99")
"""For categories, in order of use (Paul Tol's muted scheme). Two that follow each other differ in lightness."""

OTHER = "#BBBBBB"
"""For everything that has no colour of its own."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", ".")
LINES: tuple[str | tuple[int, tuple[float, ...]], ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
"""A marker and a line style for each of `COLORS`, in its order."""

SEQUENTIAL = "viridis"
"""Colour map for numbers: the larger, the lighter. It can be read without seeing colours."""

FORMATS = (".png", ".pdf", ".svg")
"""Endings of the files that `save` writes."""

_RC = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Arial", "Helvetica", "DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "figure.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "xtick.direction": "out",
    "ytick.direction": "out",
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "image.cmap": SEQUENTIAL,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
    "svg.hashsalt": "fairchem-scd",  # the same picture is the same file
}


def printed() -> AbstractContextManager[None]:
    """While entered, matplotlib draws in this style. Both drawing and saving belong inside."""
    return mpl.rc_context(_RC)


def new_figure(width: float = SINGLE, height: float = 2.6) -> Figure:
    """An empty figure of width × height in inches. It makes room for labels and legends by itself."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def log_scale(axes: Axes, span: float) -> None:
    """A logarithmic y axis, with ticks that can be read.

    Args:
        span: the largest value over the smallest.
    """
    axes.set_yscale("log")
    if span < 100:
        # Powers of ten alone would be one or two ticks.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())


def check_picture(path: str | Path, *, force: bool = False) -> Path:
    """Check that a picture can be written. Called before the work whose result it shows.

    Raises:
        ConfigError: its ending is not one of `FORMATS`, or as `files.check_output`.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"{path}: a picture's name ends in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    return check_output(path, force=force)


def save(figure: Figure, path: str | Path, *, force: bool = False) -> None:
    """Write a figure, whole or not at all, in the format its ending names: png (300 dpi), pdf or svg.

    Raises:
        ConfigError: as `check_picture`, or the disk is full.
    """
    path = check_picture(path, force=force)
    kind = path.suffix.lower()[1:]
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
    with printed(), whole_file(path, force=force) as part:
        figure.savefig(part, format=kind, metadata=undated)
