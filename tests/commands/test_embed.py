"""Embeddings of structures, as arrays, as files and as a map."""

from __future__ import annotations

import copy
import errno
import json
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.db import connect
from fairchem.core.common.registry import registry
from fairchem.core.models.base import HydraModel

from fairchem_scd.commands import pictures as style
from fairchem_scd.commands.embed import embedding_map
from fairchem_scd.commands.embed.embeddings import embed, load_model
from fairchem_scd.commands.embed.table import Embeddings
from fairchem_scd.errors import ConfigError, DataError
from fairchem_scd.fairchem1.data.split import load_split
from fairchem_scd.fairchem1.hydra import DenoisingHydra
from fairchem_scd.fairchem1.legacy import hydra_key
from fairchem_scd.testing import collate, make_trainer, stirred
from tests.support.command_line import fairchem_scd
from tests.support.configs import host_config, pretraining, tiny_config
from tests.support.models import edge_frames_without_chance, fixed_edge_frames, hydra_arguments, plain_and_denoising

NAMES = ["equiformer_v2", "escn"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def checkpoint(name="equiformer_v2", block=None, **backbone):
    """What the host stores of a model, training state aside; plain without a `task.denoising` block."""
    arguments = hydra_arguments(name, **backbone)
    torch.manual_seed(1)
    if block is None:
        model, kind = HydraModel(**copy.deepcopy(arguments)), {"name": "hydra"}
    else:
        model = DenoisingHydra(denoising=block, **copy.deepcopy(arguments))
        kind = {"name": "fairchem_scd.DenoisingHydra", "denoising": block}
    config = {"model": {**kind, **arguments}, "outputs": {"energy": {}}, "loss_functions": [{"energy": {}}]}
    return {"state_dict": model.state_dict(), "config": config}


@pytest.fixture(scope="module")
def files(data, tmp_path_factory):
    """Checkpoints on disk as the host writes them, and the configs of their runs: supervised DeNS, and pre-training."""
    folder = tmp_path_factory.mktemp("runs")
    supervised = tiny_config(data)
    pretrained = tiny_config(data, denoising={"scd": {}})
    pretrained.update(outputs={}, loss_functions=[], evaluation_metrics={})
    pretrained["model"].pop("heads")
    made = {}
    for name, config in (("supervised", supervised), ("pretrained", pretrained)):
        trainer = make_trainer(config, folder, identifier=name)
        with torch.no_grad():
            for value in trainer.ema.shadow_params:
                value += 0.01  # the average is told from the weights
        path = trainer.save(checkpoint_file=f"{name}.pt", training_state=True)
        made[name] = str(path)
    made["config"] = str(folder / "config.yml")
    # As JSON, which is YAML.
    (folder / "config.yml").write_text(json.dumps({"dataset": supervised["dataset"]}))
    return made


def embed_command(*arguments):
    return fairchem_scd("embed", *arguments, code=None)


# --- what the condition is worth --------------------------------------------------------------------------------------


@pytest.mark.parametrize("supervised", [False, True])
def test_the_judge_finds_what_validation_found(supervised, data, files, tmp_path):
    config = tiny_config(data) if supervised else pretraining(data)
    config["task"] = {"denoising": {"scd": {"judge_condition": True, "condition": ["self", "forces"]}}}
    with edge_frames_without_chance():
        trainer = make_trainer(config, tmp_path)
        trainer.ema = None
        stirred(trainer._unwrapped_model)
        metrics = trainer.validate(disable_tqdm=True)
        path = trainer.save(checkpoint_file="checkpoint.pt", training_state=True)
        result = embed_command(path, files["config"], tmp_path / "e.npz", "--judge", "--batch-size", 3)
    assert result.exit_code == 0, result.output
    report = trainer.condition_report
    assert report.sentence(supervised=supervised) in result.output
    assert f"Noise error of {report.structures} structures" in result.output
    judged = json.loads(str(np.load(tmp_path / "e.npz")["about"]))["judged"]
    assert judged.pop("structures") == 4
    for name, value in judged.items():
        assert value == pytest.approx(metrics[name]["metric"], rel=1e-4, abs=1e-6), name
    assert judged["denoising_pos_mae"] != judged["denoising_pos_mae_other"] != judged["denoising_pos_mae_none"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("supervised", [], "makes no condition c: it was not trained with task.denoising.scd"),
        ("pretrained", ["--limit", 1], "no two different structures"),
    ],
)
def test_what_cannot_be_judged_ends_in_one_message_before_anything_is_written(name, options, message, files, tmp_path):
    result = embed_command(files[name], files["config"], tmp_path / "e.npz", "--judge", *options)
    assert result.exit_code == 1
    assert message in result.output
    assert result.output.count("Error: ") == 1
    assert not (tmp_path / "e.npz").exists()


