"""`fairchem-scd import`: DeNS checkpoints of other codes predict, and denoise, what they did."""

from __future__ import annotations

import copy
import errno
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from e3nn import o3
from fairchem.core.common.registry import registry
from fairchem.core.common.relaxation.ase_utils import OCPCalculator
from fairchem.core.models.base import HydraModel
from fairchem.core.modules.exponential_moving_average import ExponentialMovingAverage

from fairchem_scd import ConfigError
from fairchem_scd.denoising.plan import NOISE
from fairchem_scd.fairchem1.checkpoint import export, from_dens, is_of, read, to_plain
from fairchem_scd.fairchem1.data.emt_slabs import emt_slabs
from fairchem_scd.testing import collate, make_trainer, plan_of, run
from tests.support.command_line import fairchem_scd
from tests.support.configs import tiny_config
from tests.support.models import BACKBONES, ESEN, hydra_arguments

DATA = Path(__file__).parents[1] / "data"
SCHEDULE = {"num_steps": 5, "std_low": 0.05, "std_high": 0.3}
ESEN_KINDS = {
    "esen": {"energy": {"module": "esen_mlp_energy_head"}, "forces": {"module": "esen_linear_force_head_dens"}},
    "esen conservative": {"both": {"module": "esen_mlp_efs_head_dens"}},
}
HOST = ("equiformer_v2", "equiformer_v2 sigma", "equiformer_v2 stress", *ESEN_KINDS)
AUTHORS = ("equiformer_v2", "escn")


# --- checkpoints of fairchem's own DeNS classes, written by its own trainers ------------------------------------------


def optim(sigma=False):
    noise = {"fixed_noise_std": False, **SCHEDULE} if sigma else {"fixed_noise_std": True, "std": 0.15}
    return {
        "use_denoising_pos": True,
        "denoising_pos_params": {"prob": 0.25, "corrupt_ratio": 0.4, **noise},
        "denoising_pos_coefficient": 15,
    }


def dens_config(data, kind):
    config = tiny_config(data, optim=optim(sigma=kind == "equiformer_v2 sigma"), task={})
    config["task"] = {}
    if kind.startswith("esen"):
        config["trainer"] = "mlip_dens_trainer"
        backbone = {**ESEN, "model": "esen_backbone_dens", "direct_forces": kind == "esen"}
        heads = ESEN_KINDS[kind]
    else:
        config["trainer"] = "equiformerv2_dens"
        backbone = {**BACKBONES["equiformer_v2"], "model": "equiformer_v2_dens_backbone"}
        # Of the lowest degree that has forces: most of the time goes into building grids.
        backbone.update(lmax_list=[1], mmax_list=[1], use_noise_schedule_sigma_encoding=kind == "equiformer_v2 sigma")
        heads = {
            "energy": {"module": "eqV2_DeNS_scalar_head"},
            "forces": {"module": "eqV2_DeNS_vector_head", "output_name": "forces"},
        }
    if kind == "equiformer_v2 stress":
        heads["stress"] = {"module": "dens_rank2_symmetric_head", "output_name": "stress", "use_denoising": False}
    model = {"backbone": backbone, "heads": copy.deepcopy(heads), "pass_through_head_outputs": True}
    config["model"] = {"name": "hydra", "otf_graph": True, **model}
    return config


@pytest.fixture(scope="module")
def host(data, tmp_path_factory):
    """The model of a run of fairchem's own DeNS, and the file that its trainer saved; each made once."""
    made = {}

    def get(kind):
        if kind not in made:
            trainer = make_trainer(dens_config(data, kind), tmp_path_factory.mktemp("host"))
            trainer.best_val_metric = 1e9
            torch.manual_seed(1)
            with torch.no_grad():  # as after training: no bias is zero, and the average differs from the weights
                for p, average in zip(trainable(trainer.model), trainer.ema.shadow_params, strict=True):
                    p.add_(0.2 * torch.randn_like(p))
                    average.copy_(p + 0.1 * torch.randn_like(p))
            made[kind] = trainer.model, trainer.save()
        return made[kind][0], Path(made[kind][1])

    return get


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


