"""The configs: what each of them says, how large its model is, and that it trains.

The expected values are written out from the DeNS paper and its authors' released files, not from ours.
"""

from __future__ import annotations

import copy
import json
import re
from functools import cache

import numpy as np
import pytest
import torch
import yaml
from fairchem.core.common.registry import registry
from fairchem.core.models.base import HydraModel

from fairchem_scd import DenoisingHydra
from fairchem_scd.fairchem1.backbones import adapter_for
from fairchem_scd.fairchem1.legacy import hydra_key, to_hydra
from tests.support.config_files import count, lmdb_of, load, oc22_data, sample_data, settings_of, small, train
from tests.support.configs import CONFIGS, host_config
from tests.support.models import BACKBONES, hydra_arguments

# --- what they say ---------------------------------------------------------------------------------------------------

FORCES_METRICS = ["forcesx_mae", "forcesy_mae", "forcesz_mae", "mae", "cosine_similarity", "magnitude_error"]

S2EF = {
    "trainer": "fairchem_scd.EquiformerV2DenoisingTrainer",
    "model.name": "hydra",
    "model.otf_graph": True,
    "model.pass_through_head_outputs": True,
    "model.backbone.use_pbc": True,
    "model.backbone.otf_graph": True,
    "model.backbone.max_neighbors": 20,
    "model.backbone.lmax_list": [6],
    "model.backbone.sphere_channels": 128,
    "outputs.energy.level": "system",
    "outputs.forces.level": "atom",
    "outputs.forces.train_on_free_atoms": True,
    "outputs.forces.eval_on_free_atoms": True,
    "loss_functions.0.energy.fn": "mae",
    "loss_functions.1.forces.fn": "l2mae",
    "loss_functions.1.forces.coefficient": 100,
    "evaluation_metrics.metrics.energy": ["mae"],
    "evaluation_metrics.metrics.forces": FORCES_METRICS,
    "dataset.train.key_mapping": {"y": "energy", "force": "forces"},
    "dataset.val.sample_n": 30000,
    "optim.optimizer": "AdamW",
    "optim.scheduler": "LambdaLR",
    "optim.scheduler_params.warmup_factor": 0.2,
    "optim.load_balancing": "atoms",
    "optim.ema_decay": 0.999,
}
OC20 = {
    **S2EF,
    "evaluation_metrics.primary_metric": "forces_mae",
    "dataset.train.transforms.normalizer.energy": {"mean": -0.7554450631141663, "stdev": 2.887317180633545},
    "dataset.train.transforms.normalizer.forces": {"mean": 0.0, "stdev": 2.887317180633545},
    "dataset.val.format": "lmdb",
    "dataset.val.src": "data/oc20/s2ef/all/val_id",
    "optim.clip_grad_norm": 100,
}
OC20_2M = {
    **OC20,
    "dataset.train.format": "lmdb",
    "dataset.train.src": "data/oc20/s2ef/2M/train",
    "task.denoising.dens.prob": 0.5,
    "task.denoising.dens.corrupt_ratio": 0.5,
    "task.denoising.dens.coefficient": 10,
    "loss_functions.0.energy.coefficient": 2,
    "model.backbone.num_layers": 12,
    "model.backbone.mmax_list": [2],
    "optim.eval_every": 5000,
}
EQUIFORMER_V2 = {
    "model.legacy_weight_decay": True,
    "model.backbone.model": "equiformer_v2_backbone",
    "model.backbone.max_radius": 12.0,
    "model.backbone.max_num_elements": 90,
    "model.backbone.attn_hidden_channels": 64,
    "model.backbone.num_heads": 8,
    "model.backbone.attn_alpha_channels": 64,
    "model.backbone.attn_value_channels": 16,
    "model.backbone.ffn_hidden_channels": 128,
    "model.backbone.norm_type": "layer_norm_sh",
    "model.backbone.grid_resolution": 18,
    "model.backbone.edge_channels": 128,
    "model.backbone.attn_activation": "silu",
    "model.backbone.ffn_activation": "silu",
    "model.backbone.use_grid_mlp": True,
    "model.backbone.alpha_drop": 0.1,
    "model.backbone.weight_init": "uniform",
    "model.heads.energy.module": "equiformerV2_scalar_head",
    "model.heads.forces.module": "equiformerV2_vector_head",
    "optim.batch_size": 4,
    "optim.eval_batch_size": 4,
    "optim.optimizer_params": {"weight_decay": 0.001},
    "optim.scheduler_params.lambda_type": "cosine",
    "optim.scheduler_params.lr_min_factor": 0.01,
}
EXPECTED = {
    "dens_oc20_2m_12epochs": {
        **OC20_2M,
        **EQUIFORMER_V2,
        "task.denoising.dens.std": 0.1,
        "model.backbone.drop_path_rate": 0.05,
        "model.backbone.enforce_max_neighbors_strictly": True,
        "optim.lr_initial": 2e-4,
        "optim.max_epochs": 12,
        "optim.scheduler_params.warmup_epochs": 0.1,
    },
    "dens_oc20_2m_30epochs": {
        **OC20_2M,
        **EQUIFORMER_V2,
        "task.denoising.dens.std": 0.1,  # the body of the authors' file; its name says 0.15
        "model.backbone.drop_path_rate": 0.05,
        "model.backbone.enforce_max_neighbors_strictly": True,
        "optim.lr_initial": 4e-4,
        "optim.max_epochs": 30,
        "optim.scheduler_params.warmup_epochs": 0.1,
    },
    "dens_escn_oc20_2m": {
        **OC20_2M,
        "task.denoising.dens.std": 0.15,
        "model.backbone.model": "escn_backbone",
        "model.backbone.cutoff": 12.0,
        "model.backbone.hidden_channels": 256,
        "model.backbone.num_sphere_samples": 128,
        "model.backbone.distance_function": "gaussian",
        "model.backbone.basis_width_scalar": 2.0,
        "model.heads.energy.module": "escn_energy_head",
        "model.heads.forces.module": "escn_force_head",
        "optim.batch_size": 6,
        "optim.eval_batch_size": 6,
        "optim.lr_initial": 8e-4,
        "optim.optimizer_params": {"amsgrad": True, "weight_decay": 0.01},
        "optim.scheduler_params.lambda_type": "multistep",
        "optim.scheduler_params.warmup_epochs": 0.01,
        "optim.scheduler_params.decay_epochs": [11.7, 15, 18.3],
        "optim.scheduler_params.decay_rate": 0.3,
        "optim.max_epochs": 20,
    },
    "dens_oc20_all_md": {
        **OC20,
        **EQUIFORMER_V2,
        "dataset.train.format": "oc20_md_lmdb",
        "dataset.train.src": "data/oc20/s2ef/all_md/train",
        "task.denoising.dens.prob": 0.125,
        "task.denoising.dens.std": 0.1,
        "task.denoising.dens.corrupt_ratio": 0.25,
        "task.denoising.dens.coefficient": 15,
        "task.denoising.dens.exclude_md": True,
        "loss_functions.0.energy.coefficient": 4,
        "model.backbone.num_layers": 20,
        "model.backbone.mmax_list": [3],
        "model.backbone.drop_path_rate": 0.1,
        "model.backbone.enforce_max_neighbors_strictly": True,
        "optim.lr_initial": 4e-4,
        "optim.max_epochs": 2,
        "optim.scheduler_params.warmup_epochs": 0.01,
        "optim.eval_every": 25000,
    },
    "dens_oc22": {
        **S2EF,
        **EQUIFORMER_V2,
        "dataset.train.format": "oc22_lmdb",
        "dataset.train.src": "data/oc22/s2ef-total/train",
        "dataset.train.transforms.normalizer.energy": {"mean": 0.0, "stdev": 25.119809935106424},
        "dataset.train.transforms.normalizer.forces": {"mean": 0.0, "stdev": 0.14759646356105804},
        "dataset.train.transforms.element_references.energy.file": "data/oc22/oc22_linfit_coeffs.npz",
        "dataset.val.src": "data/oc22/s2ef-total/val_id",
        "task.denoising.dens.prob": 0.5,
        "task.denoising.dens.std": 0.15,
        "task.denoising.dens.corrupt_ratio": 0.5,
        "task.denoising.dens.coefficient": 25,
        "outputs.energy.prediction_dtype": "float32",
        "outputs.forces.prediction_dtype": "float32",
        "loss_functions.0.energy.coefficient": 4,
        "evaluation_metrics.primary_metric": "energy_mae",
        "model.backbone.num_layers": 18,
        "model.backbone.mmax_list": [2],
        "model.backbone.drop_path_rate": 0.1,
        "model.backbone.enforce_max_neighbors_strictly": False,
        "optim.lr_initial": 2e-4,
        "optim.max_epochs": 6,
        "optim.scheduler_params.warmup_epochs": 0.1,
        "optim.clip_grad_norm": 50,
        "optim.eval_every": 5000,
    },
}
# Structures a step over all GPUs, and how many GPUs.
GLOBAL_BATCH = {
    "dens_oc20_2m_12epochs": (64, 16),
    "dens_oc20_2m_30epochs": (128, 32),
    "dens_escn_oc20_2m": (96, 16),
    "dens_oc20_all_md": (512, 128),
    "dens_oc22": (128, 32),
}
# Validation, energy meV / force meV/Å; nothing was published with the eSCN config.
PUBLISHED = {
    "dens_oc20_2m_12epochs": ("269 meV / 19.09 meV/Å", "285 / 20.46"),
    "dens_oc20_2m_30epochs": ("251 meV / 18.02 meV/Å", "278 / 19.4"),
    "dens_oc20_all_md": ("222 meV / 14.0 meV/Å", "227 / 15.0"),
    "dens_oc22": ("391.6 meV / 20.66 meV/Å", "533.0 / 27.11"),
}


