"""Where SCD's condition begins to count: runs that differ from a usual one in one setting each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes

from benchmarks.evidence.condition_tables import but_form, ratio_of, with_error
from benchmarks.evidence.structures import CELLS
from benchmarks.evidence.tables import Record, table
from fairchem_scd.commands import pictures as style
from fairchem_scd.denoising.condition_report import Gain

VARIED: dict[str, Callable[[Record], float | None]] = {
    "training structures": lambda record: record["run"]["count"],
    "σ, Å": lambda record: record["run"]["std"],
    "channels": lambda record: record["run"]["model"]["channels"],
    "blocks": lambda record: record["run"]["model"]["layers"],
    "batch size": lambda record: record["run"]["length"]["batch_size"],
}
"""Settings by the name of their column; None for training structures: all of them."""


@dataclass(frozen=True)
class Point:
    """A run with an embedding, beside plain denoising with the same settings.

    Attributes:
        values: the run's settings, by the names in `VARIED`.
        changed: the setting that differs from the usual; None: none does.
        run: the line of the run with an embedding.
        plain: the line of plain denoising.
    """

    values: dict[str, float | None]
    changed: str | None
    run: Record
    plain: Record

    @property
    def errors(self) -> tuple[list[float], list[float]]:
        """Noise errors of each held-out structure: told the right embedding, and by plain denoising."""
        return self.run["scores"]["structures"]["right"], self.plain["scores"]["structures"]["none"]

    @property
    def gain(self) -> Gain:
        """By how much the right embedding lowers the noise error of plain denoising."""
        right, none = map(torch.tensor, self.errors)
        return Gain.of(right, none)


def points(records: Sequence[Record]) -> list[Point]:
    """The runs of one data set and seed that have plain denoising beside them.

    What is usual is what most runs have.
    """
    plain = {but_form(record): record for record in records if record["run"]["form"] == "plain"}
    usual = {name: Counter(map(of, records)).most_common(1)[0][0] for name, of in VARIED.items() if records}
    found = []
    for record in records:
        beside = plain.get(but_form(record))
        if record["run"]["form"] != "plain" and beside is not None:
            values = {name: of(record) for name, of in VARIED.items()}
            changed = next((name for name, value in values.items() if value != usual[name]), None)
            found.append(Point(values, changed, record, beside))
    return found


def by_data(records: Sequence[Record]) -> dict[tuple[str, int], list[Point]]:
    """The points of each data set and seed."""
    keys = dict.fromkeys((record["run"]["data"], record["run"]["seed"]) for record in records)
    return {
        key: points([record for record in records if (record["run"]["data"], record["run"]["seed"]) == key])
        for key in keys
    }


def frontier_table(records: Sequence[Record]) -> str:
    """What the condition is worth, a row for each setting that was changed."""
    order = [None, *VARIED]
    rows = []
    for (data, seed), found in by_data(records).items():
        for point in sorted(found, key=lambda p: (order.index(p.changed), p.values[p.changed or "channels"] or 0)):
            values = point.values if point.changed is None else {point.changed: point.values[point.changed]}
            said = ", ".join(f"{name} {'all' if value is None else value}" for name, value in values.items())
            last = point.run["scores"]["curve"][-1]
            difference, its_error = last["other_minus_right"]
            rows.append(
                [
                    *(data, str(seed), said),
                    with_error(point.plain["scores"]["curve"][-1]["none"]),
                    ratio_of(*point.errors),
                    f"{difference / its_error:.1f}",
                    f"{last['dimensions']:.1f}",
                ]
            )
    heads = ["data", "seed", "settings", "plain denoising", "right / plain denoising"]
    return table([*heads, "(another's − right) / its error", "dimensions"], rows)


def draw_frontier(records: Sequence[Record], path: Path, *, ladder: Sequence[Record] = ()) -> None:
    """The share of plain denoising's noise error that is left with the right embedding.

    Args:
        records: of runs that differ in one setting; a row of panels for each data set, a panel for each setting.
        path: of the picture.
        ladder: runs on cells made here; a panel of the last row has the longest of them, against the steps.
    """
    groups = {key: found for key, found in by_data(records).items() if any(point.changed for point in found)}
    rows = {
        data: {
            name: {seed: found for (of, seed), found in groups.items() if of == data} for name in _changed(groups, data)
        }
        for data in dict.fromkeys(data for data, _ in groups)
    }
    steps = _curves(ladder)
    figure = style.new_figure(style.DOUBLE, 1.9 * len(rows))
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, (data, settings) in zip(parts, rows.items(), strict=True):
        last = part is parts[-1] and bool(steps)
        panels = part.subplots(1, len(settings) + last, sharey=True, squeeze=False)[0]
        for axes, (setting, seeds) in zip(panels, settings.items(), strict=False):
            _draw_setting(axes, setting, seeds)
        if last:
            _draw_steps(panels[-1], steps)
            panels[0].set_title(data.replace("_", " "))
        else:
            part.suptitle(data.replace("_", " "), fontsize="large")
        for axes in panels:
            axes.axhline(1, color=style.OTHER, linewidth=0.8)
        panels[0].set_ylabel("right embedding\n/ plain denoising")
    style.save(figure, path, force=True)


def _changed(groups: Mapping[tuple[str, int], list[Point]], data: str) -> list[str]:
    """The settings that were changed on a data set."""
    found = {point.changed for (of, _), found in groups.items() if of == data for point in found}
    return [name for name in VARIED if name in found]


def _draw_setting(axes: Axes, setting: str, seeds: Mapping[int, list[Point]]) -> None:
    ticks: dict[float, str] = {}
    for i, (seed, found) in enumerate(seeds.items()):
        shown = [(_place(p, setting), p) for p in found if p.changed in (setting, None)]
        shown.sort(key=lambda pair: pair[0])
        ticks |= {at: "all" if p.values[setting] is None else f"{p.values[setting]:g}" for at, p in shown}
        axes.errorbar(
            [at for at, _ in shown],
            [1 - p.gain.value for _, p in shown],
            yerr=[p.gain.error for _, p in shown],
            capsize=2,
            label=f"seed {seed}",
            **{"color": style.COLORS[i], "linestyle": style.LINES[i], "marker": style.MARKERS[i]},
        )
    axes.set(xscale="log", xlabel=setting)
    axes.set_xticks([*ticks], _apart(ticks))
    axes.minorticks_off()
    if len(seeds) > 1:
        axes.legend()


def _apart(ticks: Mapping[float, str]) -> list[str]:
    """The labels of ticks of a logarithmic axis, empty where one would touch the label before it."""
    needed = 0.22 * math.log(max(ticks) / min(ticks))
    labels, last = {}, -math.inf
    for at in sorted(ticks):
        labels[at] = ticks[at] if math.log(at) - last >= needed else ""
        last = math.log(at) if labels[at] else last
    return [labels[at] for at in ticks]


def _curves(ladder: Sequence[Record]) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and right / plain denoising at them, of the longest runs with SCD's embedding on each kind of cells."""
    plain = {but_form(record): record for record in ladder if record["run"]["form"] == "plain"}
    longest: dict[str, tuple[list[int], list[float]]] = {}
    for record in sorted(ladder, key=lambda r: r["scores"]["steps"]):
        run, beside = record["run"], plain.get(but_form(record))
        if run["data"] in CELLS and run["form"] == "embedding" and run["model"]["backbone"] == "painn" and beside:
            curves = record["scores"]["curve"], beside["scores"]["curve"]
            shares = [point["right"][0] / other["none"][0] for point, other in zip(*curves, strict=True)]
            longest[run["data"]] = [point["step"] for point in curves[0]], shares
    return dict(sorted(longest.items(), key=lambda item: [*CELLS].index(item[0])))


def _draw_steps(axes: Axes, curves: Mapping[str, tuple[list[int], list[float]]]) -> None:
    for i, (data, (steps, shares)) in enumerate(curves.items()):
        look = {"color": style.COLORS[i], "linestyle": style.LINES[i], "marker": style.MARKERS[i]}
        axes.plot(steps, shares, label=data.replace("_", " "), **look)
    axes.set(xlabel="steps", title="cells of two, four and eight atoms")
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.68))


def _place(point: Point, setting: str) -> float:
    """Where a point stands on the axis of a setting; all structures: as many as the run says it had."""
    value = point.values[setting]
    return point.run["structures"] if value is None else value
