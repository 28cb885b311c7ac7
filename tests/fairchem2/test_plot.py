"""`fairchem-scd plot` and `compare` on fairchem 2.x: what is drawn and compared is what the run logged."""

from __future__ import annotations

import os
import re
from unittest import mock

import numpy as np
import pytest
import wandb

from fairchem_scd.commands.fairchem2.training_log import find_run, read_curves
from fairchem_scd.commands.plot import training_run
from fairchem_scd.errors import ConfigError
from tests.fairchem2.command_line import fairchem_scd

STEPS = 400  # records of which fill more than one block of the file


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """The folder of a run that logged to Weights & Biases without sending, as the host logs; and what it logged."""
    folder = tmp_path_factory.mktemp("runs")
    logs = folder / "may" / "logs"
    logs.mkdir(parents=True)
    quiet = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    values = {}
    wandb.teardown()  # it reads the environment once, and an earlier test may have made it do so
    with mock.patch.dict(os.environ, quiet):
        run = wandb.init(id="may", dir=str(logs), project="p", settings=wandb.Settings(console="off"))
        for step in range(STEPS):
            record = {"train/step": step, "train/loss": 9.0 / (step + 1), "train/forces_loss": 5.0, "train/lr": 1e-3}
            if step == 7:
                record["train/loss"] = float("nan")
            if step % 2:
                record |= {"train/denoising_pos_mae": 0.08 - 1e-4 * step, "train/denoising_pos_loss": 4.0}
            if step % 100 == 99:
                run.log({"val/emt.val,forces,mae": 0.5, "val/emt.val,forces,cosine_similarity": 0.9}, commit=False)
            run.log(record, step=step, commit=True)
            values[step] = record
        run.finish()
        wandb.teardown()  # its service has written all only then
    return folder, values


def test_curves_of_weights_and_biases_hold_what_was_logged(offline):
    folder, values = offline
    name, files = find_run(folder)
    curves = read_curves(files, training_run.ENDINGS)
    assert name == "may"
    np.testing.assert_array_equal(curves["train/loss"].steps, np.arange(STEPS))
    np.testing.assert_array_equal(curves["train/loss"].values, [v["train/loss"] for v in values.values()])
    noise = {step: v["train/denoising_pos_mae"] for step, v in values.items() if "train/denoising_pos_mae" in v}
    np.testing.assert_array_equal(curves["train/denoising_pos_mae"].steps, list(noise))
    np.testing.assert_array_equal(curves["train/denoising_pos_mae"].values, list(noise.values()))
    assert curves["val/forces_mae"].values.tolist() == [0.5] * 4
    assert "train/lr" not in curves


def test_the_picture_has_a_panel_for_each_quantity(offline, tmp_path):
    folder, _ = offline
    out = tmp_path / "run.png"
    result = fairchem_scd("plot", folder, out)
    assert f"{out}: may, {STEPS - 1} steps, 3 panels" in result.output
    assert "The loss is not a number at step 7" in result.output


def test_a_file_that_is_cut_short_gives_what_is_whole(offline, tmp_path):
    _, (file,) = find_run(offline[0])
    cut = tmp_path / "run-cut.wandb"
    cut.write_bytes(file.read_bytes()[:20_000])
    steps = read_curves([cut], ("loss",))["train/loss"].steps
    assert 10 < len(steps) < STEPS
    np.testing.assert_array_equal(steps, np.arange(len(steps)))


def test_of_two_runs_one_is_chosen_by_its_name(offline, tmp_path):
    _, (file,) = find_run(offline[0])
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"run-{name}.wandb").write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match="2 runs; choose one by --run: a, b"):
        find_run(tmp_path)
    assert find_run(tmp_path, "b")[0] == "b"
    with pytest.raises(ConfigError, match="no run 'c'; there are a, b"):
        find_run(tmp_path, "c")


CONSOLE = """\
INFO:root:{'train/loss': 8.5, 'train/lr': 0.1, 'train/step': 0, 'train/grad_norm': 2.0}
INFO:root:{'train/step': 0, 'train/denoising_pos_mae': 0.08, 'train/denoising_pos_loss': 3.0}
INFO:root:{'train/step': 0, 'train/oc20_forces_loss': 2.0, 'train/omat_forces_loss': 3.0}
INFO:root:{'train/step': 1, 'train/denoising_oc20_force_loss': 2.5, 'train/denoising_oc20_force_mae': 0.45}
INFO:root:{'train/step': 1, 'train/denoising_omat_force_loss': 3.5, 'train/denoising_omat_force_mae': 0.55}
INFO:root:{'train/step': 1, 'train/denoising_oc20_energy_mae': 1.75}
noise {'train/loss': cut sh
INFO:root:{'train/loss': nan, 'train/lr': 0.1, 'train/step': 10}
INFO:root:Finished aggregating metrics:
  val/oc20.val,oc20_energy,mae: 1.5000
  val/oc20.val,forces,mae: 0.2500
  val/omat.val,forces,mae: 0.3500
  val/loss: 4.0000

INFO:root:Validation after 18 steps
  val/loss: 3.5000
INFO:root:{'val/denoising_pos_mae': 0.07}
INFO:root:{'train/loss': 4.25, 'train/lr': 0.1, 'train/step': 20}
"""