# --- checkpoints of the authors, by the manifests of their keys -------------------------------------------------------


def manifest(name):
    return json.loads((DATA / f"dens_authors_{name}.json").read_text())


def legacy_heads(name, attributes):
    """The host's model without DeNS, of the authors' arguments."""
    added = ("use_tp_reparam", "use_force_encoding", "use_noise_schedule_sigma_encoding", "use_denoising_energy")
    return registry.get_model_class(name)(**{k: v for k, v in attributes.items() if k not in added})


def authors(name, **attributes):
    """A checkpoint as theirs: all keys of the manifest and no others, random weights, another average of them."""
    known = manifest(name)
    config = copy.deepcopy(known["config"])
    config["model_attributes"].update(attributes)
    state = legacy_heads(name, config["model_attributes"]).state_dict()
    for key in [key for key in state if key.startswith("force_block.")]:
        state[key.replace("force_block", "denoising_pos_block")] = state[key]
    degrees = torch.tensor([0, 1, 1, 1, 2, 2, 2, 2, 2])
    tables = {key: state.get(key, degrees) for key in known["tables"]}
    assert {key: list(value.shape) for key, value in tables.items()} == known["tables"]
    shapes = dict(known["weights"])
    for option, keys in known["weights_with_option"].items():
        shapes.update(keys if attributes.get(option) else {})
    generator = torch.Generator().manual_seed(3)
    weights = {key: 0.3 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    trained = [key for key in weights if key != "energy_lin_ref"]
    average = [weights[key] + 0.1 * torch.randn(weights[key].shape, generator=generator) for key in trained]
    return {
        "epoch": 1.5,
        "step": 600,
        "state_dict": {f"module.{key}": value for key, value in {**weights, **tables}.items()},
        "optimizer": {"state": {}, "param_groups": []},
        "scheduler": None,
        "normalizers": {
            "energy": {"mean": torch.tensor(-0.75), "std": torch.tensor(2.9)},
            "forces": {"mean": torch.tensor(0.0), "std": torch.tensor(2.9)},
            "denoising_pos_target": {"mean": torch.tensor(0.0), "std": torch.tensor(0.15)},
        },
        "config": config,
        "val_metrics": None,
        "ema": {"decay": 0.999, "num_updates": None, "shadow_params": average, "collected_params": []},
        "amp": {"scale": 1.0},
        "best_val_metric": 0.1,
        "primary_metric": "forces_mae",
    }


def raw(checkpoint):
    return {key.removeprefix("module."): value for key, value in checkpoint["state_dict"].items()}


def averaged(checkpoint):
    """Their weights with their average in place of those that train, in the order of their modules."""
    weights = raw(checkpoint)
    trained = [key for key in weights if key in manifest_weights(checkpoint) and key != "energy_lin_ref"]
    return {**weights, **dict(zip(trained, checkpoint["ema"]["shadow_params"], strict=True))}


def manifest_weights(checkpoint):
    known = manifest(checkpoint["config"]["model"].removesuffix("_dens"))
    return {*known["weights"], *(key for keys in known["weights_with_option"].values() for key in keys)}


def folded(weights):
    """Their weights for a model without encodings: both biases stand in every pass."""
    weights = dict(weights)
    bias = weights["force_embedding.bias"] + weights.get("noise_schedule_sigma_embedding.bias", 0)
    weights["sphere_embedding.weight"] = weights["sphere_embedding.weight"] + bias
    return weights


def plain_model(name, checkpoint, weights):
    """The host's legacy model with the weights that theirs shares with it."""
    model = legacy_heads(name, checkpoint["config"]["model_attributes"])
    model.load_state_dict({key: weights[key] for key in model.state_dict()})
    return model.eval()


# --- what is imported -------------------------------------------------------------------------------------------------


def built(imported, weights="raw"):
    """The model of an imported checkpoint, with its weights or with their average."""
    block = copy.deepcopy(imported["config"]["model"])
    model = registry.get_model_class(block.pop("name"))(**block)
    model.load_state_dict(imported["state_dict"])
    if weights == "ema":
        ema = ExponentialMovingAverage(model.parameters(), 0.5)
        ema.load_state_dict(imported["ema"])
        assert [p.shape for p in trainable(model)] == [p.shape for p in ema.shadow_params]
        ema.copy_to()
    return model.eval()


def assert_same(out, expected, tolerance=1e-6):
    assert set(out) == set(expected)
    for key, value in expected.items():
        assert (out[key].view_as(value) - value).abs().max() <= tolerance * value.abs().max(), key


@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("kind", HOST)
def test_an_imported_host_checkpoint_predicts_what_the_hosts_dens_model_does(kind, plain, weights, host, rows):
    model, path = host(kind)
    theirs, checkpoint = copy.deepcopy(model).eval(), read(path)
    if weights == "ema":
        for p, average in zip(trainable(theirs), checkpoint["ema"]["shadow_params"], strict=True):
            p.data.copy_(average)
    imported = from_dens(checkpoint, plain=plain)
    ours = built(imported, weights)
    assert (type(ours) is HydraModel) == plain
    batch = collate(rows[:3])
    expected = run(theirs, batch)
    assert_same(run(ours, batch), expected)
    bias = [p for name, p in theirs.named_parameters() if name.endswith("embedding.bias")]
    assert len(bias) == (2 if "sigma" in kind else 1)
    for p in bias:
        p.data.zero_()
    without = run(theirs, batch)
    assert (without["energy"] - expected["energy"]).abs().max() > 1e-3, "the bias does nothing: nothing was tested"


@pytest.mark.parametrize("kind", ["equiformer_v2", "equiformer_v2 sigma", *ESEN_KINDS])
@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_an_imported_host_checkpoint_denoises_as_the_hosts_dens_model_does(kind, weights, host, rows):
    model, path = host(kind)
    theirs, checkpoint = copy.deepcopy(model).eval(), read(path)
    if weights == "ema":
        for p, average in zip(trainable(theirs), checkpoint["ema"]["shadow_params"], strict=True):
            p.data.copy_(average)
    imported = from_dens(checkpoint)
    ours, batch = built(imported, weights), collate(rows[:3])
    plan, conditioned = corrupted(batch, imported)
    expected = run(theirs, conditioned)
    if kind == "esen conservative":  # whose energy and forces the host multiplies by zero here
        out = run(ours, batch, plan)
        assert_same(
            {"noise": out[NOISE][conditioned.noise_mask]}, {"noise": expected["forces"][conditioned.noise_mask]}, 1e-5
        )
        assert out["forces"].any()
    else:
        hybrid(ours, batch, plan, expected)


def corrupted(batch, imported):
    """A denoising pass under the imported settings, and the same as the host's DeNS models want it on the batch."""
    block = {"dens": {**imported["config"]["task"]["denoising"]["dens"], "prob": 1.0}}
    plan, corruption = plan_of(batch, block, step=1)
    assert corruption.mask.any()
    assert not corruption.mask.all()
    conditioned = copy.deepcopy(batch)
    conditioned.pos = batch.pos + corruption.noise
    conditioned.denoising_pos_forward, conditioned.noise_mask = True, corruption.mask
    conditioned.sigmas = plan.passes[0].encoding[2][:, None]
    return plan, conditioned


def hybrid(model, batch, plan, expected):
    """Noise on the corrupted atoms and forces on the others, against what their one output holds."""
    out = run(model, batch, plan)
    mask = plan.passes[0].encoding[1][:, None]
    out["forces"] = torch.where(mask, out.pop(NOISE), out["forces"])
    assert_same(out, expected, tolerance=1e-5)


@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("equiformer_v2", {}),
        ("equiformer_v2", {"use_noise_schedule_sigma_encoding": True, "load_energy_lin_ref": True}),
        ("escn", {}),
    ],
)
def test_an_authors_checkpoint_predicts_what_the_hosts_legacy_model_does(name, options, weights, rows):
    checkpoint = authors(name, **options)
    if options:
        checkpoint["config"]["optim"].update(optim(sigma=True))
    legacy = plain_model(name, checkpoint, folded(raw(checkpoint) if weights == "raw" else averaged(checkpoint)))
    batch = collate(rows[:3])
    expected = run(legacy, batch)
    for plain in (False, True):
        assert_same(run(built(from_dens(checkpoint, plain=plain), weights), batch), expected)