def at(config, dotted):
    """The value under a key such as `loss_functions.0.energy.fn`."""
    try:
        for part in dotted.split("."):
            config = config[int(part)] if isinstance(config, list) else config[part]
    except (KeyError, IndexError):
        return "(not there)"
    return config


@pytest.mark.parametrize("name", EXPECTED)
def test_config_says_what_the_released_run_says(name):
    config = load(name)
    found = {key: at(config, key) for key in EXPECTED[name]}
    assert found == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_header_tells_how_the_run_was_made_and_what_came_out(name):
    header = (CONFIGS / f"{name}.yml").read_text()
    batch, gpus = GLOBAL_BATCH[name]
    per_gpu = load(name)["optim"]["batch_size"]
    assert per_gpu * gpus == batch
    assert f"Global batch {batch}: {per_gpu} on each of {gpus} GPUs" in header
    assert "--amp" in header
    for figures in PUBLISHED.get(name, ()):
        assert figures in header


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yml")), ids=lambda path: path.stem)
def test_every_config_loads_and_its_block_parses(path):
    # Fine-tuning on forces denoises no more: its block has quiet heads, and maybe a schedule of drop path.
    assert bool(settings_of(host_config(path))) == (path.stem not in ("finetune_oc20", "quickstart_finetune"))


