"""The tables and figures that the studies' lines are made into."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from fairchem.core.common.utils import setup_imports

from benchmarks.evidence import (
    components,
    condition,
    condition_tables,
    frontier,
    learning,
    report,
    tables,
)

setup_imports()


def record(arm: str, seed: int, force: float, labels: int | None = 12, energy: float = 0.01) -> dict[str, Any]:
    run = {"data": "Mo", "arm": arm, "seed": seed, "labels": labels, "model": {"backbone": "painn", "channels": 8}}
    run["length"] = {"steps": 300, "batch_size": 4, "lr": 0.001}
    errors = {"force_mae": force, "energy_mae": energy}
    scores = {"test": errors, "held_out": errors, "seconds_per_step": 0.5}
    return {"suite": "few", "run": run, "scores": scores}


# --- resuming -----------------------------------------------------------------------------------------------------


def test_changes_are_between_runs_of_the_same_seed() -> None:
    assert tables.change({0: 50.0, 1: 220.0, 2: 7.0}, {0: 100.0, 1: 200.0}) == "-50, +10 %"
    assert tables.change({0: 50.0, 1: 220.0, 2: 7.0}, {0: 100.0, 1: 200.0, 2: 7.0}) == "-13 ± 32 %"
    assert tables.change({0: 50.0}, {1: 100.0}) == ""


def test_labels_saved_are_exact_on_a_power_law() -> None:
    curve = {n: 8 / n**0.5 for n in (12, 24, 48, 96)}
    assert tables.labels_for(8 / 30**0.5, curve) == pytest.approx(30)
    assert tables.labels_for(0.1, curve) is None
    records = [record("plain", 0, error, n) for n, error in curve.items()]
    line = tables.saved_table([*records, record("SCD, then plain", 0, 8 / 36**0.5, 12)]).splitlines()[-1]
    assert "| 12 | 1 | 3.0 |" in line


def test_the_length_that_is_best_on_held_out_structures_is_taken_for_each_arm_and_budget() -> None:
    def run(arm: str, seed: int, steps: int, held_out: float, test: float) -> dict[str, Any]:
        line = record(arm, seed, test)
        line["run"]["length"]["steps"] = steps
        line["scores"]["held_out"] = {"force_mae": held_out, "energy_mae": 0.0}
        return line

    short = [run("plain", seed, 300, 0.3, 0.1) for seed in (0, 1)]
    long = [run("plain", seed, 1000, 0.2, 0.4) for seed in (0, 1)]
    once = run("plain", 0, 3000, 0.1, 0.1)  # not for as many seeds
    other = [run("SCD", 0, 300, 0.1, 0.2), run("SCD", 0, 1000, 0.2, 0.1)]
    assert tables.tuned([*short, *long, once, *other]) == [*long, other[0]]
    more = [record("plain", seed, 0.05, 24) for seed in (0, 1)]  # for 300 steps alone
    assert tables.tuned([*short, *long, *more, *other]) == [*short, *more, other[0]]


def test_the_rate_that_is_best_on_held_out_structures_is_shown() -> None:
    runs = [record("plain", 0, error) for error in (0.3, 0.2)]
    runs[0]["run"]["length"]["lr"] = 0.01
    assert tables.best_rates(runs) == runs[1:]


def test_arms_stand_beside_plain_training_of_the_same_labels() -> None:
    records = [record("plain", 0, 0.2), record("plain", 1, 0.1), record("plain", 0, 0.05, None)]
    records += [record("DeNS", 0, 0.1), record("DeNS", 1, 0.2)]
    lines = tables.arms_table(records).splitlines()[2:]
    assert [line.split(" | ")[2:9] for line in lines] == [
        ["8", "12", "300", "plain", "2", "100", "0.001"],
        ["8", "12", "300", "DeNS", "2", "100", "0.001"],
    ], "with all labels there is nothing to compare"
    assert "| 100.0, 200.0 | -50, +100 % |" in lines[1]


def test_energies_of_each_group_of_structures_have_a_column() -> None:
    records = [record("plain", 0, 0.2), record("DeNS", 0, 0.2)]
    for line, surfaces in zip(records, (0.1, 0.3), strict=True):
        line["scores"]["test_groups"] = {"Bulk": {"energy_mae": 0.01}, "Surface": {"energy_mae": surfaces}}
    lines = tables.groups_table(records).splitlines()
    assert lines[0].endswith("| training | seeds | Bulk | Surface |")
    assert lines[2:] == [
        "| Mo | 12 | 300 | quiet | plain | 1 | 10.0 | 100.0 |",
        "| Mo | 12 | 300 | quiet | DeNS | 1 | 10.0 | 300.0 |",
    ]


def test_the_lowest_held_out_error_is_that_of_the_best_checkpoint() -> None:
    lines = [record("plain", 0, 0.2), record("DeNS", 0, 0.1)]
    for line in lines:
        errors = (0.4, 0.3, 0.35)
        line["scores"]["curve"] = [{"step": i, "energy_mae": 1.0, "force_mae": e} for i, e in enumerate(errors)]
    assert "| 300.0 | 200.0 |" in tables.arms_table(lines, best=True)


def test_the_last_fifth_of_a_curve_tells_whether_errors_still_fell() -> None:
    line = record("plain", 0, 0.1)
    line["scores"]["curve"] = [{"step": step, "energy_mae": error} for step, error in ((60, 3), (240, 2), (300, 1.5))]
    assert tables._last_fifth([line]) == "-25 %"


def test_a_ratio_of_paired_errors_has_no_error_where_they_are_proportional() -> None:
    assert condition_tables.ratio_of([0.5, 1.0, 2.0], [1.0, 2.0, 4.0]) == "0.500 ± 0.000"
    assert condition_tables.ratio_of([1.0, 3.0], [2.0, 2.0]) == "1.000 ± 0.500"


def test_the_frontier_compares_equal_settings_and_names_the_one_that_was_changed() -> None:
    def line(run: condition.Run, right: float) -> dict[str, Any]:
        told = {"none": [2 * right] * 2} if run.form == "plain" else {"right": [right, right]}
        last = {"none": [2 * right, 0.0], "other_minus_right": [0.3, 0.1], "dimensions": 2.0}
        scores = {"structures": told, "curve": [last]}
        return {"suite": "frontier", "run": asdict(run), "structures": run.count or 2000, "scores": scores}

    runs = list(condition.suite("frontier", [0], None, None))
    records = [line(run, 0.1 * run.model.channels) for run in runs]
    alone = line(replace(runs[0], form="embedding", std=9.0), 1.0)
    found = frontier.points([*records, alone])
    assert [(p.changed, p.values[p.changed or "channels"]) for p in found] == [
        (None, 64),
        *(("channels", channels) for channels in (16, 128)),
        *(("σ, Å", std) for std in (0.01, 0.1)),
        ("training structures", 100),
        ("batch size", 8),
        ("blocks", 5),
        ("training structures", 500),
        ("channels", 32),
        ("blocks", 2),
        *(("σ, Å", std) for std in (0.2, 0.02, 0.3)),
    ]
    assert {p.gain.value for p in found} == {0.5}
    # The usual run has another suite's name where it was done for that.
    shared = [{**line, "suite": "levers"} for line in records[:2]]
    assert report.parted([*shared, *records[2:]]) == ([], [*shared, *records[2:]], shared)
    assert report.parted(shared) == ([], [], shared)
    rows = frontier.frontier_table(records).splitlines()
    assert "| molecules | 0 | channels 16 | 3.2000 ± 0.0000 | 0.500 ± 0.000 | 3.0 | 2.0 |" in rows


def test_only_structures_of_like_size_are_taken_together_and_few_ones_not_at_all() -> None:
    atoms = np.array([2] + [4] * 10 + [5] * 3 + [7] + [53] * 6 + [54] * 8)
    rows = components._of_like_size(atoms)
    assert [sorted(set(atoms[i].tolist())) for i in rows] == [[4, 5], [53, 54]]
    assert [len(i) for i in rows] == [13, 14]


def test_the_explained_share_is_counted_in_components_of_the_noise() -> None:
    atoms = np.full(20, 5)
    plain = np.linspace(0.5, 1.5, 20)
    group = components.Group("molecules", "painn 64", "embedding", 900, 0, atoms, 0.75 * plain, plain)
    longer = replace(group, steps=1800, right=0.5 * plain)
    assert group.freedom == 12
    rows = components.components_table([longer, group]).splitlines()[2:]
    assert rows[0].endswith("| 20 | 900 | 1 | 25.0 ± 0.0 | 3.0 ± 0.0 | 3.0 |")
    assert rows[1].endswith("| 20 | 1800 | 1 | 50.0 ± 0.0 | 6.0 ± 0.0 | 6.0 |")


def test_forms_are_compared_with_the_shipped_one_on_the_same_structures() -> None:
    def line(form: str, told: str, errors: list[float]) -> dict[str, Any]:
        run = {"data": "molecules", "form": form, "seed": 0}
        scores = {"steps": 9, "structures": {told: errors}, "curve": [{told: [0.5, 0.1]}]}
        return {"run": run, "scores": scores}

    records = [line("plain", "none", [2.0, 4.0]), line("embedding", "right", [1.0, 2.0])]
    rows = condition_tables.levers_table(records).splitlines()[2:]
    assert [row.split(" | ")[-3] for row in rows] == ["2.000 ± 0.000", "1.000 ± 0.000"]


def test_a_section_waits_for_both_sides_of_its_comparison() -> None:
    plain, other = record("plain", 0, 0.2), record("SCD, then plain", 0, 0.1)
    elsewhere = record("SCD, then plain", 1, 0.1)
    assert report.sections([plain, elsewhere], [])["few"] == ""
    assert "-50 %" in report.sections([plain, other], [])["few"]


def test_structures_passed_count_pretraining_and_both_passes_of_scd() -> None:
    length = {"steps": 300, "batch_size": 4}
    before = {"length": {"steps": 400, "batch_size": 8}}
    assert tables.passed({"length": length, "pretraining": None}) == 1200
    assert tables.passed({"length": length, "pretraining": {**before, "form": "plain"}}) == 1200 + 3200
    assert tables.passed({"length": length, "pretraining": {**before, "form": "embedding"}}) == 1200 + 6400
    assert tables.passed({"length": length, "pretraining": {**before, "form": "plain"}}, shared_by=10) == 1200 + 320


def test_epochs_count_how_often_each_label_was_seen() -> None:
    run = record("plain", 0, 0.1, labels=24)
    assert tables.epochs(run) == 50
    assert tables.epochs(run, 30) == 5


def test_runs_of_few_labels_count_as_such_where_the_choice_of_rates_has_done_them() -> None:
    runs = [run for run in learning.SUITES["molecule_rates"].runs([0]) if run.arm == "plain"]
    records = [{**record("plain", 0, 0.1), "suite": "molecule_rates", "run": asdict(run)} for run in runs]
    found = report.few_labels(records)
    assert {(r["run"]["labels"], r["run"]["length"]["lr"]) for r in found} == {(24, 2e-3), (384, 2e-3), (384, 4e-3)}
    assert len(records) > 3


def test_only_what_stands_between_marks_is_replaced() -> None:
    page = "a\n<!-- begin few -->\nold\n<!-- end few -->\nb\n"
    assert report.fill(page, {"few": "new\n", "more": ""}) == page.replace("old", "new")
    with pytest.raises(KeyError):
        report.fill(page, {})


def test_the_pages_say_what_the_results_say() -> None:
    contents = report.sections(*report.stored(report.HERE / "results"))
    pages = [(report.DOCS / name).read_text() for name in report.PAGES]
    assert [report.fill(page, contents) for page in pages] == pages
    shown = [name for page in pages for name in re.findall(r"<!-- begin (\w+) -->", page)]
    assert sorted(shown) == sorted(contents)


def test_arms_of_other_studies_are_compared_with_their_first_arm_by_seed() -> None:
    def gap(arm: str, seed: int, error: float) -> dict[str, Any]:
        run = {"data": "gaps", "arm": arm, "labels": 64, "seed": seed, "model": {"backbone": "painn", "channels": 8}}
        run["length"] = {"steps": 600, "lr": 0.002}
        return {"run": run, "scores": {"test": error, "held_out": 2 * error}}

    gaps = [gap("scratch", 0, 1.0), gap("scratch", 1, 2.0), gap("SCD", 0, 0.5), gap("SCD", 1, 1.0)]
    assert (
        "| gaps | painn | 8 | 64 | 600 | 0.002 | SCD | 2 | 1.00, 2.00 | -50, -50 % | 0.50, 1.00 | -50, -50 % |"
        in report.sections([], [], gaps)["properties"]
    )

    def errors(arm: str, force: float) -> dict[str, Any]:
        run = {"data": "Mo", "forces": "direct", "arm": arm, "labels": 24, "seed": 0, "size": {"steps": 300}}
        return {"run": run, "scores": {"test": {"force_mae": force, "energy_mae": 0.05}}}

    found = report.sections([], [], [], [errors("plain", 0.2), errors("DeNS", 0.3)])["fairchem2"]
    assert "| Mo | direct | 24 | 300 | DeNS | 1 | 300.0 | +50 % | 50.0 | +0 % |" in found