@pytest.mark.parametrize("sigma", [False, True])
def test_an_authors_equiformer_denoises_as_the_hosts_dens_model_of_the_same_weights(sigma, rows):
    checkpoint = authors("equiformer_v2", use_noise_schedule_sigma_encoding=sigma)
    checkpoint["config"]["optim"].update(optim(sigma))
    attributes = {**checkpoint["config"]["model_attributes"], "model": "equiformer_v2_dens_backbone"}
    attributes.pop("use_tp_reparam")
    arguments = hydra_arguments("equiformer_v2")
    arguments["backbone"] = attributes
    arguments["heads"] = {
        "energy": {"module": "eqV2_DeNS_scalar_head"},
        "forces": {"module": "eqV2_DeNS_vector_head"},
    }
    blocks = {
        "energy_block": "output_heads.energy.scalar_block",
        "force_block": "output_heads.forces.vector_block",
        "denoising_pos_block": "output_heads.forces.denoising_pos_block",
    }
    state = {}
    for key, value in raw(checkpoint).items():
        block, _, rest = key.partition(".")
        state[f"{blocks[block]}.{rest}" if block in blocks else f"backbone.{key}"] = value
    theirs = HydraModel(**arguments)
    theirs.load_state_dict(state)
    imported, batch = from_dens(checkpoint), collate(rows[:3])
    plan, conditioned = corrupted(batch, imported)
    hybrid(built(imported), batch, plan, run(theirs.eval(), conditioned))