# --- what is embedded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_neighbors", [300, 12])  # the second cuts through equal distances
@pytest.mark.parametrize("name", NAMES)
def test_embeddings_do_not_depend_on_batch_size_or_order(name, max_neighbors, rows):
    source = checkpoint(name, {"scd": {}}, max_neighbors=max_neighbors)
    expected = embed(source, rows, batch_size=8, per_atom=True)
    single = embed(source, rows, batch_size=1, per_atom=True)
    backwards = embed(source, rows[::-1], batch_size=3)
    for array in ("features", "condition"):
        assert np.allclose(getattr(single, array), getattr(expected, array), **CLOSE)
        assert np.allclose(getattr(backwards, array)[::-1], getattr(expected, array), **CLOSE)
    assert np.allclose(single.atom_features, expected.atom_features, **CLOSE)
    assert backwards.sid[::-1].tolist() == expected.sid.tolist() == [int(row.sid) for row in rows]


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_are_invariant_to_rotation_and_translation(name, rows, monkeypatch):
    source = checkpoint(name, {"scd": {}})
    monkeypatch.setattr(registry.get_model_class(f"{name}_backbone"), "_init_edge_rot_mat", fixed_edge_frames)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    turned = copy.deepcopy(rows)
    for row in turned:
        row.pos, row.cell = row.pos @ rotation.T + 0.3, row.cell @ rotation.T
    one, other = embed(source, rows), embed(source, turned)
    different = np.abs(one.features[0] - one.features[1]).max()
    # The hosts' pointwise nonlinearities on a grid are equivariant to so much.
    assert np.abs(one.features - other.features).max() < 0.02 * different
    assert np.abs(one.condition - other.condition).max() < 0.02 * np.abs(one.condition[0] - one.condition[1]).max()


@pytest.mark.parametrize("name", NAMES)
def test_features_are_what_the_plain_heads_read_and_c_is_the_models_own(name, rows):
    plain, model = plain_and_denoising(name, {"scd": {}})
    made = embed(_stored(model, name), rows, batch_size=8, per_atom=True)
    batch = collate(rows)
    read = []
    plain.backbone.register_forward_hook(lambda module, args, out: read.append(out["node_embedding"].embedding[:, 0]))
    torch.manual_seed(0)
    plain.eval()(batch)
    atoms = read[0].detach()
    assert np.allclose(made.atom_features, atoms, **CLOSE)
    parts = atoms.split(batch.natoms.tolist())
    assert np.allclose(made.features, torch.stack([part.mean(dim=0) for part in parts]), **CLOSE)
    summed = embed(_stored(model, name), rows, kind="features", pool="sum")
    assert np.allclose(summed.features, torch.stack([part.sum(dim=0) for part in parts]), **CLOSE)
    assert summed.condition is None
    assert np.allclose(made.condition, model.eval().embed(batch).detach(), **CLOSE)
    assert made.structure.tolist() == batch.batch.tolist()
    assert made.atomic_numbers.tolist() == batch.atomic_numbers.long().tolist()
    assert made.tags.tolist() == batch.tags.long().tolist()
    assert made.features.dtype == made.condition.dtype == made.atom_features.dtype == np.float32


def _stored(model, name):
    block = {"name": "fairchem_scd.DenoisingHydra", "denoising": {"scd": {}}, **hydra_arguments(name)}
    return {"state_dict": model.state_dict(), "config": {"model": block, "outputs": {"energy": {}}}}


