"""`fairchem-scd embed` on fairchem 2.x: what is written is what the model computes, in the data's order."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from fairchem.core.units.mlip_unit.utils import load_inference_model

from fairchem_scd.commands.fairchem2 import checkpoints
from fairchem_scd.commands.fairchem2.embeddings import embed, load_split
from tests.fairchem2.command_line import fairchem_scd
from tests.fairchem2.support import (
    batch_of,
    cluster,
    crystals,
    mixture,
    model_config,
    of_several_data_sets,
    run,
    run_config,
    write,
)

STRUCTURES = crystals(5, seed=50)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of SCD and its config; five structures with names are its validation data."""
    folder = tmp_path_factory.mktemp("embedded")
    write(folder, "train", crystals(6))
    write(folder, "val", STRUCTURES)
    config = run_config(folder, denoising={"scd": {}}, steps=2, ema_decay=0.5)
    finished = run(config, "scd")
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return finished, path


def by_the_host(path, structures, use_ema=True):
    """Mean l = 0 features of structures by the host's own model of an inference checkpoint, each by itself."""
    model, _ = load_inference_model(str(path), use_ema=use_ema)
    model = (model.module if use_ema else model).eval()
    means = []
    for atoms in structures:
        embedding = model.backbone(batch_of([atoms]))["node_embedding"]
        means.append(embedding[:, 0].mean(dim=0).detach().numpy())
    return np.stack(means)


def test_features_are_the_hosts_own_and_in_the_datas_order(trained, tmp_path):
    finished, config = trained
    out = tmp_path / "val.npz"
    result = fairchem_scd("embed", finished.checkpoint(), config, out, "--batch-size", 3)
    stored = np.load(out)
    assert stored["natoms"].tolist() == [len(atoms) for atoms in STRUCTURES]
    assert stored["formula"].tolist() == [atoms.get_chemical_formula() for atoms in STRUCTURES]
    np.testing.assert_allclose(stored["energy"], [a.get_potential_energy() for a in STRUCTURES], rtol=1e-6)
    expected = by_the_host(finished.checkpoint() / "inference_ckpt.pt", STRUCTURES)
    np.testing.assert_allclose(stored["features"], expected, rtol=1e-4, atol=1e-5)
    assert json.loads(str(stored["about"]))["weights"] == "ema"
    assert f"{out}: " in result.output


def test_the_inference_checkpoint_gives_the_same_features_and_no_condition(trained):
    finished, config = trained
    data = load_split(config, "val")
    whole, plain = (embed(finished.checkpoint() / name, data) for name in ("", "inference_ckpt.pt"))
    np.testing.assert_array_equal(whole.features, plain.features)
    assert whole.condition is not None
    assert plain.condition is None


