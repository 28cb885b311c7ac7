"""Figures of docs/evidence.md, and the noise errors of docs/condition.md."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.evidence.condition import SHRINKAGE
from benchmarks.evidence.tables import FIRST, Record, by_seed, epochs, number_of_labels
from fairchem_scd.commands import pictures as style


def draw_labels(records: list[Record], path: Path) -> None:
    """Test errors against the number of labels, a panel for each data: of forces, or of energies where there are none.

    Data and arms are drawn that were run with more than one number of labels. With few labels the energy errors of
    molecules show above all how well the elements' reference energies are fitted, so they are left to the tables.
    """
    groups = by_seed(records, lambda r: (r["run"]["data"], r["run"]["arm"], number_of_labels(r)))
    counts: dict[tuple[str, str], list[int]] = {}
    for data, arm, count in sorted(groups):
        counts.setdefault((data, arm), []).append(count)
    counts = {key: of for key, of in counts.items() if len(of) > 1}
    datas = sorted({data for data, _ in counts})
    arms = sorted({arm for _, arm in counts}, key=lambda a: (a != FIRST, a))
    figure = style.new_figure(style.DOUBLE if len(datas) > 1 else 1.5 * style.SINGLE, 2.5)
    for axes, data in zip(figure.subplots(1, len(datas), squeeze=False)[0], datas, strict=True):
        units = {"force_mae": "force MAE, meV/Å", "energy_mae": "energy MAE, meV/atom"}
        tested = [r["scores"]["test"] for r in records if r["run"]["data"] == data]
        name = next(name for name in units if all(name in errors for errors in tested))
        for i, arm in enumerate(arms):
            tests = [
                [1000 * r["scores"]["test"][name] for r in groups[data, arm, count].values()]
                for count in counts.get((data, arm), [])
            ]
            if tests:
                means = [statistics.mean(values) for values in tests]
                bars = [statistics.stdev(values) if len(values) > 1 else 0 for values in tests]
                look = {"color": style.COLORS[i], "linestyle": style.LINES[i], "marker": style.MARKERS[i]}
                axes.errorbar(counts[data, arm], means, yerr=bars, capsize=2, label=arm, **look)
        axes.set(xscale="log", yscale="log", xlabel="labels", ylabel=units[name], title=data)
        ticks = sorted({count for (d, _), of in counts.items() if d == data for count in of})
        axes.set_xticks(ticks, names_apart(ticks))
        axes.minorticks_off()
        plain_ticks(axes)
    legend_below(figure, ncols=3)
    style.save(figure, path, force=True)


def names_apart(ticks: list[int]) -> list[str]:
    """The numbers as names of ticks on a logarithmic axis; empty where one would touch the name before it."""
    apart, last, names = 0.13 * math.log(ticks[-1] / ticks[0]), -math.inf, []
    for tick in ticks:
        shown = math.log(tick) - last >= apart
        names.append(str(tick) if shown else "")
        last = math.log(tick) if shown else last
    return names


def draw_curves(records: list[Record], path: Path) -> None:
    """Held-out force errors against epochs, mean over seeds, with their range; not the steep fall at the start.

    Arms that were run with one seed alone are left to the table.
    """
    seeds_of = by_seed(records, lambda r: r["run"]["arm"])
    arms = [arm for arm, seeds in seeds_of.items() if len(seeds) > 1]
    records = [r for r in records if r["run"]["arm"] in arms]
    datas = sorted({r["run"]["data"] for r in records})
    figure = style.new_figure(style.DOUBLE, 3.2)
    for axes, data in zip(figure.subplots(1, len(datas), squeeze=False)[0], datas, strict=True):
        groups = by_seed((r for r in records if r["run"]["data"] == data), lambda r: r["run"]["arm"])
        lowest: list[float] = []
        for arm, seeds in groups.items():
            i = arms.index(arm)
            curves = [[1000 * point["force_mae"] for point in r["scores"]["curve"]] for r in seeds.values()]
            first = next(iter(seeds.values()))
            seen = [epochs(first, point["step"]) for point in first["scores"]["curve"]]
            low, high = zip(*((min(c), max(c)) for c in zip(*curves, strict=True)), strict=True)
            means = [statistics.mean(c) for c in zip(*curves, strict=True)]
            look = {"color": style.COLORS[i % len(style.COLORS)], "linestyle": style.LINES[i % len(style.LINES)]}
            axes.plot(seen, means, label=arm, **look)
            axes.fill_between(seen, low, high, color=look["color"], alpha=0.2, linewidth=0)
            lowest.append(min(low))
        axes.set(yscale="log", xlabel="epochs", ylabel="held-out force MAE, meV/Å", title=data)
        axes.set_ylim(0.98 * min(lowest), 1.3 * max(lowest))
        plain_ticks(axes)
    legend_below(figure, ncols=2, fontsize="small")
    style.save(figure, path, force=True)


def draw_ladder(records: list[Record], path: Path) -> None:
    """Noise errors of PaiNN against steps, told the right embedding, another's or none, beside plain denoising.

    Of each data set and form the longest runs, and a line at the best that can be said without a condition, where that
    is known. The form with a mask token is left to the table.
    """
    best = {r["run"]["data"]: r["scores"]["curve"][-1]["none"][0] for r in records if r["run"]["form"] == SHRINKAGE}
    records = [r for r in records if r["run"]["form"] != SHRINKAGE and r["run"]["model"]["backbone"] == "painn"]
    forms = [form for form in ("embedding", "difference") if any(r["run"]["form"] == form for r in records)]
    datas = list(dict.fromkeys(r["run"]["data"] for r in records))
    figure = style.new_figure(style.DOUBLE, 2.1 * len(datas))
    panels = figure.subplots(len(datas), len(forms), squeeze=False, sharey="row", sharex="row")
    for row, data in zip(panels, datas, strict=True):
        for axes, form in zip(row, forms, strict=True):
            of_data = [r for r in records if r["run"]["data"] == data and r["run"]["form"] in (form, "plain")]
            lengths = [r["run"]["length"]["steps"] for r in of_data if r["run"]["form"] == form]
            if not lengths:
                axes.set_visible(False)
                continue
            for record in (r for r in of_data if r["run"]["length"]["steps"] == max(lengths)):
                for i, told in enumerate(("right", "other", "none")):
                    _draw_told(axes, record, told, i)
            if data in best:
                axes.axhline(best[data], color=style.OTHER, label="best without a condition, by theory", zorder=0)
            axes.set(title=f"{data.replace('_', ' ')}: {form}", xlabel="steps")
        row[0].set_ylabel("noise error, MSE / σ²")
    legend_below(figure, ncols=3)
    style.save(figure, path, force=True)


def legend_below(figure: Any, **looks: Any) -> None:
    """One legend for all panels, each label once."""
    known = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles = {label: handle for found in known for handle, label in zip(*found, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", **looks)


_TOLD = {"right": "told the right one", "other": "told another's", "none": "told none"}


def _draw_told(axes: Any, record: Record, told: str, number: int) -> None:
    curve = [(point["step"], *point[told]) for point in record["scores"]["curve"] if told in point]
    if not curve:
        return
    steps, means, bars = zip(*curve, strict=True)
    label = _TOLD[told]
    if record["run"]["form"] == "plain":
        label, number = "plain denoising", 3
    look = {"color": style.COLORS[number], "linestyle": style.LINES[number], "label": label}
    axes.errorbar(steps, means, yerr=bars, capsize=2, **look)


def plain_ticks(axes: Any) -> None:
    """Numbers such as 200 on a logarithmic axis, not powers of ten."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
