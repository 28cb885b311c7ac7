"""Legacy models, and old configs, are trained as what they always were."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import yaml
from fairchem.core.common.registry import registry
from fairchem.core.models.equiformer_v2.eqv2_to_eqv2_hydra import convert_checkpoint_and_config_to_hydra

from fairchem_scd import ConfigError, DenoisingHydra
from fairchem_scd.fairchem1.backbones import known_backbones
from fairchem_scd.fairchem1.data.emt_slabs import write_emt_slabs
from fairchem_scd.fairchem1.legacy import hydra_key, to_hydra
from fairchem_scd.testing import collate, gradients, make_trainer
from tests.support.configs import tiny_config
from tests.support.models import BACKBONES, HEADS, edge_frames_without_chance, hydra_arguments

DENS = {"dens": {"prob": 1.0}}


def legacy(name, **changes):
    """The model block of a legacy model."""
    return {"name": name, **{k: v for k, v in copy.deepcopy(BACKBONES[name]).items() if k != "model"}, **changes}


def hydra(name="equiformer_v2", **backbone):
    return {"name": "hydra", **hydra_arguments(name, **backbone)}


def built(block):
    block = copy.deepcopy(block)
    return registry.get_model_class(block.pop("name"))(**block)


# --- the hydra ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_a_legacy_model_becomes_a_hydra_of_the_same_arguments(name):
    block = legacy(name)
    before = copy.deepcopy(block)
    converted, dens = to_hydra(block)
    assert block == before, "the config was changed in place"
    assert dens == {}
    assert converted == {
        "name": "fairchem_scd.DenoisingHydra",
        "backbone": BACKBONES[name],
        "heads": HEADS[name],
        "otf_graph": True,
        "pass_through_head_outputs": True,
        "legacy_weight_decay": True,
    }
    assert to_hydra(converted) == (converted, {})


def test_weights_are_named_as_by_the_hosts_own_converter(tmp_path):
    state = built(legacy("equiformer_v2", load_energy_lin_ref=True)).state_dict()
    config = {"model": legacy("equiformer_v2"), "outputs": {}}
    (tmp_path / "old.yml").write_text(yaml.safe_dump(config))
    torch.save({"state_dict": state, "config": config}, tmp_path / "old.pt")
    convert_checkpoint_and_config_to_hydra(
        str(tmp_path / "old.yml"), str(tmp_path / "old.pt"), str(tmp_path / "new.yml"), str(tmp_path / "new.pt")
    )
    theirs = torch.load(tmp_path / "new.pt", weights_only=False)["state_dict"]
    assert [f"module.{hydra_key(key)}" for key in state] == list(theirs)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("equiformer_v2", {}),
        ("equiformer_v2", {"alpha_drop": 0.2, "drop_path_rate": 0.2, "proj_drop": 0.2}),
        ("equiformer_v2", {"norm_type": "rms_norm_sh", "share_atom_edge_embedding": True}),
        ("equiformer_v2", {"load_energy_lin_ref": True, "use_energy_lin_ref": False, "use_tp_reparam": False}),
        ("escn", {}),
        ("escn", {"lmax_list": [2, 1], "mmax_list": [2, 1]}),
    ],
    ids=["plain", "dropout", "shared embedding", "references", "plain", "two resolutions"],
)
def test_the_hydra_computes_what_the_legacy_model_does_bit_for_bit(name, options, training, rows):
    block = legacy(name, **options)
    hydra_block, _ = to_hydra(block)
    block.pop("use_tp_reparam", None)
    original, converted = built(block), built({**hydra_block, "denoising": DENS})
    assert isinstance(converted, DenoisingHydra)
    state = {hydra_key(key): value for key, value in original.state_dict().items()}
    keys = converted.load_state_dict(state, strict=False)
    assert not keys.unexpected_keys
    assert all(key.startswith("denoising.") for key in keys.missing_keys)

    original.train(training), converted.train(training)
    batch = collate(rows[:3])
    expected, expected_gradients = gradients(original, batch)
    out, found = gradients(converted, batch)
    assert set(out) == set(expected) == {"energy", "forces"}
    for key in expected:
        assert torch.equal(out[key], expected[key]), key
    found = {key: gradient for key, gradient in found.items() if not key.startswith("denoising.")}
    expected_gradients = {hydra_key(key): gradient for key, gradient in expected_gradients.items()}
    assert set(found) == set(expected_gradients)
    for key, gradient in expected_gradients.items():
        assert (gradient is None and found[key] is None) or torch.equal(found[key], gradient), key
    if "alpha_drop" in options:
        torch.manual_seed(8)  # another than that of the calls above
        again = original(copy.deepcopy(batch))
        assert (again["energy"] - expected["energy"]).abs().max() > 1e-4 or not training, "nothing was dropped"


@pytest.mark.parametrize("options", [{}, {"norm_type": "rms_norm_sh", "share_atom_edge_embedding": True}])
@pytest.mark.parametrize("name", BACKBONES)
def test_the_optimiser_decays_what_it_always_did(name, options, data, tmp_path):
    """By the host's own load_optimizer on both sides."""
    if name == "escn" and options:
        options = {"distance_function": "sigmoid"}
    groups = []
    for trainer_name, task in (
        ("equiformerv2_forces", {}),
        ("fairchem_scd.EquiformerV2DenoisingTrainer", {"denoising": DENS}),
    ):
        config = tiny_config(data, name)
        config.update(trainer=trainer_name, task=task, model=legacy(name, **options))
        trainer = make_trainer(config, tmp_path / trainer_name)
        names = {id(p): n for n, p in trainer.model.named_parameters()}
        groups.append([[names[id(p)] for p in group["params"]] for group in trainer.optimizer.param_groups])
        assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0, 0.001]
    for theirs, ours in zip(*groups, strict=True):
        assert [n for n in ours if not n.startswith("denoising.")] == [hydra_key(n) for n in theirs]
    # What is added: the noise head as the force head that it is another of, and the encoding as the DeNS authors do.
    spared, added = ([n.removeprefix("denoising.dens.") for n in group if "denoising." in n] for group in groups[1])
    forces = [[n for n in group if n.startswith("force_block.")] for group in groups[0]]
    encoding = [["encoding.force_weight"], []] if name == "escn" else [[], ["encoding.force_weight"]]
    assert sorted(spared) == sorted([f"noise_head.{n}" for n in forces[0]] + encoding[0])
    assert sorted(added) == sorted([f"noise_head.{n}" for n in forces[1]] + encoding[1])