@pytest.mark.parametrize("name", NAMES)
def test_plain_and_legacy_checkpoints_have_features_and_no_c(name, rows):
    plain = checkpoint(name)
    made = embed(plain, rows)
    assert made.condition is None
    assert np.allclose(made.features, embed(checkpoint(name, {"scd": {}}), rows).features, **CLOSE)
    with pytest.raises(ConfigError, match=r"no condition c.*scd"):
        embed(plain, rows, kind="condition")
    arguments = hydra_arguments(name)["backbone"]
    arguments.pop("model")
    torch.manual_seed(1)
    legacy = registry.get_model_class(name)(**arguments)
    config = {"model": name, "model_attributes": arguments}  # as before fairchem 1.0
    weights = {f"module.{key}": value for key, value in legacy.state_dict().items()}
    from_old = embed({"state_dict": weights, "config": config}, rows)
    converted = {hydra_key(key): value for key, value in legacy.state_dict().items()}
    hydra = {"state_dict": converted, "config": plain["config"]}
    assert np.allclose(from_old.features, embed(hydra, rows).features, **CLOSE)


def test_the_average_of_the_weights_is_the_default(files, rows):
    both = {kind: embed(files["supervised"], rows, weights=kind) for kind in ("ema", "raw", None)}
    assert np.array_equal(both["ema"].features, both[None].features)
    assert not np.allclose(both["ema"].features, both["raw"].features, rtol=1e-2)
    raw = torch.load(files["supervised"], weights_only=False)
    raw["ema"] = None
    raw["config"]["optim"].pop("ema_decay")
    assert np.array_equal(embed(raw, rows).features, both["raw"].features)
    assert (both[None].about["weights"], both["raw"].about["weights"]) == ("ema", "raw")


def test_a_fine_tuned_checkpoint_is_built_from_the_one_it_started_from(files, rows):
    source = torch.load(files["supervised"], weights_only=False)
    source["config"]["model"]["backbone"] = None
    source["config"]["model"]["finetune_config"] = {"starting_checkpoint": files["pretrained"]}
    assert np.array_equal(embed(source, rows).features, embed(files["supervised"], rows).features)


def test_the_model_of_a_checkpoint_keeps_no_gradients_and_runs_in_eval_mode(rows):
    model = load_model(checkpoint(block={"scd": {}}, alpha_drop=0.5, drop_path_rate=0.5))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    source = checkpoint(block={"scd": {}}, alpha_drop=0.5, drop_path_rate=0.5)
    before = torch.get_rng_state()
    assert np.array_equal(embed(source, rows).features, embed(source, rows).features)
    assert torch.equal(before, torch.get_rng_state()), "the random state is the caller's"


def test_c_of_a_part_is_of_that_part_alone_and_zero_where_there_is_none(rows):
    """Also under a mask token, which stands in the pass that gives the features."""
    block = {"scd": {"embed_tags": [2], "denoise_tags": [0, 1], "null_condition": "mask_token"}}
    source = checkpoint(block=block)
    rows = copy.deepcopy(rows)
    made = embed(source, rows, batch_size=4)
    sizes = np.array([int((row.tags == 2).sum()) for row in rows])
    assert 1 in sizes
    assert 2 in sizes
    assert ((np.abs(made.condition).max(axis=1) > 0) == (sizes > 1)).all()
    for row in rows:
        row.pos = row.pos + 0.1 * (row.tags != 2)[:, None]
    moved = embed(source, rows, batch_size=4)
    assert np.allclose(moved.condition, made.condition, **CLOSE)
    assert not np.allclose(moved.features, made.features, rtol=1e-2)
    model = load_model(source)
    read = []
    model.backbone.register_forward_hook(lambda module, args, out: read.append(model.adapter.scalars(out)))
    torch.manual_seed(0)
    model(collate(rows))
    assert np.allclose(read[0][: len(rows[0].pos)].mean(dim=0).detach(), moved.features[0], **CLOSE)
    for row in rows:
        del row.tags
    with pytest.raises(ConfigError, match="'tags'"):
        embed(source, rows)


