"""A picture of a training run: terms of the loss, errors of forces, energy and noise, and what the condition gains."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fairchem_scd.commands import pictures
from fairchem_scd.commands.plot.curves import Curve, binned, running_median, same_curves
from fairchem_scd.errors import ConfigError

ENDINGS = ("_mae", "loss", "_mae_other", "_mae_none", "_mae_zero", "condition_gain", "_over_none", "_error")
"""Endings of the tags that a picture shows."""

_DENSE = 120
"""A training curve with this many points or more is a faint line with its running median."""

_BAND = 2000
"""With this many points or more the faint line is a band, from the 5th to the 95th percentile. The file stays small."""

_HEIGHT = 2.1


@dataclass(frozen=True)
class _Line:
    """How a curve is drawn.

    Attributes:
        error: tag of its standard error; "": it has none.
        marker: of a curve of validation; "": it is a yardstick, drawn without.
        unit: the curve's values are multiplied by it.
    """

    tag: str
    label: str
    color: str
    dashes: str = "-"
    error: str = ""
    marker: str = "o"
    unit: float = 1.0


@dataclass(frozen=True)
class _Panel:
    """Curves in one pair of axes.

    Attributes:
        log: logarithmic, where the values differ much.
        least: show at least this range, with a line at zero. Else differences that mean nothing would look large.
        output: data sets may have outputs of their own of this kind, `<data set>_<output>`, which are drawn too.
    """

    label: str
    lines: tuple[_Line, ...]
    log: bool = False
    least: tuple[float, float] | None = None
    output: str | None = None


# Each quantity has a colour. Dashed lines are of corrupted structures. Lines with markers are of validation.
_BLACK = "#000000"
_ENERGY, _FORCES, _NOISE = pictures.COLORS[0], pictures.COLORS[1], pictures.COLORS[3]
_OTHER, _NONE, _GREY = pictures.COLORS[1], pictures.COLORS[0], "#777777"
_SPARE = (pictures.COLORS[5], pictures.COLORS[2], pictures.COLORS[4], pictures.COLORS[6])


def _gain(name: str, label: str, color: str, marker: str) -> _Line:
    return _Line(f"val/{name}", label, color, error=f"val/{name}_error", marker=marker, unit=100)


_LOSSES = (
    _Line("train/energy_loss", "energy", _ENERGY),
    _Line("train/forces_loss", "forces", _FORCES),
    _Line("train/denoising_pos_loss", "noise", _NOISE),
    _Line("train/denoising_energy_loss", "energy, denoising", _ENERGY, "--"),
    _Line("train/denoising_force_loss", "forces, denoising", _FORCES, "--"),
)
_ERRORS = (
    _Panel(
        "force error (eV/Å)",
        (
            _Line("train/forces_mae", "training", _FORCES),
            _Line("train/denoising_force_mae", "denoising", _FORCES, "--"),
            _Line("val/forces_mae", "validation", _BLACK),
        ),
        output="forces",
    ),
    _Panel(
        "energy error (eV)",
        (
            _Line("train/energy_mae", "training", _ENERGY),
            _Line("train/denoising_energy_mae", "denoising", _ENERGY, "--"),
            _Line("val/energy_mae", "validation", _BLACK),
        ),
        output="energy",
    ),
    _Panel(
        "denoising error (Å)",
        (
            _Line("train/denoising_pos_mae", "training", _NOISE),
            _Line("val/denoising_pos_mae", "validation", _BLACK),
            _Line("val/denoising_pos_mae_other", "told another's", _OTHER, "--", marker="s"),
            _Line("val/denoising_pos_mae_none", "told none", _NONE, "-.", marker="^"),
            _Line("val/denoising_pos_mae_zero", "predicting nothing", _GREY, ":", marker=""),
        ),
    ),
    _Panel(
        "condition's gain (%)",
        (
            _gain("denoising_condition_gain", "over another's", _OTHER, "s"),
            _gain("denoising_condition_gain_over_none", "over none", _NONE, "^"),
        ),
        least=(-1, 5),
    ),
)


def draw(curves: Mapping[str, Curve], *, width: float = pictures.DOUBLE) -> Figure:
    """Draw a run; a panel without data is left out.

    Training curves are thin lines of what the run logged: the mean since it last printed, over the steps that had the
    term. Where a curve has many points it is faint, and its running median is drawn over it. Validation has markers.

    Args:
        curves: by tag, such as `train/forces_mae` (eV/Å), `train/energy_mae` (eV), `train/denoising_pos_mae` (Å),
            `val/denoising_condition_gain` (1).
        width: of the figure, inches. A figure as wide as two columns has panels side by side.

    Raises:
        ConfigError: none of the curves is one that is drawn.
    """
    panels = [
        replace(panel, lines=lines)
        for panel in (_losses(curves), *_errors(curves))
        if (lines := tuple(line for line in panel.lines if line.tag in curves))
    ]
    if not panels:
        raise ConfigError("the log has no loss and no error of energy, forces or noise")
    with pictures.printed():
        figure, axes = _layout(len(panels), width)
        last = max(int(curves[line.tag].steps[-1]) for panel in panels for line in panel.lines)
        for panel, ax in zip(panels, axes, strict=True):
            _draw_panel(ax, panel, curves)
            ax.set_xlim(0, max(last, 1) * 1.02)
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        for ax in axes:
            cell = ax.get_subplotspec()
            ax.set_xlabel("training step" if cell.is_last_row() else "")
            # A panel across both columns has its ticks elsewhere than the panels below.
            ax.tick_params(labelbottom=cell.is_last_row() or len(cell.colspan) > 1)
    return figure


def _losses(curves: Mapping[str, Curve]) -> _Panel:
    """The terms of the loss that the run has, and their sum unless it equals the only term."""
    known = {line.tag for line in _LOSSES}
    others = sorted(t for t in curves if t.startswith("train/") and t.endswith("_loss") and t not in known)
    # These are of outputs that most runs do not have, such as stress.
    named = [_output_of(tag.removeprefix("train/").removesuffix("_loss")) for tag in others]
    hues = dict(zip(dict.fromkeys(name for name, _ in named), cycle(_SPARE), strict=False))
    rare = []
    for tag, (name, corrupted) in zip(others, named, strict=True):
        label = name.replace("_", " ") + (", denoising" if corrupted else "")
        rare.append(_Line(tag, label, hues[name], "--" if corrupted else "-"))
    parts = sorted((line for line in (*_LOSSES, *rare) if line.tag in curves), key=lambda line: line.dashes == "--")
    total, validation = _Line("train/loss", "total", _BLACK), _Line("val/loss", "total, validation", _BLACK)
    if len(parts) == 1 and "train/loss" in curves and same_curves(curves[parts[0].tag], curves["train/loss"]):
        total, validation = parts.pop(), _Line("val/loss", "validation", _BLACK)
    split = sum(line.dashes == "-" for line in parts)
    return _Panel("loss", (total, *parts[:split], validation, *parts[split:]), log=True)


def _output_of(stem: str) -> tuple[str, bool]:
    """The output that a tag's stem is of, and whether it is of corrupted structures: of them, forces are "force"."""
    name = stem.removeprefix("denoising_")
    if name == stem:
        return name, False
    return (f"{name}s" if name.endswith("_force") else name), True