def test_an_authors_escn_denoises_by_their_formula(rows):
    """Y(F/|F|)·|F|/√3 through one weight a degree and the bias, added to the node embedding; another force block."""
    checkpoint = authors("escn")
    weights = raw(checkpoint)
    imported, batch = from_dens(checkpoint), collate(rows[:3])
    plan, conditioned = corrupted(batch, imported)
    harmonics = o3.spherical_harmonics([0, 1, 2], batch.forces, normalize=True, normalization="component")
    harmonics = harmonics * conditioned.noise_mask[:, None] * batch.forces.norm(dim=1, keepdim=True) / math.sqrt(3)
    per_degree = [weights["force_embedding.weight"][l, :, 0] for l in (0, 1, 1, 1, 2, 2, 2, 2, 2)]
    encoding = torch.einsum("nm,mc->nmc", harmonics, torch.stack(per_degree))
    encoding[:, 0] += weights["force_embedding.bias"]

    def add(module, args):
        x = args[0].clone()
        x.embedding = x.embedding + encoding
        return (x, *args[1:])

    heads = {key: key.replace("force_block", "denoising_pos_block") for key in weights}
    forces = plain_model("escn", checkpoint, weights)
    noise = plain_model("escn", checkpoint, {key: weights.get(heads[key], weights[key]) for key in weights})
    outs = []
    for model in (forces, noise):
        model.layer_blocks[0].register_forward_pre_hook(add)
        outs.append(run(model, conditioned))
    expected = torch.where(conditioned.noise_mask[:, None], outs[1]["forces"], outs[0]["forces"])
    hybrid(built(imported), batch, plan, {"energy": outs[0]["energy"], "forces": expected})


@pytest.mark.parametrize("name", AUTHORS)
def test_every_weight_of_the_authors_lands_in_its_place(name):
    checkpoint = authors(name)
    theirs, state = raw(checkpoint), from_dens(checkpoint)["state_dict"]
    left = dict(state)
    bias = theirs.pop("force_embedding.bias")
    theirs["sphere_embedding.weight"] = theirs["sphere_embedding.weight"] + bias
    theirs["force_embedding.weight"] = theirs["force_embedding.weight"][:, :, 0]
    theirs.pop("force_embedding.expand_index")
    places = {
        "energy_block": "output_heads.energy.energy_block",
        "force_block": "output_heads.forces.force_block",
        "denoising_pos_block": "denoising.dens.noise_head.force_block",
        "force_embedding": "denoising.dens.encoding.force",
    }
    for key, value in theirs.items():
        block, _, rest = key.partition(".")
        place = f"{places[block]}.{rest}" if block in places else f"backbone.{key}"
        assert torch.equal(left.pop(place.replace("force.weight", "force_weight")), value), key
    assert not left
    assert not any(key.startswith("denoising.") for key in from_dens(checkpoint, plain=True)["state_dict"])