# --- the data ---------------------------------------------------------------------------------------------------------


def test_a_split_comes_in_the_datas_order_each_structure_once(data):
    config = tiny_config(data)
    config["dataset"]["train"]["train_split_settings"] = {"sample_n": 5}
    dataset = load_split(config, "val")  # inherits format and key mapping
    assert [int(dataset[i].fid) for i in range(len(dataset))] == [0, 1, 2, 3]
    assert "energy" in dataset[0]
    sampled = [int(row.fid) for row in load_split(config, "train")]
    assert len(set(sampled)) == 5
    assert sampled == sorted(sampled)


def test_structures_without_names_or_labels_are_embedded(tmp_path, rows):
    with connect(tmp_path / "data.db") as db:
        for element in ("Cu", "Ag", "Au"):
            db.write(Atoms(f"{element}2", [[0, 0, 0], [0, 0, 2.5]], cell=[6] * 3, pbc=True))
    train = {"format": "ase_db", "src": str(tmp_path / "data.db"), "a2g_args": {"r_fixed": False}}
    made = embed(checkpoint(), load_split({"dataset": {"train": train}}, "train"), limit=2)
    assert made.sid.tolist() == [0, 1]
    assert made.formula.tolist() == ["Cu2", "Ag2"]
    assert (made.energy, made.adsorbate) == (None, None)
    train["a2g_args"] = {"r_energy": True}
    with pytest.raises(DataError, match=r"structure 0 .*r_energy: false"):
        load_split({"dataset": {"train": train}}, "train")
    nameless = copy.deepcopy(rows[:2])
    for row in nameless:
        del row.sid, row.fid, row.energy, row.fixed
    assert embed(checkpoint(), nameless).sid.tolist() == [0, 1]


@pytest.mark.parametrize("name", NAMES)
def test_structures_without_any_neighbours_are_one_clear_error(name):
    from fairchem.core.preprocessing import AtomsToGraphs

    row = AtomsToGraphs(r_edges=False, r_pbc=True).convert(Atoms("Cu", cell=[20] * 3, pbc=True), sid=7)
    row.natoms = 1
    with pytest.raises(DataError, match="sid/fid 7: no atom has a neighbour"):
        embed(checkpoint(name), [row])


# --- the command ------------------------------------------------------------------------------------------------------


def test_npz_holds_what_the_api_returns(files, tmp_path):
    out = tmp_path / "out.npz"
    result = embed_command(
        files["pretrained"], files["config"], out, "--split", "train", "--per-atom", "--batch-size", "3"
    )
    assert result.exit_code == 0, result.output
    assert "Loading" in result.stderr.splitlines()[0]
    assert "8/8" in result.stderr, "progress"
    expected = embed(
        files["pretrained"], load_split(host_config(files["config"]), "train"), per_atom=True, batch_size=3
    )
    with np.load(out) as held:
        assert set(held) == {*expected.arrays(), "about"}
        assert {"features", "condition", "sid", "fid", "energy", "formula", "adsorbate"} <= set(held)
        for name, array in expected.arrays().items():
            assert np.array_equal(held[name], array), name
        assert files["pretrained"] in str(held["about"])


