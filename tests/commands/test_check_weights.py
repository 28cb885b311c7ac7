"""`fairchem-scd check`: what the noise weighs beside the forces, against the formulas written out atom by atom."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from fairchem_scd.commands.check.report import Report
from fairchem_scd.commands.check.weights import describe_weights, forces_of_zero, noise_of_zero
from fairchem_scd.denoising.structures import structures_of
from fairchem_scd.testing import collate, make_trainer
from tests.support.configs import pretraining, tiny_config

STDEV = 1.5  # of the forces' normaliser in `tiny_config`, eV/Å
DENS = {"dens": {"prob": 0.5, "coefficient": 10, "std": 0.1, "corrupt_ratio": 0.5}}


def trainer_of(folder, run, denoising, force_loss="l2mae", free_only=True, **optim):
    config = tiny_config(folder, denoising=denoising, optim=optim)
    config["loss_functions"][1]["forces"]["fn"] = force_loss
    config["outputs"]["forces"]["train_on_free_atoms"] = free_only
    return make_trainer(config, run)


def rows_of(trainer):
    return [trainer.train_loader.dataset[i] for i in range(len(trainer.train_loader.dataset))]


def loss_by_hand(kind, vectors):
    """The mean loss of predicting zero for vectors, each written out."""
    vectors = np.asarray(vectors, dtype=float)
    if kind == "l2mae":
        return sum(math.sqrt(x * x + y * y + z * z) for x, y, z in vectors) / len(vectors)
    if kind == "mae":
        return sum(abs(x) + abs(y) + abs(z) for x, y, z in vectors) / (3 * len(vectors))
    return sum(x * x + y * y + z * z for x, y, z in vectors) / (3 * len(vectors))


@pytest.mark.parametrize("kind", ["l2mae", "mae", "mse"])
@pytest.mark.parametrize("free_only", [True, False])
def test_losses_of_predicting_zero_are_those_of_the_formula(kind, free_only, data, tmp_path):
    """λ_F mean L(F_i / stdev) over the atoms that train, and λ mean L(ε_i / σ) over the atoms that moved."""
    trainer = trainer_of(data, tmp_path, DENS, kind, free_only)
    rows = rows_of(trainer)
    forces = [
        [component / STDEV for component in force]
        for row in rows
        for force, fixed in zip(row.forces.tolist(), row.fixed.tolist(), strict=True)
        if not (free_only and fixed)
    ]
    batch = collate(rows)
    assert forces_of_zero(trainer, batch) == pytest.approx(100 * loss_by_hand(kind, forces), rel=1e-5)
    draws = [trainer.tasks["dens"].corrupt(structures_of(batch), seed=0, step=k) for k in (1, 2)]
    noise = [
        [component / 0.1 for component in moved]
        for draw in draws
        for moved, was in zip(draw.noise.tolist(), draw.mask.tolist(), strict=True)
        if was
    ]
    found = noise_of_zero(trainer, trainer.tasks["dens"], draws)
    assert found == pytest.approx(10 * loss_by_hand(kind, noise), rel=1e-5)


@pytest.mark.parametrize(
    ("block", "kind", "unit"),
    [
        ({"scd": {"coefficient": 7, "std": 0.03}}, "mse", 0.03),
        ({"scd": {"coefficient": 7, "std": 0.03, "loss": "l2mae"}}, "l2mae", 0.03),
        # The running scale begins at the root mean square of the σ.
        ({"scd": {"coefficient": 7, "num_steps": 2, "std_low": 0.01, "std_high": 0.07}}, "mse", 0.05),
        ({"noisy_nodes": {"coefficient": 7, "std": 0.01, "loss": "mae"}}, "mae", 0.01),
    ],
)
def test_noise_that_is_a_term_of_its_own_has_its_own_loss_and_unit(block, kind, unit, data, tmp_path):
    trainer = trainer_of(data, tmp_path, block)
    ((_, task),) = trainer.tasks.items()
    draw = task.corrupt(structures_of(collate(rows_of(trainer))), seed=0, step=1)
    noise = draw.noise[draw.mask].double().numpy() / unit
    assert noise_of_zero(trainer, task, [draw]) == pytest.approx(7 * loss_by_hand(kind, noise), rel=1e-5)


def said_of(trainer):
    lines = []
    report = Report(lines.append)
    describe_weights(trainer, report)
    assert not report.cautions  # what is said are values to try, and no fault of the config
    return "\n".join(lines)


def numbers(text):
    noise, forces, ratio = re.search(r"noise of \w+ ([\d.]+), forces ([\d.]+); ratio ([\d.]+)", text).groups()
    return float(noise), float(forces), float(ratio)


def test_the_ratio_and_the_coefficient_for_the_published_one_are_said(data, tmp_path):
    said = said_of(trainer_of(data, tmp_path, DENS))
    noise, forces, ratio = numbers(said)
    # The mean length of a vector of three standard normal numbers is √(8/π).
    assert noise == pytest.approx(10 * math.sqrt(8 / math.pi), rel=0.05)
    assert ratio == pytest.approx(noise / forces, rel=0.05)
    assert ratio < 0.9
    assert "the ratio is about 2.7" in said
    wanted = float(re.search(r"here coefficient: (\d+)\n", said).group(1))
    block = {"dens": {**DENS["dens"], "coefficient": wanted}}
    said = said_of(trainer_of(data, tmp_path / "again", block))
    assert numbers(said)[2] == pytest.approx(2.7, rel=0.05)
    assert "here coefficient" not in said


def test_the_share_of_force_labels_that_train_is_said_with_the_epochs_that_make_up_for_it(data, tmp_path):
    said = said_of(trainer_of(data, tmp_path, {"dens": {**DENS["dens"], "corrupt_ratio": None}}, max_epochs=6))
    # Every free atom moves in half of the steps.
    assert "50 % of the force labels train" in said
    assert "6 epochs see as many labels as 3 of plain training" in said
    assert "give it 12 epochs" in said
    said = said_of(trainer_of(data, tmp_path / "half", DENS))
    share = float(re.search(r"(\d+) % of the force labels", said).group(1))
    assert share == pytest.approx(75, abs=3)


def test_labels_of_fixed_atoms_that_train_count(data, tmp_path):
    """Fixed atoms never move, so their labels always train, where the config trains them."""
    block = {"dens": {**DENS["dens"], "corrupt_ratio": None}}
    trainer = trainer_of(data, tmp_path, block, free_only=False)
    fixed = [flag for row in rows_of(trainer) for flag in row.fixed.tolist()]
    expected = 1 - 0.5 * fixed.count(0) / len(fixed)
    assert f"{100 * expected:.0f} % of the force labels train" in said_of(trainer)


def test_a_run_in_which_no_force_label_trains_says_so(data, tmp_path):
    said = said_of(trainer_of(data, tmp_path, {"dens": {"prob": 1.0, "corrupt_ratio": None}}))
    assert "0 % of the force labels train" in said
    assert "give it" not in said


def test_beside_forces_other_tasks_say_a_weight_advise_nothing_and_hide_no_label(data, tmp_path):
    said = said_of(trainer_of(data, tmp_path, {"noisy_nodes": {}}))
    assert "noise of noisy_nodes" in said
    assert "of the force labels" not in said
    assert "coefficient" not in said
    tenfold = said_of(trainer_of(data, tmp_path / "again", {"noisy_nodes": {"coefficient": 1.0}}))
    assert numbers(tenfold)[2] == pytest.approx(10 * numbers(said)[2], rel=0.05)


def test_no_ratio_is_said_where_forces_have_no_loss(data, tmp_path):
    trainer = trainer_of(data, tmp_path, DENS)
    for _, info in trainer.loss_functions:
        info["coefficient"] = 0
    said = said_of(trainer)
    assert re.search(r"noise of dens [\d.]+, forces 0\n", said)
    assert "ratio" not in said
    assert "coefficient" not in said


def test_nothing_is_said_without_force_labels_or_tasks(data, tmp_path):
    assert said_of(make_trainer(pretraining(data), tmp_path)) == ""
    assert said_of(trainer_of(data, tmp_path / "plain", {"dens": {"prob": 0.0}})) == ""