def test_the_config_is_in_the_hosts_words_and_keeps_the_dens_settings():
    checkpoint = authors("equiformer_v2", use_denoising_energy=False)
    config = from_dens(checkpoint)["config"]
    assert config["task"]["denoising"] == config["model"]["denoising"] == {
        "dens": {
            "prob": 0.25,
            "std": 0.15,
            "corrupt_ratio": 0.4,
            "coefficient": 15,
            "force_encoding": True,
            "sigma_encoding": False,
            "train_outputs": [],
        }
    }  # fmt: skip
    assert config["model"]["name"] == "fairchem_scd.DenoisingHydra"
    assert "model_attributes" not in config
    theirs = checkpoint["config"]
    assert config["loss_functions"] == theirs["loss_fns"]
    assert config["evaluation_metrics"] == theirs["eval_metrics"]
    plain = from_dens(checkpoint, plain=True)["config"]
    assert "denoising" not in {**plain["task"], **plain["model"]}
    assert plain["model"]["name"] == "hydra"
    for optimiser in (config["optim"], plain["optim"]):
        assert {k: v for k, v in theirs["optim"].items() if "denoising" not in k} == optimiser


def test_an_ablation_without_force_encoding_keeps_its_bias_and_no_encoding(rows):
    checkpoint = authors("equiformer_v2", use_force_encoding=False)
    imported = from_dens(checkpoint)
    assert not any(".encoding." in key for key in imported["state_dict"])
    batch = collate(rows[:2])
    expected = run(plain_model("equiformer_v2", checkpoint, folded(raw(checkpoint))), batch)
    assert_same(run(built(imported), batch), expected)


@pytest.mark.parametrize("kind", ["host", "authors"])
def test_import_then_export_is_import_plain(kind, host):
    checkpoint = read(host("equiformer_v2 sigma")[1]) if kind == "host" else authors("escn")
    imported, plain = from_dens(checkpoint), from_dens(checkpoint, plain=True)
    kept = to_plain(imported)
    assert kept["config"] == plain["config"]
    assert_equal(kept["state_dict"], plain["state_dict"])
    assert all(map(torch.equal, kept["ema"]["shadow_params"], plain["ema"]["shadow_params"]))
    assert_equal(export(imported, weights="raw")["state_dict"], plain["state_dict"])
    assert_equal(export(imported)["state_dict"], built(plain, "ema").state_dict())


def assert_equal(state, expected):
    assert list(state) == list(expected)
    assert all(map(torch.equal, state.values(), expected.values()))


def test_the_checkpoint_given_is_left_as_it_was():
    checkpoint = authors("equiformer_v2")
    before = copy.deepcopy(checkpoint)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    from_dens(checkpoint)
    assert torch.equal(torch.rand(1), expected)
    assert checkpoint["config"] == before["config"]
    assert all(torch.equal(value, before["state_dict"][key]) for key, value in checkpoint["state_dict"].items())


