"""`fairchem-scd check`: what it says is so, and what would stop a run is found before it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from click.testing import CliRunner
from fairchem.core.common.registry import registry

from fairchem_scd import DenoisingHydra
from fairchem_scd.commands import main
from fairchem_scd.commands.check import environment, rounds
from fairchem_scd.commands.check.data import nearest_neighbours
from fairchem_scd.commands.check.report import Report
from fairchem_scd.denoising.corruption import corrupt
from fairchem_scd.denoising.tasks import build_tasks
from fairchem_scd.testing import slabs
from tests.support.configs import pretraining, tiny_config
from tests.support.models import hydra_arguments


@pytest.fixture(autouse=True)
def _own_environment():
    with mock.patch.dict(os.environ):
        yield


def write(folder: Path, config: dict) -> Path:
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def check(path: Path, *options: str, code: int = 0) -> str:
    arguments = ["check", str(path), "--repeats", "1", "--cpu", *options]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def problems(output: str) -> list[str]:
    if "\nProblems:\n" not in output:
        return []
    return re.findall(r"^ +\d+\. (.*(?:\n     .*)*)", output.split("\nProblems:\n")[1], re.M)


def test_what_is_said_of_a_sound_config_is_so(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = {"dens": {"prob": 0.25}, "scd": {"prob": 0.5}}
    output = check(write(tmp_path, tiny_config(data, denoising=block)))
    assert "No problems found." in output
    assert "25 % dens, 50 % scd, 25 % ordinary" in output
    assert "tensorboard starts" in output
    assert "torch_scatter works on cpu" in output
    rows = slabs(8)
    largest = max(float(row.forces.norm(dim=-1).max()) for row in rows)
    assert f"forces (|F| up to {largest:.3g} eV/Å)" in output
    assert "tags 0, 1, 2" in output
    assert re.search(r"weights +loss of predicting zero: noise of dens [\d.]+, forces [\d.]+; ratio [\d.]+\n", output)
    assert re.search(r"\n +loss of predicting zero: noise of scd [\d.]+, forces", output)
    assert re.search(r"labels +8\d % of the force labels train", output)
    model = DenoisingHydra(denoising=block, **hydra_arguments("equiformer_v2"))
    for module in (model.backbone, *model.output_heads.values(), *model.denoising["scd"].values()):
        assert f" {sum(p.numel() for p in module.parameters()):,}" in output
    assert re.search(r"ordinary [\d.]+ s, dens [\d.]+ s \([\d.]+ x\), scd [\d.]+ s \([\d.]+ x\); batch of 4", output)
    assert re.search(r"an epoch +2 steps", output)
    # Nothing but the config is there afterwards.
    assert [path.name for path in tmp_path.iterdir()] == ["config.yml"]


def test_which_of_the_extensions_are_stand_ins_is_said(monkeypatch):
    monkeypatch.setattr(environment, "version", {"torch-scatter": "2.1.2+standin", "torch-sparse": "0.6.18"}.get)
    said: list[str] = []
    environment.check_device({"cpu": True}, Report(said.append))
    kinds = "torch-scatter 2.1.2+standin (stand-in in plain PyTorch), torch-sparse 0.6.18"
    assert said[-1].strip() == f"torch_scatter works on cpu: {kinds}"


def test_pre_training_is_checked_without_labels(data, tmp_path):
    output = check(write(tmp_path, pretraining(data)))
    assert "100 % scd" in output
    assert "labels: none are used" in output
    assert "of these 720 are frozen" in output  # 90 elements, 8 channels
    assert "scd        moves" in output.replace("scd         moves", "scd        moves")
    assert "task.denoising.scd.condition: [] does without it" in output


@pytest.mark.parametrize(("condition", "fixed", "share"), [(["self"], 0, "24"), (["self"], 3, "9.3"), ([], 0, None)])
def test_what_an_embedding_may_explain_follows_from_the_components_of_the_noise(condition, fixed, share):
    natoms = torch.tensor([2, 5, 11, 1])
    movable = torch.ones(19, dtype=torch.bool)
    movable[:fixed] = False
    task = build_tasks({"scd": {"condition": condition}})[0]["scd"]
    corruption = corrupt(natoms, "abcd", movable, seed=0, step=1, sigmas=[0.1])
    said = []
    rounds.say_condition(task, "task.denoising.scd", corruption, Report(said.append))
    # 3, 12 and 30 components where all atoms move; with the first three fixed, the second structure has 12 of 4 atoms
    # and the first has none. A lone atom has nothing to denoise.
    assert bool(said) == (share is not None)
    if said:
        assert f"no more than {share} % of the noise error that plain denoising leaves:" in said[0]
        assert "task.denoising.scd.condition: [] does without it" in said[1]


def test_distances_to_nearest_neighbours_are_those_of_a_direct_count(rows):
    row = rows[0]
    shifts = torch.tensor([[i, j, k] for i in (-1, 0, 1) for j in (-1, 0, 1) for k in (-1, 0, 1)]).float()
    images = row.pos[None] + (shifts @ row.cell.view(3, 3))[:, None]
    distance = (row.pos[:, None, None] - images[None]).norm(dim=-1).flatten(1)
    distance[distance < 1e-4] = np.inf
    np.testing.assert_allclose(nearest_neighbours(row), distance.min(dim=1).values, rtol=1e-5)


def test_all_problems_are_named_at_once(data, tmp_path, monkeypatch):
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    monkeypatch.setattr(environment, "_try_scatter", mock.Mock(side_effect=RuntimeError("not compiled with CUDA")))
    config = tiny_config(data, denoising={"dens": {"probs": 0.5}})
    config["dataset"]["val"] = {"src": str(tmp_path / "nowhere"), "format": "lmdb"}
    config["logger"] = {"name": "paper"}
    found = problems(check(write(tmp_path, config), "--submit", code=1))
    assert len(found) == 6
    for said in (
        "task.denoising.dens.probs: unknown key; did you mean 'prob'?",
        "torch_scatter: RuntimeError: not compiled with CUDA",
        "unknown 'paper'",
        "no sbatch here",
        "--submit --cpu",
        "dataset.val.src",
    ):
        assert any(said in problem for problem in found), (said, found)


def database(folder: Path, change) -> dict:
    """An ASE database of ten slabs as a dataset block, one of them changed."""
    with connect(folder / "rows.db") as rows:
        for i, row in enumerate(slabs(10, seed=2)):
            atoms = Atoms(row.atomic_numbers.numpy(), row.pos.numpy(), cell=row.cell[0].numpy(), pbc=True)
            results = {"energy": float(row.energy), "forces": row.forces.numpy().copy()}
            if i == 7:
                atoms = change(atoms, results) or atoms
            atoms.calc = SinglePointCalculator(atoms, **results)
            rows.write(atoms)
    return {"format": "ase_db", "src": str(folder / "rows.db"), "a2g_args": {"r_energy": True, "r_forces": True}}


def nan_forces(atoms, results):
    results["forces"][3] = np.nan


def heavy(atoms, results):
    atoms.numbers[0] = 103


@pytest.mark.parametrize(
    ("change", "said"),
    [(nan_forces, r"forces of an atom is not finite"), (heavy, r"element 103 \(Lr\) is beyond the model's table")],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_bad_row_is_named_in_either_split(split, change, said, data, tmp_path):
    config = tiny_config(data)
    config["dataset"][split] = {**config["dataset"][split], **database(tmp_path, change)}
    config["dataset"]["val"]["use_train_settings"] = False
    if split == "train":
        config["dataset"]["val"].update(
            format="emt_slabs", num_systems=6, key_mapping={"y": "energy", "force": "forces"}
        )
    (problem,) = problems(check(write(tmp_path, config), code=1))
    assert re.search(said, problem)
    assert re.search(r"sid/fid|structure", problem)


def other_trainer(config, folder):
    config["trainer"] = "equiformerv2_forces"


def no_such_backbone(config, folder):
    config["model"]["backbone"]["model"] = "equiformer_v3_backbone"


def no_forces_head(config, folder):
    del config["model"]["heads"]["forces"]


def no_such_metric(config, folder):
    config["evaluation_metrics"] = {"primary_metric": "foo_mae", "metrics": {"energy": ["mae"]}}


def infinite_rate(config, folder):
    config["optim"].update(lr_initial=1e30, scheduler="Null")


def no_training_data(config, folder):
    del config["dataset"]["train"]


def bad_checkpoint(config, folder):
    (folder / "cut.pt").write_bytes(b"half")


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (other_trainer, (), "'equiformerv2_forces' is not this package's"),
        (no_such_backbone, (), "unknown 'equiformer_v3_backbone'"),
        (no_forces_head, (), "forces"),
        (no_such_metric, (), "'foo_mae' is not among what validation gives"),
        (infinite_rate, ("--repeats", "3"), "the loss is "),
        (no_training_data, (), "dataset.train: missing"),
        (bad_checkpoint, ("--checkpoint", "cut.pt"), "cut.pt: not a checkpoint"),
        (None, ("--gp-gpus", "2"), "--gp-gpus"),
        (None, ("--no-such-flag",), "--no-such-flag: fairchem does not take that"),
        (None, ("--optim.batch_size=0",), "batch"),
    ],
)
def test_what_would_stop_a_run_is_a_problem(change, options, said, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny_config(data)
    if change is not None:
        change(config, tmp_path)
    found = problems(check(write(tmp_path, config), *options, code=1))
    assert any(said in problem for problem in found), found


def test_without_a_gpu_and_without_cpu_all_is_checked_on_the_cpu(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = write(tmp_path, tiny_config(data))
    result = CliRunner().invoke(main, ["check", str(path), "--repeats", "1"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "without --cpu fairchem would not start on this machine" in result.output
    assert "a step" in result.output


def test_files_that_are_no_configs_are_refused(tmp_path):
    for text, said in (
        (None, "no such file"),
        ("a: [1", "config"),
        ("- 1", "config"),
        ("includes: [gone.yml]", "gone.yml"),
        ("a: 1\na: 2", "config"),
    ):
        path = tmp_path / "config.yml"
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        (problem,) = problems(check(path, code=1))
        assert said in problem


def test_wandb_without_a_key_is_a_problem_and_nothing_is_sent(data, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    config = tiny_config(data)
    config["logger"] = {"name": "wandb", "project": "p", "entity": "e"}
    started = {}

    class Wandb(registry.get_logger_class("tensorboard")):
        def __init__(self, config):
            started.update(os.environ)
            super().__init__(config)

    monkeypatch.setitem(registry.mapping["logger_name_mapping"], "wandb", Wandb)
    (problem,) = problems(check(write(tmp_path, config), code=1))
    assert "wandb has no API key here" in problem
    assert started["WANDB_MODE"] == "offline"


def test_noise_as_large_as_bonds_is_pointed_out(data, tmp_path):
    output = check(write(tmp_path, tiny_config(data, denoising={"dens": {"std": 0.8}})))
    assert "they may change places" in output
    assert "No problems found." in output
    calm = check(write(tmp_path, tiny_config(data)))
    assert "change places" not in calm
