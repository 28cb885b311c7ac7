"""`fairchem-scd plot`: what is drawn is what the run logged."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from fairchem_scd.commands import pictures as style
from fairchem_scd.commands.plot import training_run
from fairchem_scd.commands.plot.training_log import Curve, find_run, read_curves
from fairchem_scd.errors import ConfigError
from fairchem_scd.testing import make_trainer
from tests.support.command_line import fairchem_scd
from tests.support.configs import tiny_config

DENS = {
    "train/loss": 60.0,
    "train/energy_loss": 2.0,
    "train/forces_loss": 58.0,
    "train/denoising_energy_loss": 3.0,
    "train/denoising_force_loss": 30.0,
    "train/denoising_pos_loss": 9.0,
    "train/energy_mae": 1.0,
    "train/forces_mae": 0.6,
    "train/denoising_energy_mae": 1.5,
    "train/denoising_force_mae": 0.7,
    "train/denoising_pos_mae": 0.08,
    "train/lr": 1e-3,
    "val/loss": 70.0,
    "val/energy_mae": 1.1,
    "val/forces_mae": 0.7,
}
PRETRAINING = {
    "train/loss": 1.0,
    "train/denoising_pos_loss": 1.0,
    "train/denoising_pos_mae": 0.03,
    "val/loss": 0.9,
    "val/denoising_pos_loss": 0.9,
    "val/denoising_pos_mae": 0.029,
}
JUDGED = {
    **PRETRAINING,
    "val/denoising_pos_mae_other": 0.05,
    "val/denoising_pos_mae_none": 0.04,
    "val/denoising_pos_mae_zero": 0.06,
    "val/denoising_condition_gain": 0.3,
    "val/denoising_condition_gain_error": 0.02,
    "val/denoising_condition_gain_over_none": 0.1,
    "val/denoising_condition_gain_over_none_error": 0.03,
    "val/denoising_condition_dimensions": 5.0,
    "val/denoising_condition_spread": 0.4,
}
LOSS, FORCES, ENERGY, NOISE = "loss", "force error (eV/Å)", "energy error (eV)", "denoising error (Å)"
GAIN = "condition's gain (%)"


def log(folder, tags, first=1, last=30, suffix=""):
    """Write a log of falling values that differ by tag, as the host's logger writes it; the curves written."""
    steps, curves = list(range(first, last + 1)), {}
    with SummaryWriter(str(folder), filename_suffix=suffix) as writer:
        for tag, start in tags.items():
            at = steps if tag.startswith("train/") else steps[9::10]
            values = [start * 0.97**step for step in at]
            for step, value in zip(at, values, strict=True):
                writer.add_scalar(tag, value, step)
            curves[tag] = Curve(np.array(at), np.array(values, dtype=np.float32).astype(float))
    return curves


def plot(*arguments, ok=True):
    """Run the command; its output, or the error it ends in."""
    result = fairchem_scd("plot", *arguments, code=None)
    assert (result.exit_code == 0) == ok, result.output
    if not ok:
        assert isinstance(result.exception, SystemExit), result.exc_info
        assert result.output.count("Error: ") == 1
    return result.output


def drawn(figure):
    """The lines of each panel by label: {panel: {label: (steps, values)}}."""
    return {ax.get_ylabel(): {line.get_label(): line.get_xydata().T for line in ax.get_lines()} for ax in figure.axes}


def is_curve(line, curve):
    return np.array_equal(line[0], curve.steps) and np.array_equal(line[1], curve.values)