def test_esen_config_is_the_published_model_with_the_12_epoch_runs_optimiser():
    config, run = load("dens_esen_oc20"), load("dens_oc20_2m_12epochs")
    assert config["trainer"] == "fairchem_scd.MLIPDenoisingTrainer"
    dens = {"prob": 0.5, "std": 0.1, "coefficient": 10}
    assert settings_of(config)["dens"].items() >= dens.items()
    model = {"num_layers": 10, "lmax": 3, "mmax": 2, "sphere_channels": 128, "cutoff": 6.0, "num_distance_basis": 64}
    model |= {"act_type": "gate", "mlp_type": "spectral", "use_envelope": True, "distance_function": "gaussian"}
    assert config["model"]["backbone"].items() >= model.items()
    block, _ = to_hydra(config["model"])
    del block["name"]
    assert round(count(DenoisingHydra(**block).parameters()) / 1e6) == 30  # eSEN-30M
    for key in ("optim", "loss_functions", "dataset", "outputs", "evaluation_metrics"):
        assert config[key] == run[key]


def test_quickstart_needs_nothing_but_itself():
    config = load("quickstart")
    assert config["dataset"]["train"]["format"] == "emt_slabs"
    assert "format" not in config["dataset"]["val"]
    assert config["dataset"]["train"]["src"] != config["dataset"]["val"]["src"]
    assert "dens" in settings_of(config)


