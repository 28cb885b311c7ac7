"""`fairchem-scd check` on fairchem 2.x: what it says is so, and what would stop a run is found before it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from fairchem_scd.commands.fairchem2.check_data import nearest_neighbours
from fairchem_scd.fairchem2.unit import DenoisingTrainEvalUnit
from tests.fairchem2.command_line import fairchem_scd
from tests.fairchem2.support import broken, crystal, crystals, database, model_config, row, run_config, task, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where training and validation data lie."""
    folder = tmp_path_factory.mktemp("checked")
    write(folder, "train", crystals(6))
    write(folder, "val", crystals(3, seed=50))
    return folder


def check(config: dict, path: Path, *overrides: str, code: int = 0) -> str:
    path.write_text(yaml.safe_dump(config))
    return fairchem_scd("check", path, "--repeats", "1", *overrides, code=code).output


def problems(output: str) -> list[str]:
    if "\nProblems:\n" not in output:
        return []
    return re.findall(r"^ +\d+\. (.*(?:\n     .*)*)", output.split("\nProblems:\n")[1], re.M)


def test_what_is_said_of_a_sound_config_is_so(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {path.name for path in folder.iterdir()}
    block = {"dens": {"prob": 0.25}, "scd": {"prob": 0.5}}
    output = check(run_config(folder, denoising=block), tmp_path / "config.yaml")
    assert "No problems found." in output
    assert "25 % dens, 50 % scd, 25 % ordinary" in output
    assert "train       6 structures; in 6 looked at: 4 to 8 atoms" in output
    largest = max(np.linalg.norm(atoms.calc.results["forces"], axis=1).max() for atoms in crystals(6))
    assert f"forces (|F| up to {largest:.3g} eV/Å)" in output
    assert re.search(r"weights +loss of predicting zero: noise of dens [\d.]+, forces [\d.]+; ratio", output)
    assert re.search(r"labels +\d+ % of the force labels train", output)
    assert re.search(r"ordinary [\d.]+ s, dens [\d.]+ s \([\d.]+ x\), scd [\d.]+ s \([\d.]+ x\); batch of \d", output)
    assert re.search(r"validation +works, with batches of \d: mo.val,energy,mae [\d.]+, mo.val,forces,mae", output)
    # Nothing but the config is there afterwards.
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert {path.name for path in folder.iterdir()} == before


def test_the_parameters_are_counted_by_what_needs_them(folder, tmp_path):
    seen = []
    original = DenoisingTrainEvalUnit.__init__

    def noting(self, *args, **kwargs):
        original(self, *args, **kwargs)
        seen.append(self.model.module)

    with mock.patch.object(DenoisingTrainEvalUnit, "__init__", noting):
        output = check(run_config(folder, denoising={"scd": {}}), tmp_path / "config.yaml")
    (model,) = seen
    for module in (model.backbone, *model.output_heads.values(), *model.denoising["scd"].values()):
        assert f" {sum(p.numel() for p in module.parameters()):,}" in output


def test_pre_training_is_checked_without_labels(folder, tmp_path):
    config = run_config(folder, tasks=[], model=model_config(heads={}), denoising={"scd": {}})
    output = check(config, tmp_path / "config.yaml")
    assert "100 % scd" in output
    assert "labels: none are used" in output
    assert "frozen" in output
    assert "the noise is predicted" in output
    assert "runner.train_eval_unit.denoising.scd.condition: [] does without it" in output


def test_distances_to_nearest_neighbours_are_those_of_a_direct_count():
    data = row(crystal(3))
    shifts = torch.tensor([[i, j, k] for i in (-1, 0, 1) for j in (-1, 0, 1) for k in (-1, 0, 1)]).float()
    images = data.pos[None] + (shifts @ data.cell.view(3, 3))[:, None]
    distance = (data.pos[:, None, None] - images[None]).norm(dim=-1).flatten(1)
    distance[distance < 1e-4] = np.inf
    np.testing.assert_allclose(nearest_neighbours(data), distance.min(dim=1).values, rtol=1e-5)


def test_settings_that_are_wrong_are_problems_under_the_users_key(folder, tmp_path):
    output = check(run_config(folder, denoising={"scd": {"stdd": 1}}), tmp_path / "config.yaml", code=1)
    (problem,) = problems(output)
    assert problem == "runner.train_eval_unit.denoising.scd.stdd: unknown key; did you mean 'std'?"


def test_the_hosts_own_unit_is_a_problem(folder, tmp_path):
    (problem,) = problems(check(run_config(folder), tmp_path / "config.yaml", code=1))
    assert "is not this package's, so nothing is denoised" in problem


def test_a_graph_of_the_data_is_a_problem(folder, tmp_path):
    config = run_config(folder, denoising={"scd": {}}, model=model_config(otf_graph=False))
    (problem,) = problems(check(config, tmp_path / "config.yaml", code=1))
    assert "otf_graph is false" in problem


def test_data_that_is_not_there_is_a_problem(folder, tmp_path):
    config = run_config(folder, denoising={"scd": {}})
    config["runner"]["train_dataloader"]["dataset"]["dataset_configs"]["mo"]["splits"]["train"]["src"] = [
        "none.aselmdb"
    ]
    (problem,) = problems(check(config, tmp_path / "config.yaml", code=1))
    assert "none.aselmdb" in problem


@pytest.mark.parametrize("on_bad_data", ["stop", "skip"])
def test_a_row_that_cannot_be_read_is_a_problem_where_it_would_end_the_run(on_bad_data, tmp_path):
    write(tmp_path, "train", crystals(6))
    write(tmp_path, "val", crystals(3, seed=50))
    broken(database(tmp_path, "train"), 3)
    config = run_config(tmp_path, denoising={"scd": {}, "on_bad_data": on_bad_data})
    stops = on_bad_data == "stop"
    output = check(config, tmp_path / "config.yaml", code=int(stops))
    if stops:
        advice = r"With runner\.train_eval_unit\.denoising\.on_bad_data: skip"
        assert any(re.search(rf"mo\.train, row 2: cannot be read.* {advice}", found) for found in problems(output))
    else:
        assert "No problems found." in output
        assert "train: 1 of the rows looked at will be left out; the first: mo.train, row 2: cannot be read" in output


def test_a_loss_that_is_not_finite_is_a_problem(folder, tmp_path):
    huge = task("energy", loss_fn={**task("energy")["loss_fn"], "coefficient": 1e39})
    config = run_config(folder, denoising={"scd": {}}, tasks=[huge, task("forces")])
    found = problems(check(config, tmp_path / "config.yaml", code=1))
    assert any("or its gradients are not finite" in problem for problem in found)


def test_noise_that_makes_atoms_change_places_is_something_to_know(folder, tmp_path):
    output = check(run_config(folder, denoising={"scd": {"std": 1.0}}), tmp_path / "config.yaml")
    assert "they may change places" in output


def test_structures_whose_atoms_are_all_fixed_cannot_be_denoised(tmp_path):
    fixed = []
    for atoms in crystals(4):
        results = atoms.calc.results
        atoms.set_constraint()
        atoms.calc = SinglePointCalculator(atoms, energy=results["energy"], forces=results["forces"])
        atoms.set_constraint(FixAtoms(range(len(atoms))))
        fixed.append(atoms)
    write(tmp_path, "train", fixed)
    write(tmp_path, "val", fixed)
    found = problems(check(run_config(tmp_path, denoising={"scd": {}}), tmp_path / "config.yaml", code=1))
    assert any("moves no atom of the 4 structures looked at" in problem for problem in found)


def test_overrides_are_hydras(folder, tmp_path):
    config = run_config(folder, denoising={"scd": {}})
    output = check(config, tmp_path / "config.yaml", "+runner.train_eval_unit.denoising.scd.prob=0.25")
    assert "25 % scd, 75 % ordinary" in output
    (problem,) = problems(check(config, tmp_path / "config.yaml", "--cpu", code=1))
    assert "such as job.device_type=CPU" in problem


def test_a_logger_without_a_key_is_a_problem(folder, tmp_path):
    config = run_config(folder, denoising={"scd": {}})
    logger = "fairchem.core.common.logger.WandBSingletonLogger.init_wandb"
    config["job"] |= {"debug": False, "logger": {"_target_": logger, "_partial_": True, "project": "p", "entity": "e"}}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    with mock.patch.dict(os.environ, {**clean, "HOME": str(tmp_path)}, clear=True):
        found = problems(check(config, tmp_path / "config.yaml", code=1))
    assert any("no API key here" in problem for problem in found)
    with mock.patch.dict(os.environ, {"WANDB_MODE": "offline"}):
        assert "Weights & Biases starts" in check(config, tmp_path / "config.yaml")