def _errors(curves: Mapping[str, Curve]) -> list[_Panel]:
    """The panels of errors. Those of data sets with outputs of their own have a line each."""
    panels = [replace(panel, lines=(*panel.lines, *_of_data_sets(panel, curves))) for panel in _ERRORS]
    return [*panels, *_other_errors(curves, {line.tag for panel in panels for line in panel.lines})]


def _of_data_sets(panel: _Panel, curves: Mapping[str, Curve]) -> list[_Line]:
    """Lines of the outputs of a panel's kind that data sets have of their own; each data set has a colour."""
    lines: list[tuple[str, str, str]] = []
    for tag in sorted(curves) if panel.output else ():
        split, _, stem = tag.removesuffix("_mae").partition("/")
        output, corrupted = _output_of(stem)
        if tag.endswith("_mae") and output.endswith(f"_{panel.output}"):
            kind = "denoising" if corrupted else "validation" if split == "val" else "training"
            lines.append((tag, output.removesuffix(f"_{panel.output}"), kind))
    hues = dict(zip(dict.fromkeys(name for _, name, _ in lines), cycle(_SPARE), strict=False))
    return [
        _Line(tag, f"{name}, {kind}", hues[name], "--" if kind == "denoising" else "-") for tag, name, kind in lines
    ]