def test_adding_dens_is_two_keys_and_gives_the_released_12_epoch_run():
    plain, added = load("examples/plain_oc20"), load("add_dens")
    assert {key for key in added if added[key] != plain.get(key)} == {"trainer", "task"}
    assert "fairchem_scd" not in json.dumps(plain)
    released = load("dens_oc20_2m_12epochs")
    assert to_hydra(added["model"])[0] == to_hydra(released["model"])[0]
    assert settings_of(added) == settings_of(released)
    assert added["loss_functions"] == released["loss_functions"]
    assert added["optim"] == released["optim"]


# --- their models ----------------------------------------------------------------------------------------------------

# Parameters of the host's model, and what DeNS adds: another force head and 7 degrees × 128 channels of encoding.
FORCE_ENCODING = 7 * 128
SIZES = {
    "dens_oc20_2m_12epochs": (83_164_802, 5_983_233),
    "dens_oc20_2m_30epochs": (83_164_802, 5_983_233),
    "dens_escn_oc20_2m": (51_844_608, 34_048),
    "dens_oc20_all_md": (153_602_690, 6_901_761),
    "dens_oc22": (121_526_402, 5_983_233),
    "add_dens": (83_164_802, 5_983_233),
}


@cache
def size(model):
    """Parameters of a model, by the JSON of its block: the same few are asked for again and again."""
    arguments = json.loads(model)
    return count(registry.get_model_class(arguments.pop("name"))(**arguments).parameters())


@pytest.mark.parametrize("name", SIZES)
def test_full_size_model_is_the_hosts_and_dens_adds_a_head_and_an_encoding(name, sizes_only):
    config = load(name)
    arguments, _ = to_hydra(config["model"])
    del arguments["name"]
    model = DenoisingHydra(denoising=config["task"]["denoising"], **arguments)

    plain = {key: value for key, value in config["model"].items() if key != "legacy_weight_decay"}
    added = count(model.denoising.parameters())
    assert (count(model.parameters()) - added, added) == SIZES[name]
    assert size(json.dumps(plain, sort_keys=True)) == SIZES[name][0]
    assert added == count(model.output_heads["forces"].parameters()) + FORCE_ENCODING


# --- that they train -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "neighbors"),
    [
        ("dens_oc20_2m_12epochs", 20),
        ("dens_oc20_2m_30epochs", 20),
        ("dens_escn_oc20_2m", 20),
        ("dens_esen_oc20", 300),
        ("add_dens", 20),
    ],
)
def test_config_trains(name, neighbors, data, tmp_path):
    trainer, steps = train(small(load(name), *sample_data(data)), tmp_path)
    assert all(corruption.mask.any() for _, corruption, _ in steps)
    assert trainer._unwrapped_model.backbone.max_neighbors == neighbors