def test_parquet_holds_the_same(files, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet", exc_type=ImportError)
    for out in ("out.npz", "out.parquet"):
        assert embed_command(files["pretrained"], files["config"], tmp_path / out, "--per-atom").exit_code == 0
    table = pq.read_table(tmp_path / "out.parquet").to_pydict()
    with np.load(tmp_path / "out.npz") as held:
        assert set(table) == set(held) - {"about", "structure"}
        for name in ("sid", "fid", "natoms", "formula", "adsorbate", "energy", "features", "condition"):
            assert np.array_equal(np.array(table[name], dtype=held[name].dtype), held[name]), name
        for name in ("atom_features", "atomic_numbers", "tags"):
            assert [len(own) for own in table[name]] == held["natoms"].tolist()
            assert np.array_equal(np.concatenate(table[name]).astype(held[name].dtype), held[name]), name


def test_a_supervised_checkpoint_has_no_c(files, tmp_path):
    out = tmp_path / "out.npz"
    assert embed_command(files["supervised"], files["config"], out, "--limit", "2", "--cpu").exit_code == 0
    with np.load(out) as held:
        assert "condition" not in held
        assert len(held["features"]) == 2


def _text(path):
    path.write_text("no checkpoint")


def _other_model(path):
    torch.save({"state_dict": {}, "config": {"model": {"name": "hydra", "backbone": {"model": "schnet"}}}}, path)


def _cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _other_weights(path):
    source = torch.load(path, weights_only=False)
    source["config"]["model"]["backbone"]["sphere_channels"] = 16
    source["ema"] = None
    torch.save(source, path)


def _few_elements(path):
    torch.save(checkpoint(max_num_elements=10), path)


def _starting_file_gone(path):
    source = torch.load(path, weights_only=False)
    source["config"]["model"] |= {"backbone": None, "finetune_config": {"starting_checkpoint": "gone.pt"}}
    torch.save(source, path)


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (_text, (), "not a checkpoint, or cut short"),
        (_cut_short, (), "not a checkpoint, or cut short"),
        (lambda path: path.unlink(), (), "checkpoint file not found"),
        (_other_model, (), "schnet"),
        (_other_weights, (), "not those of the model in its config"),
        (_few_elements, (), r"structure sid/fid \d+/\d+: element \d+ \(\w+\).*ends at 9 \(F\); .*other data"),
        (_starting_file_gone, (), "fine-tuned from gone.pt"),
        (None, ("--split", "test"), "dataset.test.src: missing"),
        (None, ("--kind", "condition"), "no condition c"),
        (None, ("--device", "quantum"), "--device quantum"),
        (None, ("--plot", "map.gif"), "map.gif: a picture's name ends in"),
        (None, ("--limit", "2", "--plot", "{folder}/map.png"), "3 structures at least"),
        (None, ("--color", "energy"), "--plot FILE"),
    ],
)
def test_bad_input_is_one_clear_error_and_no_file(spoil, arguments, message, files, tmp_path):
    source = tmp_path / "source.pt"
    shutil.copy(files["supervised"], source)
    if spoil is not None:
        spoil(source)
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    result = embed_command(source, files["config"], tmp_path / "out.npz", *arguments)
    assert result.exit_code in (1, 2), result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors[0]
    assert isinstance(result.exception, SystemExit)
    assert {path.name for path in tmp_path.iterdir()} <= {"source.pt"}


def test_bad_configs_are_one_clear_error(files, tmp_path):
    config = tmp_path / "config.yml"
    for text, message in (
        ("dataset: [", "not a config"),
        ("", "not a config"),
        ("includes: [gone.yml]", "gone.yml"),
        ("model: {}", "no data at all"),
        ("dataset: {val: {src: /nowhere, format: ase_db}}", "/nowhere"),
        ("dataset: {val: {src: /nowhere, format: stone}}", "stone"),
    ):
        config.write_text(text)
        result = embed_command(files["supervised"], config, tmp_path / "out.npz")
        assert (result.exit_code, message in result.stderr) == (1, True), result.stderr
    assert embed_command(files["supervised"], tmp_path / "none.yml", tmp_path / "out.npz").exit_code == 1


def test_a_file_that_exists_is_kept_without_force(files, tmp_path, monkeypatch):
    out, picture = tmp_path / "out.npz", tmp_path / "map.png"
    picture.write_text("mine")
    result = embed_command(files["supervised"], files["config"], out, "--plot", picture)
    assert (result.exit_code, "--force" in result.stderr) == (1, True)
    assert picture.read_text() == "mine"
    out.write_text("mine")
    assert embed_command(files["supervised"], files["config"], out).exit_code == 1
    assert out.read_text() == "mine"

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "write_array", full)
        result = embed_command(files["supervised"], files["config"], out, "--force")
    assert (result.exit_code, "No space left" in result.stderr) == (1, True)
    assert out.read_text() == "mine"
    assert embed_command(files["supervised"], files["config"], out, "--force").exit_code == 0
    assert len(np.load(out)["features"]) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"out.npz", "map.png"}