# --- what the hydra cannot keep -------------------------------------------------------------------------------------


def test_activation_checkpointing_is_kept_where_the_hydra_has_it(caplog):
    with pytest.raises(TypeError, match="activation_checkpoint"):
        built(legacy("equiformer_v2", activation_checkpoint=True))  # the legacy model never had it
    with caplog.at_level(logging.WARNING):
        converted, _ = to_hydra(legacy("equiformer_v2", activation_checkpoint=True))
    assert converted["backbone"]["activation_checkpoint"] is True
    assert "activation_checkpoint" not in caplog.text
    with caplog.at_level(logging.WARNING):
        to_hydra(legacy("escn", activation_checkpoint=False))
        assert "activation_checkpoint" not in caplog.text
        to_hydra(legacy("escn", activation_checkpoint=True))
    assert "model.activation_checkpoint has no effect: the host's escn_backbone ignores it" in caplog.text


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (
            legacy("equiformer_v2", use_energy_lin_ref=True, load_energy_lin_ref=True),
            r"model\.use_energy_lin_ref: .*'equiformer_v2' .*False",
        ),
        (legacy("equiformer_v2", use_tp_reparam=True), r"model\.use_tp_reparam: .*'equiformer_v2' .*False"),
        (legacy("equiformer_v2", regress_forces=False), r"regress_forces is false: .* set it to true"),
        (legacy("escn", regress_forces=False), r"regress_forces is false: .* set it to true"),
        (hydra(regress_forces=False), r"regress_forces is false: .* set it to true"),
        (legacy("equiformer_v2", otf_graph=False), r"model\.otf_graph is false: .* set otf_graph to true"),
        (legacy("escn", otf_graph=False), r"model\.otf_graph is false: .* set otf_graph to true"),
        (hydra("escn", otf_graph=False), r"otf_graph is false: .* set otf_graph to true"),
        (legacy("equiformer_v2", lmax_list=[2, 1], mmax_list=[2, 1]), r"lmax_list: .* one resolution only"),
        (hydra(lmax_list=[2, 1], mmax_list=[2, 1]), r"model\.backbone\.lmax_list: .* one resolution only"),
        ({"name": "scn", "cutoff": 6.0}, r"model\.name: 'scn' .*equiformer_v2_backbone.*equiformer_v2.*escn"),
        ({"name": "equiformer_v3"}, r"model\.name: 'equiformer_v3' .*equiformer_v2_backbone.*equiformer_v2.*escn"),
        ({"num_layers": 2}, r"model\.name: 'None' .*equiformer_v2_backbone.*equiformer_v2.*escn"),
        (
            {**hydra(), "backbone": {"model": "scn"}},
            r"no adapter for .*SphericalChannelNetwork.*equiformer_v2_backbone.*adding-a-backbone",
        ),
        (
            hydra(model="equiformerv2_backbone"),
            r"model\.backbone\.model: unknown 'equiformerv2_backbone'; known .*escn_",
        ),
        (hydra(model="nowhere.Backbone"), r"model\.backbone\.model: unknown 'nowhere\.Backbone'; known .*"),
        ({**hydra(), "backbone": {"num_layers": 2}}, r"model\.backbone\.model: missing"),
    ],
)
def test_one_clear_error_before_the_model_is_built(block, said, data, tmp_path, monkeypatch):
    def build(*args, **kwargs):
        raise AssertionError("the model was built")

    monkeypatch.setattr(torch.nn.Module, "__init__", build)
    config = {**tiny_config(data), "model": block}
    with pytest.raises(ConfigError, match=f"(?s){said}") as error:
        make_trainer(config, tmp_path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir()), "it left something behind"