@pytest.mark.parametrize("block", [{}, {"scd": {}}], ids=["plain", "scd"])
def test_esen_goes_on_to_conservative_forces_as_the_header_says(block, data, tmp_path):
    config = small(load("dens_esen_oc20"), *sample_data(data))
    first, _ = train(config, tmp_path / "first")
    header = (CONFIGS / "dens_esen_oc20.yml").read_text()
    lines = re.findall(r"^#   ((?:task|model|  ).*)", header, flags=re.MULTILINE)
    stage = yaml.safe_load("\n".join(line for line in lines if "--num-gpus" not in line))
    assert stage["task"] == {"denoising": {}}
    assert stage["model"]["finetune_config"]["starting_checkpoint"] == "checkpoints/esen/best_checkpoint.pt"
    assert "--timestamp-id esen " in header
    stage["task"]["denoising"] = block
    folder = first.config["cmd"]["checkpoint_dir"]
    stage["model"]["finetune_config"]["starting_checkpoint"] = f"{folder}/best_checkpoint.pt"
    second, steps = train({**config, **stage}, tmp_path / "second")
    assert adapter_for(second._unwrapped_model.backbone).conservative
    assert all((corruption is not None) == bool(block) for _, corruption, _ in steps)


def test_all_md_config_trains_and_leaves_md_frames_alone(rows, tmp_path):
    """On data of the config's own format: a text file beside the LMDB tells MD frames; validation data has none."""
    src = lmdb_of(tmp_path / "all_md", rows)
    (tmp_path / "all_md/data_log.0000.txt").write_text("relaxations/random1,frame0\n" * 4 + "md/random1,frame0\n" * 4)
    val = lmdb_of(tmp_path / "val", rows[:4])
    _, steps = train(small(load("dens_oc20_all_md"), {"src": src}, {"src": val}), tmp_path)
    assert sum(int(batch.md.sum()) for batch, _, _ in steps) == 4
    for batch, corruption, _ in steps:
        of_md = batch.md.bool()[batch.batch]
        assert not corruption.mask[of_md].any()
    assert any(corruption.mask.any() for _, corruption, _ in steps)


def test_oc22_config_trains_with_its_linear_references_subtracted(rows, tmp_path):
    config = small(load("dens_oc22"), *oc22_data(tmp_path, rows))
    references = config["dataset"]["train"]["transforms"]["element_references"]["energy"]
    references["file"] = str(tmp_path / "references.npz")
    trainer, steps = train(config, tmp_path)

    batch = steps[0][0]
    coefficients = np.linspace(-1, 1, 119)
    residuals = torch.tensor(
        [
            float(batch.energy[b]) - coefficients[batch.atomic_numbers[batch.batch == b].long()].sum()
            for b in range(len(batch.natoms))
        ]
    )
    trainer.model.train()
    out = trainer._forward(batch)
    exact_energy = (residuals / 25.119809935106424).float().view_as(out["energy"])
    nothing = trainer._compute_loss({**out, "energy": torch.zeros_like(exact_energy)}, batch)
    exact = trainer._compute_loss({**out, "energy": exact_energy}, batch)
    assert float(nothing - exact) == pytest.approx(4 * float(residuals.abs().mean()) / 25.119809935106424, rel=1e-3)


def test_the_key_of_older_oc22_configs_does_nothing_in_this_host(rows, tmp_path):
    train, _ = oc22_data(tmp_path, rows[:1])
    dataset = registry.get_dataset_class("oc22_lmdb")
    with_references = dataset({**train, "lin_ref": str(tmp_path / "references.npz")})
    assert float(with_references[0].y) == float(dataset(train)[0].y) == pytest.approx(float(rows[0].energy))


@pytest.mark.parametrize("name", ["dens_oc20_2m_12epochs", "dens_oc20_all_md"])
def test_weight_decay_is_that_of_the_authors_legacy_model(name):
    config = small(load(name), {}, {})
    block, _ = to_hydra(config["model"])
    backbone = {key: value for key, value in block["backbone"].items() if key != "model"}
    del block["name"]
    ours = DenoisingHydra(**block).no_weight_decay()
    theirs = registry.get_model_class("equiformer_v2")(**backbone).no_weight_decay()
    assert set(ours) == {hydra_key(key) for key in theirs}