def test_endings_and_libraries_are_checked_before_anything_is_read(tmp_path, monkeypatch):
    for out, message in (("out.csv", ".npz or .parquet"), ("no/out.npz", "there is no folder")):
        result = embed_command("none.pt", "none.yml", tmp_path / out)
        assert (result.exit_code, message in result.stderr) == (1, True), result.stderr
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    result = embed_command("none.pt", "none.yml", tmp_path / "out.parquet")
    assert "pip install 'fairchem-scd[parquet]'" in result.stderr
    monkeypatch.setitem(sys.modules, "umap", None)
    result = embed_command(
        "none.pt", "none.yml", tmp_path / "out.npz", "--plot", tmp_path / "map.png", "--method", "umap"
    )
    assert "pip install 'fairchem-scd[umap]'" in result.stderr


# --- the map ----------------------------------------------------------------------------------------------------------


def table(count=40, **changes):
    """Made-up embeddings: three axes of variance 9, 4 and 1."""
    draw = np.random.default_rng(0).normal(size=(count, 3))
    axes = np.linalg.svd(draw - draw.mean(axis=0), full_matrices=False)[0]
    features = np.zeros((count, 5), dtype=np.float32)
    features[:, [3, 0, 1]] = axes * [3, 2, 1] + 7
    metals = np.array(["Cu12", "Ag12", "Au8Pd4", "RuO2", "CuO", "NiO2"])[np.arange(count) % 6]
    values = {
        "sid": np.arange(count),
        "natoms": np.full(count, 12) + np.arange(count) % 3,
        "formula": metals,
        "energy": np.random.default_rng(1).uniform(-36, -24, count),
        "features": features,
    }
    return Embeddings(**{**values, **changes})


def test_components_and_their_variance_are_those_of_the_data():
    made = table()
    points, shares = embedding_map.pca(made.features)
    assert shares == pytest.approx([9 / 14, 4 / 14], rel=1e-4)
    assert np.abs(points[:, 0]) == pytest.approx(np.abs(made.features[:, 3] - 7), abs=1e-4)
    assert np.abs(points[:, 1]) == pytest.approx(np.abs(made.features[:, 0] - 7), abs=1e-4)
    same, none = embedding_map.pca(np.ones((4, 1), dtype=np.float32))
    assert (same.shape, none.tolist()) == ((4, 2), [0, 0])


def test_numbers_are_coloured_with_their_unit_and_every_structure_is_drawn():
    made = table()
    figure = embedding_map.draw(made)
    axes, bar = figure.axes
    (drawn,) = axes.collections
    assert axes.get_xlabel() == "PC 1 (64.3% of variance)"
    assert axes.get_ylabel() == "PC 2 (28.6% of variance)"
    assert bar.get_ylabel() == "energy (eV/atom)"
    assert len(drawn.get_offsets()) == len(made)
    assert sorted(drawn.get_array()) == pytest.approx(sorted(made.energy / made.natoms))
    # Each colour is at its own structure's point.
    x = embedding_map.pca(made.features)[0][:, 0]
    at = {round(float(value), 9): float(place[0]) for value, place in zip(drawn.get_array(), drawn.get_offsets())}  # noqa: B905
    for value, place in zip(made.energy / made.natoms, x, strict=True):
        assert at[round(float(value), 9)] == pytest.approx(place)
    figure = embedding_map.draw(made, color="natoms")
    assert figure.axes[1].get_ylabel() == "number of atoms"
    assert all(float(tick).is_integer() for tick in figure.axes[1].get_yticks())


def test_structures_of_unknown_energy_are_drawn_as_such():
    energy = np.where(np.arange(40) < 5, np.nan, 1.0)
    figure = embedding_map.draw(table(energy=energy))
    unknown, known = figure.axes[0].collections
    assert (len(unknown.get_offsets()), len(known.get_offsets())) == (5, 35)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["unknown"]