def test_every_known_backbone_is_a_model_of_the_host():
    # Those of the package: a test of third parties registers its own.
    assert [name for name in known_backbones() if "." not in name] == [
        "dimenetplusplus_backbone",
        "equiformer_v2_backbone",
        "escn_backbone",
        "esen_backbone",
        "gemnet_oc_backbone",
        "gemnet_t_backbone",
        "painn_backbone",
    ]
    for name in [name for name in known_backbones() if "." not in name]:
        assert registry.get_model_class(name).__module__.startswith("fairchem.core.models")


# --- old configs ----------------------------------------------------------------------------------------------------


def old_config(data, name, trainer, denoising=None, epochs=1):
    """As they were before outputs and loss functions had blocks of their own."""
    for split, count in (("train", 8), ("val", 4)):
        write_emt_slabs(data / f"old_{split}", num_structures=count, num_systems=4, seed=int(split == "val"))
    config = {
        "trainer": trainer,
        "dataset": [
            {
                "src": str(data / "old_train"),
                "normalize_labels": True,
                "target_mean": 5.5,
                "target_std": 2.5,
                "grad_target_mean": 0.0,
                "grad_target_std": 1.5,
            },
            {"src": str(data / "old_val")},
        ],
        "logger": "tensorboard",
        "task": {
            "dataset": "trajectory_lmdb",
            "description": "Regressing to energies and forces",
            "type": "regression",
            "metric": "mae",
            "primary_metric": "forces_mae",
            "labels": ["potential energy"],
            "grad_input": "atomic forces",
            "train_on_free_atoms": True,
            "eval_on_free_atoms": True,
        },
        "model": legacy(name, lmax_list=[1], mmax_list=[1]),
        "optim": {
            "batch_size": 4,
            "eval_batch_size": 4,
            "num_workers": 0,
            "lr_initial": 0.001,
            "lr_gamma": 0.3,
            "lr_milestones": [2000, 3000],
            "warmup_steps": 3,
            "warmup_factor": 0.2,
            "optimizer": "AdamW",
            "optimizer_params": {"amsgrad": True, "weight_decay": 0.001},
            "loss_energy": "mae",
            "loss_forces": "l2mae",
            "energy_coefficient": 2,
            "force_coefficient": 100,
            "max_epochs": epochs,
            "clip_grad_norm": 1e9,
            "ema_decay": 0.9,
        },
    }
    if denoising is not None:
        config["task"]["denoising"] = denoising
    return config


def trained_from(path, config, folder):
    trainer = make_trainer(config, folder)
    trainer.load_checkpoint(str(path))
    torch.manual_seed(5)
    trainer.train(disable_eval_tqdm=True)
    return trainer


@pytest.mark.parametrize("name", BACKBONES)
def test_an_old_config_trains_with_denoising(name, data, tmp_path):
    trainer = make_trainer(old_config(data, name, "fairchem_scd.DenoisingTrainer", DENS), tmp_path)
    normalizers = {key: (float(n.mean), float(n.rmsd)) for key, n in trainer.normalizers.items()}
    assert normalizers == {"energy": (5.5, 2.5), "forces": (0.0, 1.5)}
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train(disable_eval_tqdm=True)
    assert trainer.step == 2
    assert 0 < trainer.best_val_metric < 1e9
    assert {"denoising_pos_mae", "denoising_energy_mae"} <= set(trainer.metrics)
    moved = {key for key, value in trainer.model.state_dict().items() if not torch.equal(value, before[key])}
    assert {key.split(".")[0] for key in moved} == {"backbone", "output_heads", "denoising"}


@pytest.mark.parametrize("name", BACKBONES)
def test_an_old_config_trains_as_in_the_host_where_no_step_denoises(name, data, tmp_path):
    """From the same initial weights, one epoch of each: equal to the last bit."""
    start = make_trainer(old_config(data, name, "forces"), tmp_path / "start")
    start.best_val_metric = 1e9  # as at the start of training
    path = start.save()
    idle = {"dens": {"prob": 0.0}}
    with edge_frames_without_chance():  # the host draws them from the global random state, our trainers by step
        host = trained_from(path, old_config(data, name, "forces"), tmp_path / "host")
        ours = trained_from(path, old_config(data, name, "fairchem_scd.DenoisingTrainer", idle), tmp_path / "ours")
    assert ours.step == host.step == 2
    assert ours.best_val_metric == host.best_val_metric
    expected = host.model.state_dict()
    assert not torch.equal(expected["sphere_embedding.weight"], start.model.state_dict()["sphere_embedding.weight"])
    state = ours.model.state_dict()
    for key, value in expected.items():
        assert torch.equal(state[hydra_key(key)], value), key