def logged(folder, name=None):
    return read_curves(find_run(folder, name)[1], training_run.ENDINGS)


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_lines_hold_the_values_that_were_logged_at_their_steps(tmp_path):
    written = log(tmp_path / "logs" / "tensorboard" / "run", DENS)
    panels = drawn(training_run.draw(logged(tmp_path)))
    expected = {
        LOSS: {
            "total": "train/loss",
            "energy": "train/energy_loss",
            "forces": "train/forces_loss",
            "noise": "train/denoising_pos_loss",
            "total, validation": "val/loss",
            "energy, denoising": "train/denoising_energy_loss",
            "forces, denoising": "train/denoising_force_loss",
        },
        FORCES: {
            "training": "train/forces_mae",
            "denoising": "train/denoising_force_mae",
            "validation": "val/forces_mae",
        },
        ENERGY: {
            "training": "train/energy_mae",
            "denoising": "train/denoising_energy_mae",
            "validation": "val/energy_mae",
        },
        NOISE: {"training": "train/denoising_pos_mae"},
    }
    assert {panel: list(lines) for panel, lines in panels.items()} == {p: list(ls) for p, ls in expected.items()}
    for panel, lines in expected.items():
        for label, tag in lines.items():
            assert is_curve(panels[panel][label], written[tag]), tag


def test_a_judged_condition_is_drawn_beside_another_structures_none_and_predicting_nothing(tmp_path):
    written = log(tmp_path, JUDGED)
    figure = training_run.draw(logged(tmp_path))
    panels = drawn(figure)
    assert list(panels) == [LOSS, NOISE, GAIN]
    expected = {
        "training": "train/denoising_pos_mae",
        "validation": "val/denoising_pos_mae",
        "told another's": "val/denoising_pos_mae_other",
        "told none": "val/denoising_pos_mae_none",
        "predicting nothing": "val/denoising_pos_mae_zero",
    }
    assert list(panels[NOISE]) == list(expected)
    for label, tag in expected.items():
        assert is_curve(panels[NOISE][label], written[tag]), tag
    axes = figure.axes[2]
    bars = [bar for bar in axes.collections if isinstance(bar, LineCollection)]
    for label, tag, bar in zip(("over another's", "over none"), ("gain", "gain_over_none"), bars, strict=True):
        value, error = (written[f"val/denoising_condition_{tag}{end}"] for end in ("", "_error"))
        assert is_curve(panels[GAIN][label], Curve(value.steps, 100 * value.values)), tag
        ends = np.array([segment[:, 1] for segment in bar.get_segments()])
        assert np.allclose(ends, 100 * np.stack([value.values - error.values, value.values + error.values], axis=1))
    assert any(np.array_equal(line.get_ydata(), [0, 0]) for line in axes.get_lines())


def test_pretraining_has_no_panel_for_forces_and_energy_and_one_line_for_its_only_loss(tmp_path):
    written = log(tmp_path, PRETRAINING)
    panels = drawn(training_run.draw(logged(tmp_path)))
    assert {panel: list(lines) for panel, lines in panels.items()} == {
        LOSS: ["noise", "validation"],
        NOISE: ["training", "validation"],
    }
    assert is_curve(panels[NOISE]["validation"], written["val/denoising_pos_mae"])


def test_a_run_of_the_hosts_own_trainer_is_drawn_as_far_as_it_logs(tmp_path):
    log(tmp_path, {tag: DENS[tag] for tag in ("train/loss", "train/forces_mae", "val/forces_mae")})
    assert list(drawn(training_run.draw(logged(tmp_path)))) == [LOSS, FORCES]


def test_losses_of_other_outputs_are_drawn_under_their_names(tmp_path):
    log(tmp_path, {**DENS, "train/stress_loss": 5.0, "train/denoising_stress_loss": 4.0})
    assert {"stress", "stress, denoising"} <= set(drawn(training_run.draw(logged(tmp_path)))[LOSS])


def test_errors_of_other_outputs_have_a_panel_and_components_of_forces_none(tmp_path):
    errors = {"train/denoising_gap_mae": 0.4, "val/gap_mae": 0.5, "val/forcesx_mae": 0.1}
    log(tmp_path, {**PRETRAINING, "train/denoising_gap_loss": 4.0, **errors})
    panels = drawn(training_run.draw(logged(tmp_path)))
    assert set(panels) == {LOSS, "gap error", NOISE}
    assert set(panels["gap error"]) == {"denoising", "validation"}