def _other_errors(curves: Mapping[str, Curve], drawn: Collection[str]) -> list[_Panel]:
    """A panel for each output that few runs have, such as a scalar property; its unit is that of the data."""
    tags = [t for t in curves if t not in drawn and re.fullmatch(r"(train|val)/(?!denoising_pos_)\w+_mae", t)]
    # Components of forces, which are among the host's metrics, are no outputs: they have no loss.
    names = sorted({re.sub(r"^\w+/(denoising_)?|_mae$", "", tag) for tag in tags})
    names = [n for n in names if {f"train/{n}_loss", f"train/denoising_{n}_loss"} & set(curves)]
    return [
        _Panel(
            f"{name.replace('_', ' ')} error",
            (
                _Line(f"train/{name}_mae", "training", _SPARE[0]),
                _Line(f"train/denoising_{name}_mae", "denoising", _SPARE[0], "--"),
                _Line(f"val/{name}_mae", "validation", _BLACK),
            ),
        )
        for name in names
    ]


def _layout(count: int, width: float) -> tuple[Figure, list[Axes]]:
    """Panels in one column or in two. Where their number is odd, the first is across both columns."""
    columns = 2 if width >= pictures.DOUBLE and count > 1 else 1
    rows = -(-count // columns)
    figure = pictures.new_figure(width, _HEIGHT * rows + 0.4)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    grid = figure.add_gridspec(rows, columns)
    if count % columns == 0:
        cells = [grid[i // columns, i % columns] for i in range(count)]
    else:
        cells = [grid[0, :], *(grid[1 + i // columns, i % columns] for i in range(count - 1))]
    return figure, [figure.add_subplot(cell) for cell in cells]


def _draw_panel(ax: Axes, panel: _Panel, curves: Mapping[str, Curve]) -> None:
    for line in panel.lines:
        curve = curves[line.tag]
        if line.tag.startswith("val/"):
            _draw_validation(ax, curve, line, curves.get(line.error))
        else:
            _draw_training(ax, curve, line)
    if panel.least:
        ax.axhline(0, color=_GREY, linestyle=":", linewidth=0.9)
        low, high = ax.get_ylim()
        ax.set_ylim(min(low, panel.least[0]), max(high, panel.least[1]))
    values = np.concatenate([curves[line.tag].values for line in panel.lines])
    values = values[np.isfinite(values) & (values > 0)]
    span = values.max() / values.min() if len(values) else 1
    if panel.log and span > 5:
        pictures.log_scale(ax, span)
    ax.set_ylabel(panel.label)
    across = len(ax.get_subplotspec().colspan) > 1
    columns = 5 if across else 3 if len(panel.lines) <= 3 else 2
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=min(columns, len(panel.lines)),
        borderaxespad=0.2,
        columnspacing=1.0,
        handlelength=1.8,
        labelspacing=0.3,
    )


def _draw_validation(ax: Axes, curve: Curve, line: _Line, error: Curve | None) -> None:
    """A curve with markers; where it has a standard error, with bars at the markers."""
    values, every = line.unit * curve.values, max(1, len(curve.steps) // 25)
    shown = {"color": line.color, "linestyle": line.dashes, "linewidth": 0.9}
    marked = {"marker": line.marker, "markersize": 3, "markevery": every} if line.marker else {}
    ax.plot(curve.steps, values, label=line.label, zorder=4 if line.marker else 3, **shown, **marked)
    if error is not None and np.array_equal(error.steps, curve.steps):
        at = slice(None, None, every)
        bars = {"yerr": line.unit * error.values[at], "ecolor": line.color, "elinewidth": 0.6, "capsize": 1.5}
        ax.errorbar(curve.steps[at], values[at], linestyle="none", zorder=3, **bars)


def _draw_training(ax: Axes, curve: Curve, line: _Line) -> None:
    shown = {"color": line.color, "label": line.label, "linestyle": line.dashes}
    count = len(curve.steps)
    if count < _DENSE:
        ax.plot(curve.steps, curve.values, linewidth=0.9, **shown)
        return
    if count < _BAND:
        ax.plot(curve.steps, curve.values, color=line.color, alpha=0.3, linewidth=0.4)
    else:
        steps, low, high = binned(curve, 5, 95)
        ax.fill_between(steps, low, high, color=line.color, alpha=0.2, linewidth=0)
    ax.plot(*running_median(curve), linewidth=1.2, **shown)