# --- other people's words --------------------------------------------------------------------------------------------


def in_other_words(name, data, model, optim):
    """A small config of ours without its denoising settings, which `model` and `optim` hold instead."""
    config = small(load(name), *sample_data(data))
    config["task"], config["model"] = {"strict_load": True}, model
    config["optim"].update(copy.deepcopy(optim))
    return config


AUTHORS_OPTIM = {
    "loss_energy": "mae",
    "loss_force": "l2mae",
    "use_denoising_pos": True,
    "denoising_pos_params": {
        "prob": 0.5,
        "fixed_noise_std": True,
        "std": 0.1,
        "num_steps": 50,
        "corrupt_ratio": 0.5,
    },
    "denoising_pos_coefficient": 10,
}


@pytest.mark.parametrize(
    ("name", "std", "model"),
    [
        (
            "dens_oc20_2m_12epochs",
            0.1,
            {
                **{key: value for key, value in BACKBONES["equiformer_v2"].items() if key != "model"},
                "name": "equiformer_v2_dens",
                "use_tp_reparam": False,
                "use_force_encoding": True,
                "use_noise_schedule_sigma_encoding": False,
                "use_energy_lin_ref": False,
                "load_energy_lin_ref": False,
            },
        ),
        (
            "dens_escn_oc20_2m",
            0.15,
            {
                **{key: value for key, value in BACKBONES["escn"].items() if key != "model"},
                "name": "escn_dens",
                "use_force_encoding": True,
                "show_timing_info": False,
            },
        ),
    ],
    ids=["equiformer_v2", "escn"],
)
def test_the_authors_config_trains_with_only_its_trainer_replaced(name, std, model, data, tmp_path):
    config = in_other_words(name, data, model, AUTHORS_OPTIM)
    for unused in ((0.01, 0.5), ("None", "None")):  # YAML reads None as a string
        config["optim"]["denoising_pos_params"].update(std=std, std_low=unused[0], std_high=unused[1])
        assert settings_of(config) == settings_of(load(name))
    trainer, _ = train(config, tmp_path)
    assert {"dens": trainer.tasks["dens"].settings.model_dump()} == settings_of(load(name))


def test_the_hosts_own_dens_config_trains_with_only_its_trainer_replaced(data, tmp_path):
    """By the short names of its modules, and by the dotted ones of fairchem's shipped configs."""
    place = "fairchem.core.models.equiformer_v2.equiformer_v2_dens."
    short = ("equiformer_v2_dens_backbone", "eqV2_DeNS_scalar_head", "eqV2_DeNS_vector_head")
    dotted = (f"{place}EqV2DeNSBackbone", f"{place}DeNSScalarHead", f"{place}DeNSVectorHead")
    blocks = []
    for names in (short, dotted):
        model = {"name": "hydra", "otf_graph": True, **hydra_arguments("equiformer_v2")}
        model["backbone"].update(model=names[0], use_force_encoding=True)
        model["heads"] = {"energy": {"module": names[1], "use_denoising": True}, "forces": {"module": names[2]}}
        blocks.append(to_hydra(model))
    assert blocks[0] == blocks[1]
    config = in_other_words("dens_oc20_2m_12epochs", data, model, AUTHORS_OPTIM)
    config["optim"]["denoising_pos_params"].update(std_low="None", std_high="None")
    trainer, _ = train(config, tmp_path)
    assert {"dens": trainer.tasks["dens"].settings.model_dump()} == settings_of(load("dens_oc20_2m_12epochs"))
    # The modules are the plain ones, so that a plain host loads what is trained.
    plain = HydraModel(**hydra_arguments("equiformer_v2"))
    keys = trainer._unwrapped_model.state_dict()
    assert set(plain.state_dict()) == {key for key in keys if not key.startswith("denoising.")}