@pytest.mark.parametrize(("count", "raw"), [(500, True), (5000, False)])
def test_dense_curves_get_a_running_median_that_follows_them(count, raw):
    steps, random = np.arange(1, count + 1), np.random.default_rng(0)
    trend = 2 - steps / count
    curve = Curve(steps, trend + 0.1 * random.standard_normal(count))
    figure = training_run.draw({"train/forces_mae": curve})
    lines = figure.axes[0].get_lines()
    assert len(lines) == 1 + raw
    if raw:
        assert is_curve(lines[0].get_xydata().T, curve)
    else:
        assert len(figure.axes[0].collections) == 1  # a band, so that vector pictures stay small
    at, median = lines[-1].get_xydata().T
    assert len(at) <= 500
    assert np.abs(median - trend[at.astype(int) - 1]).max() < 0.15


def test_steps_without_a_number_are_gaps(tmp_path):
    values = np.ones(3000)
    values[1000:2000] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = training_run.draw({"train/loss": Curve(np.arange(3000), values)})
    at, median = figure.axes[0].get_lines()[-1].get_xydata().T
    assert np.isnan(median[(at > 1050) & (at < 1950)]).all()
    assert np.isfinite(median[(at < 950) | (at > 2050)]).all()
    with SummaryWriter(str(tmp_path)) as writer:
        for step, value in ((1, 1.0), (2, float("nan")), (3, float("nan"))):
            writer.add_scalar("train/loss", value, step)
    assert "not a number at step 2" in plot(tmp_path, tmp_path / "out.png")


def test_what_a_trainer_of_this_package_logs_is_what_is_drawn(tmp_path):
    """The names in the log, by a run of denoising steps and ordinary ones."""
    config = tiny_config(tmp_path, denoising={"dens": {"prob": 0.5}}, optim={"max_epochs": 2, "eval_every": 2})
    make_trainer(config, tmp_path / "run", seed=1).train(disable_eval_tqdm=True)
    panels = drawn(training_run.draw(logged(tmp_path / "run")))
    assert {panel: set(lines) for panel, lines in panels.items()} == {
        LOSS: {
            "total",
            "energy",
            "forces",
            "noise",
            "total, validation",
            "energy, denoising",
            "forces, denoising",
        },
        FORCES: {"training", "denoising", "validation"},
        ENERGY: {"training", "denoising", "validation"},
        NOISE: {"training"},
    }
    assert panels[FORCES]["validation"][0].tolist() == [2, 4]
    assert panels[LOSS]["total"][0].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("tags", [DENS, PRETRAINING], ids=["DeNS", "pre-training"])
@pytest.mark.parametrize("width", [style.SINGLE, style.DOUBLE])
def test_nothing_runs_out_of_the_picture_or_into_another_panel(tags, width, tmp_path):
    log(tmp_path, tags)
    figure = training_run.draw(logged(tmp_path), width=width)
    figure.canvas.draw()
    boxes = [ax.get_tightbbox() for ax in figure.axes]
    for box in boxes:
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    for ax in figure.axes:
        assert ax.get_window_extent().width > 0.6 * figure.bbox.width / (1 if width == style.SINGLE else 2)


# --- what is read ----------------------------------------------------------------------------------------------------


def test_values_are_those_that_tensorboard_reads(tmp_path):
    log(tmp_path, DENS)
    curves = logged(tmp_path)
    theirs = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    theirs.Reload()
    assert set(curves) == {tag for tag in theirs.Tags()["scalars"] if tag != "train/lr"}
    for tag, curve in curves.items():
        assert [(e.step, e.value) for e in theirs.Scalars(tag)] == list(
            zip(*map(np.ndarray.tolist, (curve.steps, curve.values)), strict=True)
        )


def test_a_resumed_run_is_one_curve_whose_later_values_are_right(tmp_path):
    folder = tmp_path / "logs" / "tensorboard" / "run"
    log(folder, {"train/loss": 1.0}, 1, 20, suffix=".first")
    first = next(folder.iterdir())
    log(folder, {"train/loss": 5.0}, 16, 30, suffix=".second")
    second = next(path for path in folder.iterdir() if path != first)
    # By the time in their names, which need not be the order of the alphabet.
    first.rename(folder / "events.out.tfevents.999999999.host.1")
    second.rename(folder / "events.out.tfevents.1000000000.host.1")
    curve = logged(tmp_path)["train/loss"]
    assert curve.steps.tolist() == list(range(1, 31))
    expected = [(1.0 if step < 16 else 5.0) * 0.97**step for step in range(1, 31)]
    np.testing.assert_allclose(curve.values, expected, rtol=1e-6)