def test_console_output_is_read_where_nothing_else_was_logged(tmp_path):
    (tmp_path / "run.log").write_text(CONSOLE)
    (tmp_path / "other.log").write_text("nothing of a run\n")
    name, files = find_run(tmp_path)
    curves = read_curves(files, training_run.ENDINGS)
    assert name == "run"
    assert curves["train/loss"].steps.tolist() == [0, 10, 20]
    np.testing.assert_array_equal(curves["train/loss"].values, [8.5, np.nan, 4.25])
    assert curves["train/denoising_pos_mae"].values.tolist() == [0.08]
    assert curves["val/loss"].values.tolist() == [4.0, 3.5]
    assert curves["val/loss"].steps.tolist() == [11, 18], "after the last step printed, unless the log says after which"
    assert curves["val/denoising_pos_mae"].steps.tolist() == [18]
    assert curves["val/denoising_pos_mae"].values.tolist() == [0.07]
    assert find_run(tmp_path / "run.log") == ("run", [tmp_path / "run.log"])


def test_errors_of_each_data_set_are_lines_of_their_own(tmp_path):
    (tmp_path / "run.log").write_text(CONSOLE)
    curves = read_curves([tmp_path / "run.log"], training_run.ENDINGS)
    found = {
        tag: curve.values.tolist() for tag, curve in curves.items() if re.fullmatch(r"val/(?!denoising_)\w+_mae", tag)
    }
    assert found == {"val/oc20_energy_mae": [1.5], "val/oc20_forces_mae": [0.25], "val/omat_forces_mae": [0.35]}
    figure = training_run.draw(curves)
    panels = {
        ax.get_ylabel(): {line.get_label(): (line.get_color(), line.get_linestyle()) for line in ax.get_lines()}
        for ax in figure.axes
    }
    assert set(panels) == {"loss", "force error (eV/Å)", "energy error (eV)", "denoising error (Å)"}
    assert set(panels["energy error (eV)"]) == {"oc20, denoising", "oc20, validation"}
    forces, losses = panels["force error (eV/Å)"], panels["loss"]
    assert set(forces) == {f"{name}, {kind}" for name in ("oc20", "omat") for kind in ("denoising", "validation")}
    assert {"oc20 forces", "oc20 forces, denoising", "omat forces", "omat forces, denoising"} <= set(losses)
    # A data set has one colour in a panel; what is of corrupted structures is dashed.
    for name in ("oc20", "omat"):
        assert forces[f"{name}, denoising"] == (forces[f"{name}, validation"][0], "--")
        assert losses[f"{name} forces, denoising"] == (losses[f"{name} forces"][0], "--")
    assert forces["oc20, denoising"][0] != forces["omat, denoising"][0]


def test_runs_are_compared_by_their_console_output(tmp_path):
    """Only runs with a task log after how many steps they were validated; for others it is taken from what is near."""
    plain = CONSOLE.replace("INFO:root:Validation after 18 steps\n", "")
    dens = CONSOLE.replace("0.2500", "0.2000")
    for name, text in (("plain", plain), ("dens", dens)):
        (tmp_path / f"{name}.log").write_text(text)
    output = fairchem_scd("compare", f"plain={tmp_path / 'plain.log'}", f"dens={tmp_path / 'dens.log'}").output
    assert re.search(r"oc20_forces_mae \(eV/Å\) +omat_forces_mae \(eV/Å\) +oc20_energy_mae \(eV\)\n", output)
    assert "dens: oc20_forces_mae 20.0 % lower than plain (no interval: one run)" in output
    assert "dens: omat_forces_mae equal to plain (no interval: one run)" in output


def test_energies_per_atom_are_errors_too(tmp_path):
    text = CONSOLE.replace("oc20_energy,mae", "oc20_energy,per_atom_mae")
    (tmp_path / "run.log").write_text(text)
    assert read_curves([tmp_path / "run.log"], ("_mae",))["val/oc20_energy_per_atom_mae"].values.tolist() == [1.5]


def test_what_cannot_be_drawn_is_said_in_one_line(tmp_path):
    def error(*words):
        result = fairchem_scd("plot", *words, code=1)
        assert result.output.count("Error: ") == 1
        return result.output

    out = tmp_path / "out.png"
    assert "there is no such folder" in error(tmp_path / "none", out)
    assert "neither of Weights & Biases" in error(tmp_path, out)
    (tmp_path / "empty.txt").write_text("")
    assert "nothing is logged in it" in error(tmp_path / "empty.txt", out)
    (tmp_path / "run-x.wandb").write_bytes(b"something else")
    assert "not a file of Weights & Biases" in error(tmp_path, out)
