"""`fairchem-scd compare`: what it says of runs is what a test of their errors says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from torch.utils.tensorboard import SummaryWriter

from fairchem_scd.commands.compare.comparison import Change
from tests.support.command_line import fairchem_scd

STEPS = (100, 200, 300, 400, 500)


def log(folder: Path, forces: Sequence[float], steps: Sequence[int] = STEPS, **others: Sequence[float]) -> Path:
    """A run's log with these validation errors."""
    with SummaryWriter(str(folder)) as writer:
        for tag, values in {"val/forces_mae": forces, **{f"val/{k}": v for k, v in others.items()}}.items():
            for step, value in zip(steps, values, strict=True):
                writer.add_scalar(tag, value, step)
        writer.add_scalar("val/denoising_pos_mae", 0.1, 100)
        writer.add_scalar("val/forcesx_mae", 0.1, 100)
        writer.add_scalar("train/forces_mae", 0.1, 100)
    return folder


def falling(end: float) -> list[float]:
    return [4 * end, 3 * end, 2 * end, end, 1.1 * end]


def words(folder: Path, **ends: Sequence[float]) -> list[str]:
    """Logs of runs that end at these force errors, as the command is given them."""
    return [
        f"{name}={log(folder / f'{name}{i}', falling(end), energy_mae=falling(2 * end))}"
        for name, of in ends.items()
        for i, end in enumerate(of)
    ]


def test_a_difference_is_said_with_the_interval_of_a_test_of_pairs(tmp_path):
    plain, dens = (0.20, 0.21, 0.22), (0.17, 0.18, 0.19)
    output = fairchem_scd("compare", *words(tmp_path, plain=plain, dens=dens)).output
    lines = output.splitlines()
    assert lines[0] == "Lowest validation errors up to step 500 (± standard deviation over runs):"
    assert re.split(r"  +", lines[2]) == ["", "runs", "forces_mae, eV/Å", "energy_mae, eV"]
    assert re.split(r"  +", lines[3]) == ["plain", "3", "0.21 ± 0.01", "0.42 ± 0.02"]
    assert re.split(r"  +", lines[4]) == ["dens", "3", "0.18 ± 0.01", "0.36 ± 0.02"]
    # By hand: the mean of the differences of logarithms, and t times its standard error.
    differences = np.log(dens) - np.log(plain)
    half = stats.t.ppf(0.975, 2) * differences.std(ddof=1) / 3**0.5
    low, high = (100 * np.expm1(differences.mean() + sign * half) for sign in (-1, 1))
    said = f"{-100 * np.expm1(differences.mean()):.1f} % lower than plain (95 % interval {low:+.1f} to {high:+.1f} %)"
    assert f"dens: forces_mae {said}" in lines
    assert f"dens: energy_mae {said}" in lines
    assert "denoising" not in output
    assert "forcesx" not in output
    assert "not paired" not in output


def test_without_pairs_the_interval_is_that_of_welchs_test(tmp_path):
    plain, dens = (0.20, 0.21, 0.22), (0.17, 0.18)
    output = fairchem_scd("compare", *words(tmp_path, plain=plain, dens=dens)).output
    a, b = np.log(dens), np.log(plain)
    parts = a.var(ddof=1) / 2, b.var(ddof=1) / 3
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 1 + parts[1] ** 2 / 2)
    half = stats.t.ppf(0.975, freedom) * sum(parts) ** 0.5
    low, high = (100 * np.expm1(a.mean() - b.mean() + sign * half) for sign in (-1, 1))
    assert f"(95 % interval {low:+.1f} to {high:+.1f} %)" in output
    assert "Numbers of runs differ, so runs are not paired by seed" in output


def test_a_difference_within_the_spread_of_seeds_is_called_none(tmp_path):
    output = fairchem_scd("compare", *words(tmp_path, plain=(0.20, 0.22), scd=(0.19, 0.225))).output
    assert "scd: forces_mae: these runs show no difference from plain (95 % interval -" in output


def test_all_are_compared_with_the_name_given_first(tmp_path):
    output = fairchem_scd("compare", *words(tmp_path, old=(0.2, 0.201), a=(0.3, 0.301), b=(0.1, 0.101))).output
    assert re.search(r"^a: forces_mae 49\.\d % higher than old", output, re.M)
    assert re.search(r"^b: forces_mae 49\.\d % lower than old", output, re.M)