# --- what can be done with it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True], ids=["denoising", "plain"])
@pytest.mark.parametrize("references", [False, True])
def test_the_hosts_calculator_takes_it(references, plain, rows, tmp_path):
    """With the authors' per-element references, which their model added to its energy, as the host's own."""
    options = {"load_energy_lin_ref": True, "use_energy_lin_ref": True} if references else {}
    checkpoint = authors("equiformer_v2", **options)
    torch.save(checkpoint, tmp_path / "theirs.pt")
    out = fairchem_scd("import", tmp_path / "theirs.pt", tmp_path / "ours.pt", *(["--plain"] if plain else [])).output
    assert f"OCPCalculator(checkpoint_path='{tmp_path / 'ours.pt'}')" in out
    assert ("fairchem's own hydra" in out) == plain
    legacy = plain_model("equiformer_v2", checkpoint, folded(raw(checkpoint)))
    expected = run(legacy, collate(rows[:1]))
    calculator = OCPCalculator(checkpoint_path=str(tmp_path / "ours.pt"), cpu=True)
    atoms, _, _ = next(iter(emt_slabs(8, 0, 6)))
    torch.manual_seed(7)
    calculator.calculate(atoms, ["energy", "forces"], [])
    assert calculator.results["energy"] == pytest.approx(float(expected["energy"]) * 2.9 - 0.75, rel=1e-5)
    forces = torch.tensor(calculator.results["forces"])
    assert (forces - expected["forces"] * 2.9).abs().max() <= 1e-5 * expected["forces"].abs().max() * 2.9
    if references:
        without = plain_model("equiformer_v2", authors("equiformer_v2"), folded(raw(checkpoint)))
        assert abs(float(run(without, collate(rows[:1]))["energy"] - expected["energy"])) > 0.1


@pytest.mark.parametrize("plain", [False, True], ids=["denoising", "plain"])
def test_training_goes_on_from_it(plain, host, data, tmp_path):
    _, path = host("equiformer_v2")
    fairchem_scd("import", path, tmp_path / "imported.pt", *(["--plain"] if plain else []))
    imported = read(tmp_path / "imported.pt")
    config = tiny_config(data, denoising=imported["config"]["task"].get("denoising", {}))
    config["model"] = {k: v for k, v in imported["config"]["model"].items() if k != "denoising"}
    if plain:
        config["trainer"], config["task"] = "equiformerv2_forces", {}
    trainer = make_trainer(config, tmp_path)
    if not plain:
        assert is_of(imported, trainer._unwrapped_model)
    trainer.load_checkpoint(str(tmp_path / "imported.pt"))
    assert (trainer.step, trainer.epoch) == (0, 0)
    assert not trainer.optimizer.state
    assert_equal(trainer._unwrapped_model.state_dict(), imported["state_dict"])
    assert all(map(torch.equal, trainer.ema.shadow_params, imported["ema"]["shadow_params"]))
    trainer.train(disable_eval_tqdm=True)
    assert trainer.step == 2
    assert 0 < trainer.best_val_metric < 1e9


@pytest.mark.parametrize("plain", [False, True], ids=["denoising", "plain"])
def test_fine_tuning_starts_from_it(plain, host, tmp_path):
    torch.save(imported := from_dens(read(host("equiformer_v2")[1]), plain=plain), tmp_path / "imported.pt")
    heads = {"forces": {"module": "equiformerV2_vector_head"}}
    start = {"starting_checkpoint": str(tmp_path / "imported.pt")}
    state = HydraModel(finetune_config=start, heads=heads).state_dict()
    kept = [key for key in state if key.startswith("backbone.")]
    assert all(torch.equal(state[key], imported["state_dict"][key]) for key in kept)


def test_best_checkpoints_have_no_average_and_get_none():
    checkpoint = {key: value for key, value in authors("escn").items() if key != "ema"}
    assert "ema" not in from_dens(checkpoint)
    assert from_dens({**checkpoint, "ema": None})["ema"] is None


def test_an_average_that_does_not_fit_is_left_out_with_a_warning(caplog):
    checkpoint = authors("escn")
    checkpoint["ema"]["shadow_params"].pop()
    with caplog.at_level(logging.WARNING):
        assert from_dens(checkpoint)["ema"] is None
    assert "moving average does not fit its weights" in caplog.text


def test_normalisers_keep_their_numbers_and_lose_that_of_the_noise():
    checkpoint = authors("escn")
    numbers = checkpoint["normalizers"]
    checkpoint["normalizers"] = {"target": numbers["energy"], "grad_target": numbers["forces"]}
    for theirs in (checkpoint, authors("escn")):
        imported = from_dens(theirs)
        assert imported["normalizers"] == {"energy": numbers["energy"], "forces": numbers["forces"]}


# --- bad input --------------------------------------------------------------------------------------------------------


