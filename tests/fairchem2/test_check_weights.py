"""`fairchem-scd check` on fairchem 2.x: what the noise weighs beside the forces, against the formulas by hand."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
from fairchem.core.datasets.atomic_data import atomicdata_list_to_batch

from fairchem_scd.commands.check.report import Report
from fairchem_scd.commands.fairchem2.check_weights import describe_weights, forces_of_zero, noise_of_zero
from fairchem_scd.fairchem2.batch import structures_of
from fairchem_scd.fairchem2.rows import Guarded, row_check
from tests.fairchem2.support import batch_of, crystals, mixture, row, task, unit_of

RMSD = 0.729  # of the forces' normaliser in `task`, eV/Å
DENS = {"dens": {"prob": 0.5, "coefficient": 10, "std": 0.1, "corrupt_ratio": 0.5}}
HIDDEN = {"dens": {**DENS["dens"], "corrupt_ratio": None}}  # every free atom moves


def tasks_with(reduction="mean", free_only=True, coefficient=2):
    loss = {**task("forces")["loss_fn"], "reduction": reduction, "coefficient": coefficient}
    return [task("energy"), task("forces", loss_fn=loss, train_on_free_atoms=free_only)]


def runner_of(unit, rows, **length):
    """What the check reads of the host's runner."""
    how = {"max_epochs": 1, "max_steps": None, **length}
    return SimpleNamespace(train_eval_unit=unit, train_dataloader=Loader(rows), **how)


class Loader:
    def __init__(self, rows):
        self.dataset = rows

    def __len__(self):
        return 10

    def collate_fn(self, rows):
        return atomicdata_list_to_batch(rows)


def said_of(block, rows=None, tasks=None, **length):
    lines = []
    unit = unit_of(block, tasks=tasks_with() if tasks is None else tasks)
    describe_weights(runner_of(unit, rows or [row(atoms) for atoms in crystals(4)], **length), Report(lines.append))
    return "\n".join(lines)


def drawn(unit, batch, name, count=2):
    structures = structures_of(batch, batch.pbc, unit.tasks)
    return [unit.setup.tasks[name].corrupt(structures, seed=0, step=k) for k in range(1, count + 1)]


def mean_of(vectors, structures, reduction):
    """Mean length of vectors [n, 3], over all or over those of each structure first."""
    lengths = np.linalg.norm(np.asarray(vectors, dtype=float), axis=1)
    if reduction == "mean":
        return lengths.mean()
    return np.mean([lengths[structures == i].mean() for i in np.unique(structures)])


@pytest.mark.parametrize("reduction", ["mean", "per_structure"])
@pytest.mark.parametrize("free_only", [True, False])
def test_losses_of_predicting_zero_are_those_of_the_formula(reduction, free_only):
    """λ_F mean |F_i / rmsd| over the atoms that train, and λ mean |ε_i / σ| over the atoms that moved."""
    unit = unit_of(DENS, tasks=tasks_with(reduction, free_only))
    batch = batch_of(crystals(3))
    trains = (batch.fixed == 0).numpy() if free_only else np.ones(len(batch.pos), dtype=bool)
    of, forces = batch.batch.numpy(), batch.forces.numpy() / RMSD
    expected = 2 * mean_of(forces[trains], of[trains], reduction)
    assert forces_of_zero(unit, batch) == pytest.approx(expected, rel=1e-5)
    draws = drawn(unit, batch, "dens")
    noise = np.concatenate([draw.noise[draw.mask].numpy() / 0.1 for draw in draws])
    structures = np.concatenate([3 * k + of[draw.mask.numpy()] for k, draw in enumerate(draws)])
    found = noise_of_zero(unit, batch, unit.setup.tasks["dens"], draws)
    assert found == pytest.approx(10 * mean_of(noise, structures, reduction), rel=1e-5)


