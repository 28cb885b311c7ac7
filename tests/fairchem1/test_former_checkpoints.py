"""Checkpoints that the code of commit a946897 wrote go on as they went on there (tests/data/a946897/make.py).

Numbers were bit-equal on the machine that made the files. Other processors round differently: a tolerance is given.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from click.testing import CliRunner
from fairchem.core.common.relaxation.ase_utils import OCPCalculator

from fairchem_scd.commands import main
from fairchem_scd.commands.embed.embeddings import embed
from fairchem_scd.fairchem1 import checkpoint
from fairchem_scd.testing import make_trainer, slabs

FILES = Path(__file__).parent.parent / "data" / "a946897"
RUNS = ["dens_and_scd", "mask_token", "pretraining"]
SEED, STOPPED, LAST = 7, 4, 8  # as in make.py
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def stored(tmp_path):
    """The path of a run's checkpoint, and the arrays that a946897 made of it."""

    def unpack(name):
        path = tmp_path / f"{name}.pt"
        path.write_bytes(gzip.decompress((FILES / f"{name}.pt.gz").read_bytes()))
        with np.load(FILES / f"{name}.npz") as file:
            return path, dict(file)

    return unpack


def assert_predicts(path, expected):
    """By the host's calculator, which takes the raw weights of a checkpoint with both."""
    with np.load(FILES / "structures.npz") as file:
        structures = [Atoms(file[f"numbers/{i}"], file[f"positions/{i}"], cell=file[f"cell/{i}"]) for i in range(2)]
    for i, atoms in enumerate(structures):
        atoms.pbc = True
        calculator = OCPCalculator(checkpoint_path=str(path), cpu=True)
        torch.manual_seed(3)
        calculator.calculate(atoms, ["energy", "forces"], [])
        assert np.allclose(calculator.results["energy"], expected[f"energy/{i}"], **CLOSE)
        assert np.allclose(calculator.results["forces"], expected[f"forces/{i}"], **CLOSE)


@pytest.mark.parametrize("name", RUNS[:2])
def test_they_predict_the_same_energies_and_forces(name, stored):
    assert_predicts(*stored(name))


def test_their_export_predicts_the_same_energies_and_forces(stored, tmp_path):
    path, expected = stored("dens_and_scd")
    exported = tmp_path / "plain.pt"
    result = CliRunner().invoke(main, ["export", str(path), str(exported), "--weights", "raw"])
    assert result.exit_code == 0, result.output
    assert_predicts(exported, expected)


@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize("name", RUNS)
def test_they_embed_structures_alike(name, weights, stored):
    path, expected = stored(name)
    embeddings = embed(path, slabs(2, seed=3), weights=weights)
    assert np.allclose(embeddings.features, expected[f"features/{weights}"], **CLOSE)
    assert np.allclose(embeddings.condition, expected[f"condition/{weights}"], **CLOSE)


@pytest.mark.parametrize("name", RUNS)
def test_one_that_pooled_by_the_mean_embeds_structures_alike(name, stored, tmp_path, caplog):
    """A setting of that time. Behind the LayerNorm that follows, mean and sum differ by its epsilon alone."""
    path, _ = stored(name)
    source = torch.load(path, weights_only=False)
    for block in (source["config"]["task"]["denoising"], source["config"]["model"]["denoising"]):
        block["scd"] = {**block["scd"], "pool": "mean", "clamp": 1000}
    older = tmp_path / "mean.pt"
    torch.save(source, older)
    rows = slabs(6, seed=3)
    embeddings = embed(older, rows, weights="raw", per_atom=True)
    assert "task.denoising.scd.pool has no effect" in caplog.text
    model = checkpoint.build(source)
    model.load_state_dict(source["state_dict"])
    head = model.denoising["scd"]["condition_head"]
    with torch.no_grad():
        atoms = head.atoms(torch.from_numpy(embeddings.atom_features))
        means = [part.mean(dim=0) for part in atoms.split([len(row.pos) for row in rows])]
        expected = head.structure(torch.stack(means)).numpy()
    assert np.allclose(embeddings.condition, expected, **CLOSE)


@pytest.mark.parametrize("name", RUNS)
def test_their_runs_go_on_to_the_same_weights(name, stored, tmp_path, monkeypatch):
    """Four further steps of every kind: same draws, same noise, same random numbers, optimiser and average kept."""
    path, expected = stored(name)
    monkeypatch.chdir(tmp_path)  # the config names relative paths
    trainer = make_trainer(json.loads((FILES / f"{name}.json").read_text()), tmp_path, seed=SEED)
    start = checkpoint.read(path)
    assert checkpoint.is_of(start, trainer._unwrapped_model)
    trainer.load_checkpoint(str(path))
    assert trainer.step == STOPPED
    torch.manual_seed(11)  # no random state is kept, and none is needed
    trainer.train(disable_eval_tqdm=True)
    assert trainer.step == LAST
    weights = trainer._unwrapped_model.state_dict()
    assert list(weights) == list(start["state_dict"])
    assert_went_the_same_way(start["state_dict"].values(), weights.values(), expected["weights"])
    assert_went_the_same_way(start["ema"]["shadow_params"], trainer.ema.shadow_params, expected["average"])


def assert_went_the_same_way(start, end, expected):
    """Weights differ from those expected by less than a thousandth of the way from start to end."""
    start, end = (torch.cat([v.flatten() for v in values if v.is_floating_point()]) for values in (start, end))
    expected = torch.from_numpy(expected)
    assert (end - expected).norm() < 1e-3 * (expected - start).norm()
