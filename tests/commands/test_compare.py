"""`fairchem-scd compare`: what it says of runs is what a test of their errors says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from torch.utils.tensorboard import SummaryWriter

from fairchem_scd.commands.compare.comparison import Change, compare
from fairchem_scd.commands.compare.comparison_picture import draw
from fairchem_scd.commands.compare.runs import Run
from fairchem_scd.commands.plot.curves import Curve
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
    assert lines[0] == "Validation errors where forces_mae was lowest (mean ± standard deviation over runs):"
    assert re.split(r"  +", lines[2]) == ["", "runs", "last step", "forces_mae (eV/Å)", "energy_mae (eV)"]
    assert re.split(r"  +", lines[3]) == ["plain", "3", "500", "0.21 ± 0.010", "0.42 ± 0.020"]
    assert re.split(r"  +", lines[4]) == ["dens", "3", "500", "0.18 ± 0.010", "0.36 ± 0.020"]
    # By hand: the mean of the differences of logarithms, and t times its standard error.
    differences = np.log(dens) - np.log(plain)
    half = stats.t.ppf(0.975, 2) * differences.std(ddof=1) / 3**0.5
    low, high = (100 * np.expm1(differences.mean() + sign * half) for sign in (-1, 1))
    said = f"{-100 * np.expm1(differences.mean()):.1f} % lower than plain (95 % interval {low:+.1f} % to {high:+.1f} %)"
    assert f"dens: forces_mae {said}" in lines
    assert f"dens: energy_mae {said}" in lines
    assert "Paired, in the order given: plain0 – dens0, plain1 – dens1, plain2 – dens2." in lines
    assert "denoising" not in output
    assert "forcesx" not in output


def test_without_pairs_the_interval_is_that_of_welchs_test(tmp_path):
    plain, dens = (0.20, 0.21, 0.22), (0.17, 0.18)
    output = fairchem_scd("compare", *words(tmp_path, plain=plain, dens=dens)).output
    a, b = np.log(dens), np.log(plain)
    parts = a.var(ddof=1) / 2, b.var(ddof=1) / 3
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 1 + parts[1] ** 2 / 2)
    half = stats.t.ppf(0.975, freedom) * sum(parts) ** 0.5
    low, high = (100 * np.expm1(a.mean() - b.mean() + sign * half) for sign in (-1, 1))
    assert f"(95 % interval {low:+.1f} % to {high:+.1f} %)" in output
    assert "Paired" not in output
    assert "Fewer than three runs of dens (2)." in output


def test_a_difference_within_the_spread_of_seeds_may_be_chance(tmp_path):
    output = fairchem_scd("compare", *words(tmp_path, plain=(0.20, 0.22), scd=(0.19, 0.225))).output
    assert re.search(
        r"^scd: forces_mae 1\.4 % lower than plain \(95 % .*\): may be chance, more seeds can tell$", output, re.M
    )
    wild = fairchem_scd("compare", *words(tmp_path / "w", plain=(0.20, 0.22), scd=(0.19, 1e30))).output
    assert "forces_mae over 1000 % higher than plain (95 % interval -100.0 % to +over 1000 %): may be chance" in wild


def test_all_are_compared_with_the_name_given_first(tmp_path):
    output = fairchem_scd("compare", *words(tmp_path, old=(0.2, 0.201), a=(0.3, 0.301), b=(0.1, 0.101))).output
    assert re.search(r"^a: forces_mae 49\.\d % higher than old", output, re.M)
    assert re.search(r"^b: forces_mae 49\.\d % lower than old", output, re.M)
    assert "There are several comparisons here." in output


def test_one_run_of_a_config_has_no_interval_and_the_output_says_what_is_missing(tmp_path):
    output = fairchem_scd("compare", *words(tmp_path, plain=(0.2,), dens=(0.1, 0.1))).output
    assert "dens: forces_mae 50.0 % lower than plain (no interval: one run)" in output
    assert "Fewer than three runs of plain (1), dens (2)." in output
    assert (
        "energy_mae equal to plain (no interval"
        in fairchem_scd("compare", *words(tmp_path / "e", plain=(0.2,), dens=(0.2,))).output
    )


def test_errors_are_those_of_one_validation_of_a_run(tmp_path):
    """The energy that belongs to a model is not the lowest that the run ever had."""
    plain = log(tmp_path / "plain", [0.3, 0.2, 0.1, 0.15, 0.2], energy_mae=[1.0, 2.0, 3.0, 4.0, 5.0])
    dens = log(tmp_path / "dens", [0.3, 0.2, 0.2, 0.1, 0.3], energy_mae=[1.5, 1.5, 1.5, 1.5, 2.5])
    best = fairchem_scd("compare", f"plain={plain}", f"dens={dens}").output
    assert "dens: energy_mae 50.0 % lower than plain" in best
    assert "dens: forces_mae equal to plain" in best
    last = fairchem_scd("compare", f"plain={plain}", f"dens={dens}", "--at", "last").output
    assert last.startswith("Validation errors of the last validation (mean")
    assert "dens: forces_mae 50.0 % higher than plain" in last
    assert "dens: energy_mae 50.0 % lower than plain" in last


def test_errors_that_still_fall_are_named_where_there_are_enough_validations_to_tell(tmp_path):
    given = [f"plain={log(tmp_path / 'a', [5, 4, 3, 2, 1.5])}", f"scd={log(tmp_path / 'b', [5, 4, 3, 2, 2.1])}"]
    output = fairchem_scd("compare", *given).output
    assert "Still falling in the last fifth of the training: forces_mae of plain by 25 %. Longer runs" in output
    few = [f"{name}={log(tmp_path / f'few {name}', [2, 1], steps=STEPS[:2])}" for name in ("plain", "scd")]
    assert "A run was validated only 2 times, so" in fairchem_scd("compare", *few).output


def test_each_run_is_taken_to_its_own_end_and_unlike_lengths_are_said_before_the_result(tmp_path):
    short = log(tmp_path / "short", [4, 3, 2], steps=STEPS[:3])
    long = log(tmp_path / "long", [5, 4, 3, 2, 1])
    output = fairchem_scd("compare", f"plain={long}", f"scd={short}").output
    joined = " ".join(output.split())
    assert "scd: forces_mae 100.0 % higher than plain" in joined
    assert "The runs are not equally long: short ends at step 300, long at step 500." in joined
    assert "short was validated 3 times and long 5 times." in joined
    assert output.index("not equally long") < output.index("higher than")
    almost = log(tmp_path / "almost", [5, 4, 3, 2, 1], steps=[*STEPS[:4], 499])
    assert "not equally long" not in fairchem_scd("compare", f"plain={long}", f"scd={almost}").output


def test_what_is_no_number_or_not_in_all_runs_is_said(tmp_path):
    nan = float("nan")
    a = log(tmp_path / "a", falling(0.2), stress_mae=falling(0.01), gap_mae=[1.0] * 5)
    b = log(tmp_path / "b", [0.8, 0.6, 0.4, nan, nan], gap_mae=[1.0, 1.0, 0.0, 1.0, 1.0])
    output = " ".join(fairchem_scd("compare", f"plain={a}", f"scd={b}").output.split())
    assert "b: forces_mae is not a number at step 400." in output
    assert "Left out: stress_mae, which is not in the log of b." in output
    assert "Left out: gap_mae, which is zero at some validation." in output
    assert "scd: forces_mae 100.0 % higher than plain" in output


@pytest.mark.parametrize("first", [[2.0, 4.0], [2.0, 2.0, 2.0]])
def test_changes_that_do_not_vary_have_an_interval_of_no_width(first):
    change = Change.between([1.0, 2.0] if len(first) == 2 else [1.0, 1.0], first)
    assert change == Change(-0.5, (-0.5, -0.5))
    assert change.sure


def test_a_star_stands_for_several_runs_in_the_order_of_their_names(tmp_path):
    words(tmp_path, plain=(0.2, 0.21), dens=(0.1, 0.11))
    output = fairchem_scd("compare", f"plain={tmp_path}/plain*", f"dens={tmp_path}/dens*").output
    assert "Paired, in the order given: plain0 – dens0, plain1 – dens1." in output


def test_the_picture_has_a_panel_for_each_error_and_a_line_for_each_run(tmp_path):
    curve = Curve(np.array(STEPS), np.array(falling(0.2)))
    curves = {f"val/{name}_mae": curve for name in ("forces", "energy", "stress", "gap")}
    figure = draw(compare({"plain": [Run("a", curves), Run("b", curves)], "dens": [Run("c", curves)]}))
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_ylabel() for axes in shown] == [
        *("forces_mae (eV/Å)", "energy_mae (eV)", "gap_mae", "stress_mae (eV/Å³)"),
    ]
    for axes in shown:
        assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == len(axes.lines) == 3
    many = draw(compare({str(i): [Run(str(i), curves)] for i in range(12)}))
    looks = {(line.get_color(), str(line._dash_pattern)) for line in many.axes[0].lines}
    assert len(looks) == 12
    out = tmp_path / "c.png"
    output = fairchem_scd("compare", *words(tmp_path, plain=(0.2,), dens=(0.1,)), "--picture", out).output
    assert output.endswith(f"{out}: the errors against the training step\n")
    assert out.stat().st_size > 1000
    assert "exists" in fairchem_scd("compare", "a=b", "c=d", "--picture", out, code=1).output


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["plain"], "plain: give each run as NAME=RUN, such as plain=logs/tensorboard/my_run"),
        (["=a"], "=a: give each run as NAME=RUN"),
        (["plain={a}", "plain={b}"], "all runs have the name 'plain'; give runs of two names"),
        (["plain={a}", "dens={a}/"], "dens={a}/: is the run of plain={a}; give each run once"),
        (["plain={a}", "dens={nowhere}"], "{nowhere}: there is no such folder"),
        (["plain={a}", "dens={nowhere}*"], "dens={nowhere}*: there is nothing of this name"),
        (["plain={several}", "dens={b}"], "{several}: 2 runs; give the folder of one of them: one, two"),
        (["plain={a}", "dens={training}"], "training: no validation errors in its log, such as val/forces_mae"),
        (["plain={a}", "dens={gap}"], "no validation error in common: a has val/forces_mae; gap has val/gap_mae"),
        (["plain={zero}", "dens={a}"], "the errors that the runs have in common are zero: val/forces_mae"),
        (["plain={a}", "dens={nan}"], "nan: val/forces_mae is not a number at any validation; leave this run out"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(given, message, tmp_path):
    folders = {name: tmp_path / name for name in ("a", "b", "nowhere", "training", "gap", "nan", "several", "zero")}
    for name in ("a", "b", "several/one", "several/two"):
        log(tmp_path / name, falling(0.2))
    log(folders["nan"], [float("nan")] * 5)
    log(folders["zero"], [0.0] * 5)
    for name, tag in (("training", "train/forces_mae"), ("gap", "val/gap_mae")):
        with SummaryWriter(str(folders[name])) as writer:
            writer.add_scalar(tag, 0.1, 500)
    output = fairchem_scd("compare", *(word.format(**folders) for word in given), code=1).output
    assert message.format(**folders) in " ".join(output.split())
    assert output.count("Error: ") == 1