def test_raw_weights_and_their_average_are_told_apart(trained):
    finished, config = trained
    data, path = load_split(config, "val"), finished.checkpoint()
    raw, average = embed(path, data, weights="raw"), embed(path, data, weights="ema")
    expected = by_the_host(path / "inference_ckpt.pt", STRUCTURES, use_ema=False)
    np.testing.assert_allclose(raw.features, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(raw.features - average.features).max() > 1e-3


def test_the_condition_is_that_of_the_pooled_features(trained):
    finished, config = trained
    made = embed(finished.checkpoint(), load_split(config, "val"), kind="both", per_atom=True)
    model = checkpoints.build(checkpoints.read(finished.checkpoint()))
    scalars = torch.as_tensor(made.atom_features)
    index = torch.as_tensor(made.structure)
    expected = model.denoising["scd"].condition.embed(scalars, index, len(made))
    np.testing.assert_allclose(made.condition, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert np.std(made.condition, axis=0).max() > 1e-3


def test_per_atom_features_pool_to_those_of_the_structures(trained):
    finished, config = trained
    data, path = load_split(config, "val"), finished.checkpoint()
    mean, total = (embed(path, data, pool=pool, per_atom=True) for pool in ("mean", "sum"))
    sums = np.zeros_like(total.features)
    np.add.at(sums, total.structure, total.atom_features)
    np.testing.assert_allclose(total.features, sums, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mean.features, sums / mean.natoms[:, None], rtol=1e-5, atol=1e-6)


def test_data_without_labels_and_of_another_kind_is_embedded(trained, tmp_path):
    finished, config = trained
    text = config.read_text().replace("val/val.aselmdb", "molecules/molecules.aselmdb")
    molecules = [cluster(seed) for seed in range(3)]
    for atoms in molecules:
        atoms.calc = None
    write(config.parent, "molecules", molecules)
    (tmp_path / "config.yaml").write_text(text)
    made = embed(finished.checkpoint(), load_split(tmp_path / "config.yaml", "val"))
    assert made.energy is None
    assert made.natoms.tolist() == [len(atoms) for atoms in molecules]
    assert np.isfinite(made.features).all()


def test_a_map_of_some_of_the_training_data_is_drawn(trained, tmp_path):
    finished, config = trained
    out, plot = tmp_path / "train.npz", tmp_path / "train.png"
    fairchem_scd("embed", finished.checkpoint(), config, out, "--split", "train", "--limit", 4, "--plot", plot)
    assert len(np.load(out)["natoms"]) == 4
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("supervised", [False, True])
def test_the_judge_finds_what_the_last_validation_found(supervised, tmp_path):
    write(tmp_path, "train", crystals(6))
    write(tmp_path, "val", STRUCTURES)
    sets = ("first", "second")
    block, how = {"scd": {}}, {"tasks": [], "model": model_config(heads={})}
    if supervised:  # the forces that the noisy pass is told have a name for each data set
        block = {"scd": {"judge_condition": True, "condition": ["self", "forces"]}}
        how = dict(zip(("model", "tasks"), mixture(sets, direct=True), strict=True))
    config = run_config(tmp_path, denoising=block, steps=3, ema_decay=0.5, **how)
    if supervised:
        for name, structures in zip(sets, (STRUCTURES, crystals(2, seed=90)), strict=True):
            write(tmp_path / name, "train", crystals(6))
            write(tmp_path / name, "val", structures)
        config = of_several_data_sets(config, tmp_path, sets)
    finished = run(config, "judged")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "val.npz"
    result = fairchem_scd("embed", finished.checkpoint(), tmp_path / "config.yaml", out, "--judge", "--batch-size", 3)
    report = finished.unit.condition_report
    assert report.structures == (7 if supervised else 5)
    assert report.sentence(supervised=supervised) in result.output
    assert f"Noise error of {report.structures} structures" in result.output
    found = json.loads(str(np.load(out)["about"]))["judged"]
    assert found.pop("structures") == report.structures
    assert found == pytest.approx(report.metrics(), rel=1e-4, abs=1e-6)
    assert found["denoising_pos_mae"] != found["denoising_pos_mae_other"]


def test_what_cannot_be_judged_ends_in_one_message_before_anything_is_written(trained, tmp_path):
    finished, config = trained
    folder, out = finished.checkpoint(), tmp_path / "out.npz"
    for path, words, message in (
        (folder / "inference_ckpt.pt", (), "name the folder that the inference checkpoint lies in"),
        (folder, ("--limit", 1), "no two different structures"),
    ):
        result = fairchem_scd("embed", path, config, out, "--judge", *words, code=1)
        assert message in result.output
        assert result.output.count("Error: ") == 1
        assert not out.exists()


def test_what_cannot_be_embedded_is_said_in_one_line(trained, tmp_path):
    finished, config = trained
    folder, out = finished.checkpoint(), tmp_path / "out.npz"

    def error(*words):
        result = fairchem_scd("embed", *words, code=1)
        assert result.output.count("Error: ") == 1
        return result.output

    assert "name the folder that the file lies in" in error(
        folder / "inference_ckpt.pt", config, out, "--kind", "condition"
    )
    assert "such as runs/NAME/checkpoints/final" in error(finished.folder, config, out)
    assert "a config of fairchem 2.x has train and val" in error(folder, config, out, "--split", "test")
    assert "No such file" in error(tmp_path / "none.pt", config, out)
    torch.save({"state_dict": {}, "config": {}}, tmp_path / "one.pt")
    assert "is for fairchem-core 1.x" in error(tmp_path / "one.pt", config, out)
    (tmp_path / "text.pt").write_text("text")
    assert "not a checkpoint of fairchem 2.x" in error(tmp_path / "text.pt", config, out)
    gone = tmp_path / "gone.yaml"
    gone.write_text(config.read_text().replace("val.aselmdb", "gone.aselmdb"))
    assert "runner.eval_dataloader.dataset: cannot be opened" in error(folder, gone, out)
    plain = shutil.copytree(folder, tmp_path / "plain")
    resume = plain / "resume.yaml"
    resume.write_text(resume.read_text().replace("scd: {}", "dens: {}"))
    assert "weights are not those of its config" in error(plain, config, out)
    assert not out.exists()