def test_several_runs_are_listed_and_one_is_chosen_by_name(tmp_path):
    for run in ("2026-01-01", "2026-01-02"):
        log(tmp_path / "logs" / "tensorboard" / run, DENS)
    SummaryWriter(str(tmp_path / "logs" / "tensorboard" / "crashed")).close()
    out = tmp_path / "out.png"
    error = plot(tmp_path, out, ok=False)
    assert "2 runs; choose one by --run" in error
    assert "2026-01-01" in error
    assert "2026-01-02" in error
    assert "crashed" not in error
    assert "2026-01-02" in plot(tmp_path, out, "--run", "2026-01-02")
    plot(tmp_path / "logs", out, "--run", "tensorboard/2026-01-01", "--force")
    assert "2026-01-01, 30 steps" in plot(tmp_path / "logs" / "tensorboard" / "2026-01-01", out, "--force")
    assert "no run 'other'; there are" in plot(tmp_path, out, "--run", "other", "--force", ok=False)


def test_a_log_cut_short_is_drawn_as_far_as_it_is_whole(tmp_path, caplog):
    curves = log(tmp_path, {"train/loss": 1.0})
    file = next(tmp_path.iterdir())
    whole = file.read_bytes()
    for cut in (1, 5, 30, len(whole) // 2):
        file.write_bytes(whole[:-cut])
        steps = logged(tmp_path)["train/loss"].steps
        assert 10 < len(steps) < 30
        assert is_curve(
            (steps, curves["train/loss"].values[: len(steps)]), Curve(steps, logged(tmp_path)["train/loss"].values)
        )
    assert "cut short" in caplog.text
    file.write_bytes(whole + bytes(4096))  # as a crashed machine leaves it
    assert is_curve((curves["train/loss"].steps, curves["train/loss"].values), logged(tmp_path)["train/loss"])


@pytest.mark.parametrize("content", [b"not events\n" * 100, b"x", bytes(64)], ids=["text", "a byte", "zeros"])
def test_what_is_no_event_file_is_named(content, tmp_path):
    file = tmp_path / "events.out.tfevents.1.host"
    file.write_bytes(content)
    assert f"{file}: not a TensorBoard event file" in plot(tmp_path, tmp_path / "out.png", ok=False)


def test_a_folder_without_a_log_is_one_clear_error(tmp_path):
    out = tmp_path / "out.png"
    assert "there is no such folder" in plot(tmp_path / "no", out, ok=False)
    assert "no TensorBoard log" in plot(tmp_path, out, ok=False)
    file = tmp_path / "file"
    file.touch()
    assert "name the folder" in plot(file, out, ok=False)
    (tmp_path / "events.out.tfevents.1.host").touch()
    assert "the log is empty" in plot(tmp_path, out, ok=False)
    SummaryWriter(str(tmp_path)).close()
    assert "the log is empty" in plot(tmp_path, out, ok=False)
    log(tmp_path, {"train/lr": 1.0})
    assert "no loss and no error" in plot(tmp_path, out, ok=False)
    assert not out.exists()


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ending", "begins"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_the_picture_has_the_format_of_its_ending(ending, begins, tmp_path):
    log(tmp_path / "run", PRETRAINING)
    out = tmp_path / f"out.{ending}"
    plot(tmp_path / "run", out, "--column", "single")
    assert out.read_bytes().startswith(begins)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"out.{ending}", "run"]
    assert "--force" in plot(tmp_path / "run", out, ok=False)


def test_places_that_cannot_be_written_to_are_said_before_anything_is_read(tmp_path):
    assert ".png, .pdf or .svg" in plot(tmp_path / "no", tmp_path / "out.jpg", ok=False)
    assert "there is no folder" in plot(tmp_path / "no", tmp_path / "no" / "out.png", ok=False)


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ConfigError, match="no loss and no error"):
        training_run.draw({"train/lr": Curve(np.array([1]), np.array([1.0]))})