def spoilt(name="equiformer_v2", *, drop=(), add=None, **attributes):
    checkpoint = authors(name)
    checkpoint["config"]["model_attributes"].update(attributes)
    state = checkpoint["state_dict"]
    for key in drop:
        del state[f"module.{key}"]
    state.update({f"module.{key}": value for key, value in (add or {}).items()})
    return checkpoint


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: spoilt(sphere_channels=12), r"not those of the model in its config: .*of another shape"),
        (
            lambda: spoilt(num_layers=2),
            r"not those of the model in its config: \d+ missing, such as backbone\.blocks\.1",
        ),
        (lambda: spoilt(drop=["force_embedding.bias"]), r"1 missing, such as denoising\.dens\.encoding\.force_bias"),
        (lambda: spoilt(drop=["denoising_pos_block.alpha_dot"]), r"1 missing, such as denoising\.dens\.noise_head\."),
        (
            lambda: spoilt(add={"charge.weight": torch.ones(3)}),
            r"1 not in that model, such as backbone\.charge\.weight",
        ),
        (lambda: spoilt(use_tp_reparam=True), r"model\.use_tp_reparam: .* does not have this option; set it to False"),
        (lambda: spoilt(size=3), r"the model in the checkpoint's config cannot be built here \(.*size"),
        (lambda: spoilt("escn", lmax_list=[2, 1], mmax_list=[1, 1]), r"of another shape"),
        (lambda: spoilt(drop=["force_embedding.weight"]), r"of no DeNS model .*'equiformer_v2_dens'.*--checkpoint"),
        (lambda: from_dens(authors("escn")), r"this package's own already"),
        (lambda: {**authors("escn"), "config": {"optim": {}}}, r"config names no model"),
        (lambda: {**authors("escn"), "config": {"model": {"name": "escn_dens"}}}, r"in no form that fairchem knows"),
    ],
)
def test_one_clear_error_for_a_checkpoint_of_another_model(make, said, tmp_path):
    torch.save(make(), tmp_path / "theirs.pt")
    with pytest.raises(ConfigError, match=said):
        from_dens(read(tmp_path / "theirs.pt"))
    output = fairchem_scd("import", tmp_path / "theirs.pt", tmp_path / "ours.pt", code=1).output
    assert len(output.strip().splitlines()) == 2, output  # what it reads, and the error
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.pt"]


def test_two_noise_heads_are_refused(host):
    checkpoint = read(host("equiformer_v2")[1])
    heads = {k: v for k, v in checkpoint["state_dict"].items() if ".denoising_pos_block." in k}
    second = {key.replace("heads.forces", "heads.magmoms"): value for key, value in heads.items()}
    with pytest.raises(ConfigError, match=r"two noise heads .*output_heads\.magmoms.* is of the second"):
        from_dens({**checkpoint, "state_dict": {**checkpoint["state_dict"], **second}})


def test_bad_files_end_in_one_error_and_leave_nothing(tmp_path, monkeypatch):
    (whole := tmp_path / "whole").mkdir()
    torch.save(authors("escn"), tmp_path / "theirs.pt")
    content = (tmp_path / "theirs.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    for source, said in (
        ("cut.pt", "not a checkpoint, or cut short"),
        ("text.pt", "not a checkpoint"),
        ("missing.pt", "checkpoint file not found"),
    ):
        assert said in fairchem_scd("import", tmp_path / source, whole / "ours.pt", code=1).output
    assert (
        "there is no folder" in fairchem_scd("import", tmp_path / "theirs.pt", whole / "no" / "ours.pt", code=1).output
    )
    assert not list(whole.iterdir())

    def full_disk(content, path):
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    (whole / "ours.pt").write_text("precious")
    assert "--force" in fairchem_scd("import", tmp_path / "theirs.pt", whole / "ours.pt", code=1).output
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full_disk)
        output = fairchem_scd("import", tmp_path / "theirs.pt", whole / "ours.pt", "--force", code=1).output
    assert "No space left on device" in output
    assert [path.read_text() for path in whole.iterdir()] == ["precious"]
    fairchem_scd("import", tmp_path / "theirs.pt", whole / "ours.pt", "--force")
    assert read(whole / "ours.pt")["config"]["model"]["backbone"]["model"] == "escn_backbone"
