"""The study of what the denoising tasks buy on fairchem 2.x: its data, its arms, and what its runs start from."""

from __future__ import annotations

from pathlib import Path

import ase.db
import hydra
import numpy as np
import pytest
import torch
import yaml
from ase.calculators.singlepoint import SinglePointCalculator

from benchmarks.evidence import databases
from benchmarks.evidence.results import Results
from benchmarks.fairchem2 import learning
from tests.fairchem2.support import batch_of, crystals

ENERGIES = {13: -3.7, 29: 1.25, 47: 0.5}  # of the elements of `crystals`, eV


@pytest.fixture
def data(tmp_path):
    """A folder with the study's data under their names, of fewer structures."""
    folder = tmp_path / "data"
    folder.mkdir()
    for seed, name in enumerate(("mlearn_Mo_train.db", "mlearn_Mo_test.db", "oxides.db")):
        with ase.db.connect(str(folder / name)) as rows:
            for atoms in crystals(10, 100 * seed):
                rows.write(atoms)
    return folder


@pytest.fixture
def host(monkeypatch):
    """The configs that the host's command was given. It trains nothing and leaves a checkpoint that says so."""
    given = []

    def command(arguments, overrides):
        config = yaml.safe_load(Path(arguments.config).read_text())
        given.append(config)
        final = Path(config["job"]["run_dir"]) / "run/checkpoints/final"
        final.mkdir(parents=True)
        (final / "inference_ckpt.pt").write_text(f"checkpoint {len(given)}")

    monkeypatch.setattr(learning, "fairchem", command)
    monkeypatch.setattr(learning.distutils, "cleanup", lambda: None)  # it waits half a second for ports
    monkeypatch.setattr(learning, "judge", lambda checkpoint, *_, **__: {"energy_mae": 0.0})
    return given


def contents(structures):
    return {atoms.positions.tobytes() for atoms in structures}


def unit_of(config):
    return config["runner"]["train_eval_unit"]


def rows_of(config, data="Mo"):
    """The structures that a run of the host would train on."""
    dataset = config["runner"]["train_dataloader"]["dataset"]["dataset_configs"][data]
    (path,) = dataset["splits"]["train"]["src"]
    with ase.db.connect(path) as rows:
        return [row.toatoms() for row in rows.select()]


def trained(run, data, folder, results):
    folder.mkdir()
    return learning.train(run, data, folder, results, here={})


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "sizes"), [("oxides", (8, 2)), ("Mo", (10, 10))])
def test_splits_share_no_structure_and_are_the_same_at_each_call(name, sizes, data):
    first, again = databases.read(name, data), databases.read(name, data)
    assert tuple(map(len, first)) == sizes
    assert not contents(first[0]) & contents(first[1])
    for one, other in zip(first, again, strict=True):
        assert [atoms.positions.tobytes() for atoms in one] == [atoms.positions.tobytes() for atoms in other]


def test_all_arms_of_a_seed_have_the_same_labels_none_of_them_of_a_test_structure(data, tmp_path, host):
    results = Results(tmp_path / "results.jsonl")
    for number, (arm, seed) in enumerate([("plain", 0), ("DeNS", 0), ("plain", 1)]):
        trained(learning.Run("Mo", "direct", arm, 4, seed), data, tmp_path / str(number), results)
    plain, dens, other = (rows_of(config) for config in host)
    train, _ = databases.read("Mo", data)
    assert len(plain) == 4
    assert contents(plain) == contents(dens) != contents(other)
    assert contents(plain) | contents(other) <= contents(train)
    assert [unit_of(config).get("denoising") for config in host] == [None, learning.BESIDE["DeNS"], None]


# --- tasks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forces", ["direct", "none"])
def test_reference_energies_fit_an_energy_that_is_linear_in_the_elements(forces):
    structures = crystals(8)
    for atoms in structures:
        energy = sum(ENERGIES[number] for number in atoms.numbers)
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=atoms.get_forces())
    energy, *others = learning._tasks(structures, forces)
    (values,) = energy["element_references"]["element_references"]["_args_"]
    expected = np.zeros(100)
    expected[list(ENERGIES)] = list(ENERGIES.values())
    np.testing.assert_allclose(values, expected, atol=1e-9)
    batch = batch_of(structures)
    batch.atomic_numbers_full, batch.batch_full = batch.atomic_numbers, batch.batch
    left = hydra.utils.instantiate(energy["element_references"]).apply_refs(batch, batch.energy.double())
    assert torch.allclose(left, torch.zeros(8, dtype=torch.float64), atol=1e-5), "what the host leaves to be learned"
    components = [atoms.get_forces(apply_constraint=False).ravel() for atoms in structures]
    rmsd = np.sqrt(np.mean(np.concatenate(components) ** 2)) if forces == "direct" else 0
    assert energy["normalizer"]["rmsd"] == pytest.approx(rmsd, abs=1e-9)
    assert [task["normalizer"] for task in others] == [energy["normalizer"]] * (forces == "direct")


