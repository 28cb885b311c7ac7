"""Tables and figures of docs/evidence.md, drawn from the files of results.

    python -m benchmarks.report

Tables are written between the marks `<!-- begin NAME -->` and `<!-- end NAME -->` of the page, figures to
docs/figures. Nothing is trained. A figure without results yet is not drawn.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.results import Results
from fairchem_scd.plots import style

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "evidence.md"
FIRST = "plain"
"""The arm that others are compared with."""

Record = dict[str, Any]


# --- numbers ----------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± standard deviation; the number alone where there is one."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def change(values: dict[int, float], plain: dict[int, float]) -> str:
    """Change against the plain runs of the same seeds in percent, mean ± standard deviation over them."""
    shared = sorted(values.keys() & plain.keys())
    if not shared:
        return ""
    percents = [100 * (values[seed] / plain[seed] - 1) for seed in shared]
    deviation = f" ± {statistics.stdev(percents):.0f}" if len(percents) > 1 else ""
    return f"{statistics.mean(percents):+.0f}{deviation} %"


def labels_for(error: float, curve: dict[int, float]) -> float | None:
    """How many labels a curve {labels: error} needs for an error, between its points, straight in log-log.

    None where the error lies outside of what the curve reaches.
    """
    points = sorted(curve.items())
    for (few, high), (many, low) in pairwise(points):
        if high >= error >= low and high > low:
            share = math.log(high / error) / math.log(high / low)
            return few * (many / few) ** share
    return None


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


# --- learning ---------------------------------------------------------------------------------------------------------


def trained(records: Iterable[Record], *suites: str) -> list[Record]:
    """Runs that were trained on labels, of these suites."""
    return [r for r in records if r["suite"] in suites and "arm" in r["run"]]


def by_seed(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, dict[int, Record]]:
    """Records by key, and by seed under it, in order of first sight."""
    groups: dict[Any, dict[int, Record]] = defaultdict(dict)
    for record in records:
        groups[key(record)][record["run"]["seed"]] = record
    return dict(groups)


def labels_of(record: Record) -> int:
    """Number of labels; without one in the settings, a very large number: all."""
    return record["run"]["labels"] or 10**9


def arms_table(records: list[Record]) -> str:
    """Test errors of each arm, and their change against plain training by seed."""

    def setting(record: Record) -> tuple[Any, ...]:
        run = record["run"]
        return run["data"], run["model"]["backbone"], labels_of(record), run["length"]["steps"]

    groups = by_seed(records, lambda record: (*setting(record), record["run"]["arm"]))
    rows = []
    for key in sorted(groups, key=lambda key: key[:-1]):
        data, backbone, labels, steps, arm = key
        seeds, plain = groups[key], groups.get((*key[:-1], FIRST), {})
        cells = []
        for name in ("force_mae", "energy_mae"):
            values = {seed: 1000 * r["scores"]["test"][name] for seed, r in seeds.items()}
            base = {seed: 1000 * r["scores"]["test"][name] for seed, r in plain.items()}
            cells += [spread([*values.values()]), "" if arm == FIRST else change(values, base)]
        count = "all" if labels == 10**9 else str(labels)
        rows.append([data, backbone, count, str(steps), arm, str(len(seeds)), *cells])
    heads = ["data", "backbone", "labels", "steps", "training", "seeds"]
    return table([*heads, "force MAE, meV/Å", "change", "energy MAE, meV/atom", "change"], rows)


def saved_table(records: list[Record]) -> str:
    """How many times fewer labels than plain training an arm needs for its own force error."""
    rows = []
    groups = by_seed(records, lambda r: (r["run"]["data"], r["run"]["arm"], labels_of(r)))
    for data, arm, labels in sorted(groups, key=lambda key: (key[0], key[2], key[1])):
        if arm == FIRST or labels == 10**9:
            continue
        factors, beyond = [], 0
        for seed, record in groups[data, arm, labels].items():
            curve = {
                _count(seeds[seed]): seeds[seed]["scores"]["test"]["force_mae"]
                for (d, a, _), seeds in groups.items()
                if d == data and a == FIRST and seed in seeds
            }
            needed = labels_for(record["scores"]["test"]["force_mae"], curve)
            if needed is not None:
                factors.append(needed / labels)
            elif curve and record["scores"]["test"]["force_mae"] < min(curve.values()):
                beyond += 1
        shown = spread(factors) if factors else ""
        more = f"{beyond} of them better than plain training with all labels" if beyond else ""
        rows.append([data, arm, str(labels), str(len(groups[data, arm, labels])), shown, more])
    return table(["data", "training", "labels", "seeds", "plain training needs so many times more", ""], rows)


def _count(record: Record) -> int:
    return record["run"]["labels"] or record["scores"].get("labels") or _ALL[record["run"]["data"]]


_ALL = {"Mo": 155, "Li": 193, "oxides": 189, "slabs": 960}


def cost_table(records: list[Record]) -> str:
    """Processor time of a step, and of pre-training in steps of plain training."""
    rows = []
    plain = {}
    for data, seconds in _grouped_seconds(r for r in records if r["run"].get("arm") == FIRST).items():
        plain[data] = statistics.median(seconds)
        rows.append([*data, "plain training", f"{plain[data]:.3f}", "1.00", ""])
    before: dict[Any, list[Record]] = defaultdict(list)
    for record in records:
        if "arm" not in record["run"]:
            kind = "plain denoising" if record["run"]["pretraining"]["scd"].get("condition") == [] else "SCD"
            before[record["run"]["data"], record["run"]["model"]["backbone"], kind].append(record)
    for (data, backbone, kind), runs in before.items():
        seconds = statistics.median(r["scores"]["seconds_per_step"] for r in runs)
        base = plain.get((data, backbone))
        whole = statistics.median(r["scores"]["seconds_per_step"] * r["scores"]["steps"] for r in runs)
        cells = [f"{seconds / base:.2f}", f"{whole / base:.0f}"] if base else ["", ""]
        rows.append([data, backbone, f"pre-training, {kind}", f"{seconds:.3f}", *cells])
    return table(["data", "backbone", "step of", "seconds", "in plain steps", "all of it, in plain steps"], rows)


def _grouped_seconds(records: Iterable[Record]) -> dict[tuple[str, str], list[float]]:
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in records:
        groups[record["run"]["data"], record["run"]["model"]["backbone"]].append(record["scores"]["seconds_per_step"])
    return groups


# --- the condition ----------------------------------------------------------------------------------------------------


def ladder_table(records: list[Record]) -> str:
    """Noise errors at the end of each run, and what the condition explains."""
    plain = {_but_form(r): r for r in records if r["run"]["form"] == "plain"}
    rows = []
    for record in sorted(records, key=lambda r: (r["run"]["data"], r["run"]["model"]["channels"], r["run"]["seed"])):
        run, last = record["run"], record["scores"]["curve"][-1]
        cells = [_with_error(last.get(told)) for told in ("right", "other", "none")]
        beside = plain.get(_but_form(record))
        ratio = ""
        if beside is not None and run["form"] != "plain":
            ratio = ratio_of(record["scores"]["structures"]["right"], beside["scores"]["structures"]["none"])
        head = [run["data"], str(run["model"]["channels"]), str(record["scores"]["steps"]), str(run["seed"])]
        rows.append([*head, run["form"], *cells, ratio, f"{last['dimensions']:.1f}" if "dimensions" in last else ""])
    heads = ["data", "channels", "steps", "seed", "told", "right", "another's", "none", "right / plain denoising"]
    return table([*heads, "dimensions"], rows)


def ratio_of(errors: Sequence[float], others: Sequence[float]) -> str:
    """Ratio of the means of paired errors, with its standard error over structures."""
    top, bottom = statistics.mean(errors), statistics.mean(others)
    ratio = top / bottom
    rest = [a - ratio * b for a, b in zip(errors, others, strict=True)]
    return f"{ratio:.3f} ± {statistics.stdev(rest) / bottom / math.sqrt(len(rest)):.3f}"


def _with_error(pair: Sequence[float] | None) -> str:
    return "" if pair is None else f"{pair[0]:.4f} ± {pair[1]:.4f}"


def _but_form(record: Record) -> str:
    return repr(sorted((key, repr(value)) for key, value in record["run"].items() if key != "form"))


# --- figures ----------------------------------------------------------------------------------------------------------


def draw_labels(records: list[Record], path: Path) -> None:
    """Test errors against the number of labels, one panel for each data and error."""
    datas = sorted({r["run"]["data"] for r in records})
    groups = by_seed(records, lambda r: (r["run"]["data"], r["run"]["arm"], _count(r)))
    arms = list(dict.fromkeys(r["run"]["arm"] for r in records))
    figure = style.new_figure(style.DOUBLE, 2.4 * len(datas))
    panels = figure.subplots(len(datas), 2, squeeze=False)
    units = (("force_mae", "force MAE, meV/Å"), ("energy_mae", "energy MAE, meV/atom"))
    for row, data in zip(panels, datas, strict=True):
        for axes, (name, label) in zip(row, units, strict=True):
            for i, arm in enumerate(arms):
                counts = sorted(n for d, a, n in groups if d == data and a == arm)
                values = [[1000 * r["scores"]["test"][name] for r in groups[data, arm, n].values()] for n in counts]
                means = [statistics.mean(v) for v in values]
                bars = [statistics.stdev(v) if len(v) > 1 else 0 for v in values]
                look = {"color": style.COLORS[i], "linestyle": style.LINES[i], "marker": style.MARKERS[i]}
                axes.errorbar(counts, means, yerr=bars, capsize=2, label=arm, **look)
            ticks = sorted({n for d, _, n in groups if d == data})
            axes.set(xscale="log", yscale="log", xlabel="labels", ylabel=label, title=data)
            axes.set_xticks(ticks, [str(n) for n in ticks])
            axes.minorticks_off()
            _plain_ticks(axes)
    panels[0][0].legend()
    style.save(figure, path, force=True)


def draw_curves(records: list[Record], path: Path) -> None:
    """Held-out force errors against steps, mean over seeds, with the range of them."""
    datas = sorted({r["run"]["data"] for r in records})
    figure = style.new_figure(style.DOUBLE, 2.6)
    for axes, data in zip(figure.subplots(1, len(datas), squeeze=False)[0], datas, strict=True):
        groups = by_seed((r for r in records if r["run"]["data"] == data), lambda r: r["run"]["arm"])
        for i, (arm, seeds) in enumerate(groups.items()):
            curves = [[1000 * point["force_mae"] for point in r["scores"]["curve"]] for r in seeds.values()]
            steps = [point["step"] for point in next(iter(seeds.values()))["scores"]["curve"]]
            low, high = zip(*((min(c), max(c)) for c in zip(*curves, strict=True)), strict=True)
            means = [statistics.mean(c) for c in zip(*curves, strict=True)]
            axes.plot(steps, means, color=style.COLORS[i], linestyle=style.LINES[i % len(style.LINES)], label=arm)
            axes.fill_between(steps, low, high, color=style.COLORS[i], alpha=0.2, linewidth=0)
        axes.set(yscale="log", xlabel="steps", ylabel="held-out force MAE, meV/Å", title=data)
        _plain_ticks(axes)
    axes.legend()
    style.save(figure, path, force=True)


def draw_ladder(records: list[Record], path: Path) -> None:
    """Noise errors against steps, told the right embedding, another's or none, beside plain denoising."""
    forms = [
        form for form in ("embedding", "mask token", "difference") if any(r["run"]["form"] == form for r in records)
    ]
    datas = list(dict.fromkeys(r["run"]["data"] for r in records))
    figure = style.new_figure(style.DOUBLE, 2.1 * len(datas))
    panels = figure.subplots(len(datas), len(forms), squeeze=False, sharey="row", sharex="row")
    for row, data in zip(panels, datas, strict=True):
        for axes, form in zip(row, forms, strict=True):
            for record in records:
                if record["run"]["data"] != data or record["run"]["form"] not in (form, "plain"):
                    continue
                for i, told in enumerate(("right", "other", "none")):
                    _draw_told(axes, record, told, i)
            axes.set(title=f"{data}: {form}", xlabel="steps")
        row[0].set_ylabel("noise error, MSE / σ²")
    handles = {h.get_label(): h for h in panels[0][0].get_lines() if not h.get_label().startswith("_")}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    style.save(figure, path, force=True)