def test_one_run_of_a_kind_has_no_interval_and_the_output_says_what_is_missing(tmp_path):
    output = fairchem_scd("compare", *words(tmp_path, plain=(0.2,), dens=(0.1, 0.1))).output
    assert "dens: forces_mae 50.0 % lower than plain (no interval)" in output
    assert "One run alone of plain: how much errors differ from seed to seed is not known." in output


def test_errors_that_still_fall_are_named(tmp_path):
    given = [f"plain={log(tmp_path / 'a', [5, 4, 3, 2, 1.5])}", f"scd={log(tmp_path / 'b', [5, 4, 3, 2, 2.1])}"]
    output = fairchem_scd("compare", *given).output
    assert "Still falling in the last fifth of the steps: forces_mae of plain by 25 %. Longer runs" in output


def test_runs_are_compared_up_to_the_last_step_that_all_have(tmp_path):
    short = log(tmp_path / "short", [4, 3, 2], steps=STEPS[:3])
    long = log(tmp_path / "long", [5, 4, 3, 2, 1])
    output = fairchem_scd("compare", f"plain={long}", f"scd={short}").output
    assert output.startswith("Lowest validation errors up to step 300")
    assert "scd: forces_mae 33.3 % lower than plain" in output
    assert "Some runs are longer, up to step 500." in output


@pytest.mark.parametrize("first", [[2.0, 4.0], [2.0, 2.0, 2.0]])
def test_changes_that_do_not_vary_have_an_interval_of_no_width(first):
    change = Change.between([1.0, 2.0] if len(first) == 2 else [1.0, 1.0], first)
    assert change == Change(-0.5, (-0.5, -0.5))
    assert change.shown


def test_the_picture_has_a_panel_for_each_error_and_a_line_for_each_run(tmp_path):
    from fairchem_scd.commands.compare.comparison import Arm, compare
    from fairchem_scd.commands.compare.comparison_picture import draw
    from fairchem_scd.commands.plot.curves import Curve

    curve = Curve(np.array(STEPS), np.array(falling(0.2)))
    run = {f"val/{name}_mae": curve for name in ("forces", "energy", "stress", "gap")}
    figure = draw(compare([Arm("plain", {"a": run, "b": run}), Arm("dens", {"c": run})]))
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_ylabel() for axes in shown] == [
        *("forces_mae (eV/Å)", "energy_mae (eV)", "gap_mae", "stress_mae (eV/Å³)"),
    ]
    assert {len(axes.lines) for axes in shown} == {3}
    out = tmp_path / "c.png"
    output = fairchem_scd("compare", *words(tmp_path, plain=(0.2,), dens=(0.1,)), "--picture", out).output
    assert output.endswith(f"{out}: 2 panels\n")
    assert out.stat().st_size > 1000
    assert "exists" in fairchem_scd("compare", "a=b", "c=d", "--picture", out, code=1).output


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["plain"], "plain: give each run as NAME=RUN, such as plain=logs/tensorboard/my_run"),
        (["=a"], "=a: give each run as NAME=RUN"),
        (["plain={a}", "plain={b}"], "all runs have the name 'plain'; give runs of two names"),
        (["plain={a}", "dens={a}"], "dens={a}: the run is given twice, as plain={a} too"),
        (["plain={a}", "dens={nowhere}"], "{nowhere}: there is no such folder"),
        (["plain={a}", "dens={training}"], "{training}: no validation errors in its log, such as val/forces_mae"),
        (["plain={a}", "dens={gap}"], "no validation error in common: {a} has val/forces_mae; {gap} has val/gap_mae"),
        (["plain={a}", "dens={late}"], "{late}: no validation up to step 500, where the shortest run ends"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(given, message, tmp_path):
    folders = {name: tmp_path / name for name in ("a", "b", "nowhere", "training", "gap", "late")}
    for name in ("a", "b"):
        log(folders[name], falling(0.2))
    log(folders["late"], [1.0], steps=[900])
    for name, tag in (("training", "train/forces_mae"), ("gap", "val/gap_mae")):
        with SummaryWriter(str(folders[name])) as writer:
            writer.add_scalar(tag, 0.1, 500)
    output = fairchem_scd("compare", *(word.format(**folders) for word in given), code=1).output
    assert message.format(**folders) in " ".join(output.split())
    assert output.count("Error: ") == 1