def test_categories_have_a_colour_and_a_marker_each_and_the_rest_is_other():
    figure = embedding_map.draw(table(), color="composition")
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(names) == ["Ag", "Au$_{2}$Pd", "Cu", "CuO", "NiO$_{2}$", "RuO$_{2}$"]
    drawn = figure.axes[0].collections
    assert sum(len(each.get_offsets()) for each in drawn) == 40
    assert len({tuple(each.get_facecolor()[0]) for each in drawn}) == 6
    assert len({each.get_paths()[0].vertices.tobytes() for each in drawn}) == 6
    # Too many formulas, then too many sets of elements.
    many = np.array([f"Cu{i + 1}{element}" for i, element in enumerate(["O", "S", "N", "P", "F", "Cl", "H", "C"] * 5)])
    figure = embedding_map.draw(table(formula=many), color="composition")
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert figure.legends[0].get_title().get_text() == "elements"
    assert len(names) == 8
    assert names[-1] == "other"
    assert "Cu–O" in names or "Cu–S" in names
    assert sum(len(each.get_offsets()) for each in figure.axes[0].collections) == 40


def test_adsorbates_are_named_and_left_out_of_the_slabs_composition():
    adsorbate = np.array(["CO", "HO", "", "CO"] * 10)
    formula = np.array(["CCu12O", "Cu12HO", "Ag12", "Ag12CO"] * 10)
    made = table(adsorbate=adsorbate, formula=formula)
    names = [text.get_text() for text in embedding_map.draw(made, color="adsorbate").legends[0].get_texts()]
    assert names == ["CO", "OH", "none"]
    legend = embedding_map.draw(made, color="composition").legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["Ag", "Cu"]
    assert legend.get_title().get_text() == "composition\nof slab"


def test_what_cannot_be_drawn_is_a_clear_error():
    for color, message in (("energy", "no energies"), ("adsorbate", "tag 2")):
        with pytest.raises(ConfigError, match=message):
            embedding_map.draw(table(energy=None), color=color)
    with pytest.raises(ConfigError, match="3 structures at least"):
        embedding_map.draw(table(natoms=np.array([1, 2])))


def test_umap_has_axes_without_numbers(monkeypatch):
    class Halves:
        def __init__(self, n_neighbors, random_state, **_):
            assert (n_neighbors, random_state) == (9, 0), "no more neighbours than there are, and a seed"

        def fit_transform(self, features):
            return features[:, :2] / 2

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Halves))
    made = table(10)
    axes = embedding_map.draw(made, method="umap").axes[0]
    assert (axes.get_xlabel(), len(axes.get_xticks())) == ("UMAP 1", 0)
    drawn = np.array(sorted(axes.collections[0].get_offsets().tolist()))
    assert np.allclose(drawn, np.array(sorted((made.features[:, :2] / 2).tolist())))


@pytest.mark.parametrize("ending", style.FORMATS)
def test_a_map_is_written_in_print_size(ending, files, tmp_path):
    picture = tmp_path / f"map{ending}"
    result = embed_command(
        files["supervised"], files["config"], tmp_path / "out.npz", "--plot", picture, "--color", "adsorbate"
    )
    assert result.exit_code == 0, result.output
    assert str(picture) in result.output
    start = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}[ending]
    assert picture.read_bytes().startswith(start)
    with style.printed():
        figure = embedding_map.draw(table())
    assert figure.get_size_inches()[0] == style.SINGLE
    assert all(text.get_fontsize() >= 8 for text in figure.findobj(lambda artist: hasattr(artist, "get_fontsize")))


def test_sweeps_of_the_judge_number_their_rows_whether_a_bar_is_shown_or_not():
    from fairchem_scd.commands.embed.sweeps import judged

    for progress in (False, True):
        seen = []
        judge = SimpleNamespace(
            first="first", second="second", pair=lambda seen=seen: seen.append("pair"), report=lambda: "report"
        )
        found = judged(
            judge,
            lambda: iter([["a", "b"], ["c"]]),
            lambda sweep, rows, first, seen=seen: seen.append((sweep, rows, first)),
            size=3,
            progress=progress,
        )
        assert found == "report"
        assert seen == [
            ("first", ["a", "b"], 0),
            ("first", ["c"], 2),
            "pair",
            ("second", ["a", "b"], 0),
            ("second", ["c"], 2),
        ]
