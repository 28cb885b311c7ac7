"""The studies in benchmarks/: which runs they have, how these are resumed, and their data."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import ase
import numpy as np
import pytest
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.formula import Formula
from fairchem.core.common.utils import setup_imports
from rdkit.Chem import AddHs, MolFromSmiles
from rdkit.Chem.rdMolDescriptors import CalcMolFormula

from benchmarks.evidence import (
    condition,
    databases,
    learning,
    relaxed_molecules,
    structures,
    tables,
)
from benchmarks.evidence.results import Results, key_of
from benchmarks.evidence.trained import Length

setup_imports()


def test_a_run_in_the_file_is_not_claimed_again_whatever_the_order_of_its_keys(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.jsonl")
    with results.claimed({"a": 1, "b": {"c": 2, "d": None}}) as mine:
        assert mine
        results.append({"run": {"a": 1, "b": {"c": 2, "d": None}}})
    with results.claimed({"b": {"d": None, "c": 2}, "a": 1}) as mine:
        assert not mine
    with results.claimed({"a": 1, "b": {"c": 3, "d": None}}) as mine:
        assert mine


def test_a_run_is_claimed_by_one_worker_at_a_time_and_free_after_it(tmp_path: Path) -> None:
    first, second = Results(tmp_path / "r.jsonl"), Results(tmp_path / "r.jsonl")
    with first.claimed({"a": 1}) as one, second.claimed({"a": 1}) as two, second.claimed({"a": 2}) as other:
        assert (one, two, other) == (True, False, True)
    with second.claimed({"a": 1}) as two:
        assert two


def test_a_line_cut_short_counts_as_not_done_and_the_next_is_whole(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.jsonl")
    results.append({"run": {"a": 1}})
    with results.path.open("a") as file:
        file.write('{"run": {"a": 2}, "scor')
    results.append({"run": {"a": 3}})
    assert [r["run"] for r in results.records()] == [{"a": 1}, {"a": 3}]
    assert {"a": 2} not in results
    assert {"a": 3} in results


def test_settings_that_differ_have_other_names() -> None:
    one = {"length": {"steps": 300, "lr": 1e-3}, "labels": None}
    assert key_of(one) == key_of(json.loads(json.dumps(one)))
    assert key_of(one) != key_of({**one, "labels": 12})


def test_options_narrow_a_suite_down() -> None:
    line = ["few", "--data", ".", "--only", "Mo", "--arms", "plain", "SCD, then plain", "--labels", "24", "all"]
    runs = list(learning.chosen(learning._parse([*line, "--seeds", "3"])))
    assert [(r.data, r.labels, r.length.steps, r.arm, r.seed) for r in runs] == [
        ("Mo", labels, steps, arm, 3)
        for labels in (24, None)
        for steps in (300, 1000)
        for arm in ("plain", "SCD, then plain")
    ]
    assert runs[0].pretraining is None
    assert runs[1].pretraining == runs[-1].pretraining
    assert (runs[1].pretraining.form, runs[1].pretraining.std, runs[1].pretraining.seed) == ("embedding", 0.04, 3)


def test_plain_denoising_twice_as_long_passes_as_many_structures_as_scd() -> None:
    runs = {run.arm: asdict(run) for run in learning.SUITES["molecules"].runs([0])}
    assert tables.passed(runs["plain denoising twice as long, then plain"]) == tables.passed(runs["SCD, then plain"])


@pytest.mark.parametrize("name", learning.SUITES)
def test_no_two_runs_of_a_suite_have_one_name(name: str) -> None:
    names = [key_of(asdict(run)) for run in learning.SUITES[name].runs([0, 1])]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", condition.SUITES)
def test_no_two_runs_of_the_condition_have_one_name(name: str) -> None:
    names = [key_of(asdict(run)) for run in condition.suite(name, [0, 1], None, None)]
    assert len(names) == len(set(names))


# --- data ---------------------------------------------------------------------------------------------------------


def test_more_labels_of_a_seed_contain_fewer_and_other_seeds_have_others() -> None:
    splits = structures.Splits(train=[ase.Atoms(f"H{n}") for n in range(1, 41)], held_out=[], test=[])
    few, more, other = splits.labelled(12, 0), splits.labelled(24, 0), splits.labelled(12, 1)
    assert few == more[:12]
    assert len(splits.labelled(None, 0)) == 40
    assert [len(a) for a in few] != [len(a) for a in other]
    with pytest.raises(ValueError, match="41 labels asked for; there are 40"):
        splits.labelled(41, 0)


def test_no_structure_is_in_two_splits() -> None:
    splits = structures.load("two_atoms", None)
    seen = [atoms.positions.tobytes() for part in (splits.train, splits.held_out, splits.test) for atoms in part]
    assert len(seen) == len(set(seen)) == 2400 + 128
    one, again = (structures.CELLS["two_atoms"].make(np.random.default_rng(0)) for _ in range(2))
    assert np.array_equal(one.positions, again.positions)


def test_slabs_have_their_labels_in_a_database(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(structures, "_SLABS", (4, 2))
    test = structures.load.__wrapped__("slabs", None).test
    labels = {"r_energy": True, "r_forces": True}
    rows = structures.KeptAseDB({"src": structures.write(test, tmp_path / "slabs.db"), "a2g_args": labels})
    for i, atoms in enumerate(test):
        atoms.calc = EMT()
        assert rows[i].energy == pytest.approx(atoms.get_potential_energy())
        np.testing.assert_allclose(rows[i].forces, atoms.get_forces(apply_constraint=False), atol=1e-5)
        assert rows[i].fixed.sum() == 4


def test_relaxed_molecules_are_different_at_rest_and_have_their_bonds(tmp_path: Path) -> None:
    # In a process of its own: see tests/docs/test_docs.py.
    command = [sys.executable, "-m", "benchmarks.evidence.relaxed_molecules", str(tmp_path), "--count", "6"]
    subprocess.run(command, check=True, capture_output=True)
    with connect(tmp_path / "relaxed_molecules.db") as database:
        rows = list(database.select())
    assert len({row.smiles for row in rows}) == len(rows) == 6
    for row in rows:
        heavy = MolFromSmiles(row.smiles)
        assert heavy.GetNumAtoms() <= 7
        assert row.count_atoms() == Formula(CalcMolFormula(heavy)).count()
        assert len(relaxed_molecules.bonds(row.toatoms())) == AddHs(heavy).GetNumBonds()
        assert np.linalg.norm(row.forces, axis=1).max() < 0.02
        assert 0 < row.data["gap"] < 20


def test_molecules_stand_in_cells_too_large_to_meet_their_images_and_keep_their_labels(tmp_path: Path) -> None:
    water = ase.Atoms("OHH", [[0, 0, 0], [0, 0.76, 0.59], [0, -0.76, 0.59]])
    water.calc = SinglePointCalculator(water, energy=-1.5, forces=np.eye(3))
    for part in ("train", "test"):
        structures.write([water] * 5, tmp_path / f"molecules_{part}.db")
    splits = structures.load("molecules", tmp_path)
    assert [len(splits.train), len(splits.held_out), len(splits.test)] == [4, 1, 5]
    path = structures.write(splits.test, tmp_path / "written.db")
    for read in databases.read_file(Path(path)):
        assert read.get_potential_energy() == -1.5
        assert np.array_equal(read.get_forces(), np.eye(3))
        assert np.allclose(read.get_all_distances(), water.get_all_distances())
        assert read.pbc.all()
        assert min(read.cell.lengths()) >= 10


@pytest.mark.parametrize(("count", "steps"), [(12, 300), (155, 312)])
def test_a_length_is_in_steps_whatever_the_number_of_structures(count: int, steps: int) -> None:
    block = Length(300, 4, 1e-3).optim(count)
    epoch = -(-count // 4)
    assert block["max_epochs"] * epoch == steps
    assert int(block["scheduler_params"]["warmup_epochs"] * epoch) == 15