# --- arms -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch):
    """The runs that the study's command takes, in order; none of them trains."""
    taken = []

    def noted(run, *_):
        taken.append(run)
        return {"test": {"energy_mae": 0.001}, "seconds": 1.0}

    monkeypatch.setattr(learning, "train", noted)
    return taken


def test_every_arm_is_run_with_both_kinds_of_forces_and_no_run_is_taken_twice(runs, tmp_path):
    words = ["--data", str(tmp_path), "--results", str(tmp_path / "r.jsonl"), "--only", "Mo", "--seeds", "4"]
    learning.main(words)
    assert {(run.forces, run.arm) for run in runs} == {
        (forces, arm) for forces in ("direct", "conservative") for arm in (*learning.BESIDE, *learning.BEFORE)
    }
    assert {(run.data, run.labels, run.seed) for run in runs} == {("Mo", 24, 4)}
    assert len(runs) == 12
    learning.main(words)
    assert len(runs) == 12


def test_oxides_train_energies_alone_and_have_no_arm_of_dens(runs, tmp_path):
    learning.main(["--data", str(tmp_path), "--results", str(tmp_path / "r.jsonl"), "--only", "oxides", "--seeds", "4"])
    assert [run.arm for run in runs] == ["plain", "SCD beside labels", *learning.BEFORE]
    assert {run.forces for run in runs} == {"none"}
    assert {run.size for run in runs} == {learning.SIZES["oxides"]}
    assert list(learning._model(runs[0], supervised=True, start=None)["heads"]) == ["energy"]
    assert [task["name"] for task in learning._tasks(crystals(6), runs[0].forces)] == ["energy"]


# --- pre-training -----------------------------------------------------------------------------------------------------


def test_one_pre_training_serves_direct_and_conservative_forces_and_any_number_of_labels(data, tmp_path, host):
    results = Results(tmp_path / "results.jsonl")
    runs = [("direct", 4), ("conservative", 4), ("direct", 6)]
    for number, (forces, labels) in enumerate(runs):
        run = learning.Run("Mo", forces, "SCD, then plain", labels, 0)
        trained(run, data, tmp_path / str(number), results)
    before, *after = host
    assert unit_of(before)["tasks"] == []
    assert unit_of(before)["denoising"] == {"scd": {"std": 0.04, "judge_condition": False}}
    assert contents(rows_of(before)) == contents(databases.read("Mo", data)[0])
    (start,) = {unit_of(config)["model"]["checkpoint_location"] for config in after}
    assert Path(start).read_text() == "checkpoint 1"
    direct = [unit_of(config)["model"]["overrides"]["backbone"]["direct_forces"] for config in after]
    assert direct == [True, False, True]
    (line,) = results.records()
    assert line["run"]["before"] == learning.BEFORE["SCD, then plain"]


@pytest.mark.parametrize("other", [{"seed": 1}, {"arm": "plain denoising, then plain"}])
def test_another_seed_or_block_has_a_pre_training_of_its_own(other, data, tmp_path, host):
    results = Results(tmp_path / "results.jsonl")
    for number, changes in enumerate([{}, other]):
        how = {"arm": "SCD, then plain", "seed": 0, **changes}
        trained(learning.Run("Mo", "direct", labels=4, **how), data, tmp_path / str(number), results)
    assert [bool(unit_of(config)["tasks"]) for config in host] == [False, True, False, True]
    assert len({unit_of(config)["model"]["checkpoint_location"] for config in host[1::2]}) == 2
    assert len(results.records()) == 2


def test_the_pre_training_is_the_same_whichever_run_comes_to_it_first(tmp_path):
    made = [
        learning._model(learning.Run("Mo", forces, "SCD, then plain", 4, 0), supervised=False, start=None)
        for forces in ("direct", "conservative")
    ]
    assert made[0] == made[1]


def test_a_pre_training_is_claimed_while_it_runs(data, tmp_path, host, monkeypatch):
    results, command, claims = Results(tmp_path / "results.jsonl"), learning.fairchem, []
    run = learning.Run("Mo", "direct", "SCD, then plain", 4, 0)
    settings = {"data": "Mo", "before": learning.BEFORE[run.arm], "seed": 0, "size": learning.asdict(run.size)}

    def watched(arguments, overrides):
        with Results(results.path).claimed(settings) as mine:
            claims.append(mine)
        command(arguments, overrides)

    monkeypatch.setattr(learning, "fairchem", watched)
    trained(run, data, tmp_path / "run", results)
    assert claims == [False, False], "another process neither pre-trains at the same time nor again"