def test_with_several_data_sets_losses_are_the_sums_of_theirs():
    model, tasks = mixture("ab", direct=True)
    unit, batch = unit_of(DENS, model=model, tasks=tasks), batch_of(crystals(4))
    of_a = np.array([True, False, True, True])[batch.batch.numpy()]
    for name, mine in (("a", of_a), ("b", ~of_a)):
        batch[f"{name}_forces"] = batch.forces.clone()
        batch[f"{name}_forces"][~mine] = np.inf
    batch.dataset_name = ["a.train", "b.train", "a.train", "a.train"]
    free, forces = (batch.fixed == 0).numpy(), batch.forces.numpy() / RMSD
    parts = [2 * mean_of(forces[free & mine], None, "mean") for mine in (of_a, ~of_a)]
    assert forces_of_zero(unit, batch) == pytest.approx(sum(parts), rel=1e-5)
    draws = drawn(unit, batch, "dens")
    parts = [
        10 * mean_of(np.concatenate([d.noise.numpy()[d.mask.numpy() & mine] for d in draws]) / 0.1, None, "mean")
        for mine in (of_a, ~of_a)
    ]
    found = noise_of_zero(unit, batch, unit.setup.tasks["dens"], draws)
    assert found == pytest.approx(sum(parts), rel=1e-5)


@pytest.mark.parametrize(
    ("block", "power", "scale"),
    [
        ({"scd": {"coefficient": 7, "std": 0.03}}, 2, 0.03),
        # The running scale begins at the root mean square of the σ.
        ({"scd": {"coefficient": 7, "num_steps": 2, "std_low": 0.01, "std_high": 0.07}}, 2, 0.05),
        ({"noisy_nodes": {"coefficient": 7, "std": 0.01, "loss": "mae"}}, 1, 0.01),
    ],
)
def test_noise_that_is_a_term_of_its_own_has_its_own_loss_and_unit(block, power, scale):
    unit, batch = unit_of(block, tasks=tasks_with()), batch_of(crystals(3))
    ((name, denoising),) = unit.setup.tasks.items()
    (draw,) = drawn(unit, batch, name, 1)
    expected = 7 * np.mean(np.abs(draw.noise[draw.mask].double().numpy() / scale) ** power)
    assert noise_of_zero(unit, batch, denoising, [draw]) == pytest.approx(expected, rel=1e-5)


def test_the_coefficient_that_is_said_makes_the_ratio_that_of_the_published_run():
    said = said_of(DENS, tasks=tasks_with(coefficient=200))
    noise, forces, ratio = re.search(r"noise of dens ([\d.]+), forces ([\d.]+); ratio ([\d.]+)", said).groups()
    assert float(ratio) == pytest.approx(float(noise) / float(forces), rel=0.05)
    wanted = float(re.search(r"ratio is about 2.7; here coefficient: (\d+)\n", said)[1])
    again = said_of({"dens": {**DENS["dens"], "coefficient": wanted}}, tasks=tasks_with(coefficient=200))
    assert float(re.search(r"ratio ([\d.]+)", again)[1]) == pytest.approx(2.7, rel=0.05)
    assert "here coefficient" not in again


@pytest.mark.parametrize(
    ("length", "words"),
    [
        ({"max_epochs": 6}, ("6 epochs see as many labels as 3 of plain", "give it 12 epochs")),
        ({"max_epochs": None, "max_steps": 3000}, ("3000 steps see as many labels as 1500 of", "give it 6000 steps")),
        ({"max_epochs": 6, "max_steps": 40}, ("40 steps see as many labels as 20 of", "give it 80 steps")),
    ],
)
def test_the_share_of_force_labels_that_train_is_said_with_the_length_that_makes_up_for_it(length, words):
    said = said_of(HIDDEN, **length)
    assert "50 % of the force labels train" in said
    assert all(each in said for each in words)


def test_rows_that_cannot_be_trained_on_are_left_out():
    rows = [row(atoms) for atoms in crystals(3)]
    bad = row(crystals(1, 50)[0])
    bad.forces *= np.nan
    expected = said_of(HIDDEN, rows)
    assert said_of(HIDDEN, [rows[0], bad, *rows[1:]]) == expected
    unit = unit_of(HIDDEN, tasks=tasks_with())
    guarded = Guarded([rows[0], bad, *rows[1:]], "mo.train", row_check(unit.tasks, unit.model.module.adapter))
    assert guarded[1].bad_data, "a guard puts the next row in its place"
    assert said_of(HIDDEN, guarded) == expected


def test_nothing_is_said_where_no_forces_train_or_their_loss_is_a_sum():
    assert said_of({"scd": {}}, tasks=[task("energy")]) == ""
    assert said_of({"dens": {"prob": 0.0}}) == ""
    assert said_of({"scd": {}}, tasks=tasks_with("sum")) == ""
    assert "noise of scd" in said_of({"scd": {}})