def _draw_told(axes: Any, record: Record, told: str, number: int) -> None:
    curve = [(point["step"], *point[told]) for point in record["scores"]["curve"] if told in point]
    if not curve:
        return
    steps, means, bars = zip(*curve, strict=True)
    plain = record["run"]["form"] == "plain"
    label, number = (
        ("plain denoising", 3)
        if plain
        else ({"right": "told the right one", "other": "another's", "none": "none"}[told], number)
    )
    look = {"color": style.COLORS[number], "linestyle": style.LINES[number], "label": label}
    axes.errorbar(steps, means, yerr=bars, capsize=2, **look)


def _plain_ticks(axes: Any) -> None:
    """Numbers such as 200 on a logarithmic axis, not powers of ten."""
    from matplotlib.ticker import LogLocator, ScalarFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())


# --- the page ---------------------------------------------------------------------------------------------------------


def tables(learning: list[Record], condition: list[Record]) -> dict[str, str]:
    """All tables of the page, by the name of their mark."""
    few = trained(learning, "few")
    return {
        "few": arms_table(few),
        "saved": saved_table(few),
        "equiformer": arms_table(trained(learning, "equiformer")),
        "beside": arms_table(trained(learning, "long")),
        "tune": arms_table(trained(learning, "tune")),
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
            (draw_labels, trained(learning, "few"), "few_labels"),
            (draw_curves, trained(learning, "long"), "beside_labels"),
            (draw_ladder, condition, "condition"),
        ):
            if records:
                draw(records, figures / f"{name}.png")


if __name__ == "__main__":
    main()
