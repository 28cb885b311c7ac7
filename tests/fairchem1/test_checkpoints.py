"""Training goes on from checkpoints of another kind, in full, in both directions."""

from __future__ import annotations

import copy

import pytest
import torch
from fairchem.core.common import distutils
from fairchem.core.common.utils import load_model_and_weights_from_checkpoint
from fairchem.core.models.base import HydraModel

from fairchem_scd import ConfigError, DenoisingHydra
from fairchem_scd.fairchem1 import checkpoint
from fairchem_scd.fairchem1.backbones import ESCNAdapter
from fairchem_scd.fairchem1.legacy import hydra_key
from fairchem_scd.testing import collate, make_trainer
from tests.support.command_line import fairchem_on
from tests.support.configs import tiny_config
from tests.support.models import BACKBONES, edge_frames_without_chance
from tests.support.runs import folder_of

OURS = "fairchem_scd.EquiformerV2DenoisingTrainer"
PLAIN = "equiformerv2_forces"
DENS = {"dens": {"prob": 1.0}}
IDLE = {"dens": {"prob": 0.0}}
ADDED = "denoising."


@pytest.fixture(autouse=True, scope="module")
def _edge_frames_without_chance():
    """The host draws them from the global random state, this package's trainers by step."""
    with edge_frames_without_chance():
        yield


# --- runs and what is known of them ---------------------------------------------------------------------------------


def config_of(data, kind, name, trainer=OURS, denoising=None, decay=0.001, epochs=1, **backbone):
    """A config whose model block is a hydra or the legacy model."""
    # Clipping would round differently with more parameters in the norm.
    optim = {"optimizer_params": {"weight_decay": decay}, "max_epochs": epochs, "clip_grad_norm": 1e9}
    config = tiny_config(data, name, DENS if denoising is None else denoising, optim=optim)
    config["trainer"] = trainer
    if trainer == PLAIN:
        config["task"] = {}
    # Of the lowest degree that has forces: most of the time goes into building grids.
    config["model"]["backbone"].update(lmax_list=[1], mmax_list=[1], **backbone)
    if kind == "legacy":
        config["model"] = {"name": name, **{k: v for k, v in config["model"]["backbone"].items() if k != "model"}}
    return config


def trained(config, folder, checkpoint_path=None):
    trainer = make_trainer(config, folder)
    if checkpoint_path is not None:
        trainer.load_checkpoint(str(checkpoint_path))
        if config["trainer"] == PLAIN:
            trainer.scheduler.step()  # the host's is a step behind
    torch.manual_seed(5)
    trainer.train(disable_eval_tqdm=True)
    return trainer


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A trainer that ran for one epoch of two steps and wrote its checkpoints; each made once."""
    made = {}

    def get(kind, name, decay=0.001, **backbone):
        key = kind, name, decay, tuple(backbone)
        if key not in made:
            trainer, form = (OURS, "hydra") if kind == "dens" else (PLAIN, kind)
            config = config_of(data, form, name, trainer, decay=decay, **backbone)
            made[key] = trained(config, tmp_path_factory.mktemp("finished"))
        return made[key], folder_of(made[key]) / "checkpoint.pt"

    return get


def own(name: str) -> str:
    return name


def parameters(trainer, named=own):
    return {named(name): p for name, p in trainer._unwrapped_model.named_parameters()}


def weights(trainer, named=own):
    return {named(name): value.clone() for name, value in trainer._unwrapped_model.state_dict().items()}


def optimizer_state(trainer, named=own):
    """What the optimiser knows of each parameter, by the trainer's own objects and not by position."""
    return {name: trainer.optimizer.state[p] for name, p in parameters(trainer, named).items() if p.requires_grad}


def average(trainer, named=own):
    shadow = iter(trainer.ema.shadow_params)
    return {name: next(shadow) for name, p in parameters(trainer, named).items() if p.requires_grad}


def decayed(trainer, named=own):
    """Weight decay of each parameter that the optimiser has."""
    groups = trainer.optimizer.param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    return {name: decay[id(p)] for name, p in parameters(trainer, named).items() if id(p) in decay}


def host_part(values):
    return {name: value for name, value in values.items() if not name.startswith(ADDED)}


def assert_equal(values, expected):
    assert set(values) == set(expected)
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_equal(values[name], value)
        elif isinstance(value, torch.Tensor):
            assert torch.equal(values[name], value), name
        else:
            assert values[name] == value, name


def names_of(kind):
    return hydra_key if kind == "legacy" else own


# --- from a plain run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.001, 0.0], ids=["two groups", "one group"])
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("kind", ["hydra", "legacy"])
def test_a_plain_run_goes_on_with_denoising_switched_on(kind, name, decay, finished, data, tmp_path):
    source, path = finished(kind, name, decay)
    named = names_of(kind)
    trainer = make_trainer(config_of(data, kind, name, decay=decay, epochs=2), tmp_path)
    fresh = weights(trainer)
    trainer.load_checkpoint(str(path))

    added = {key for key in fresh if key.startswith(ADDED)}
    assert added
    assert_equal(host_part(weights(trainer)), weights(source, named))
    assert_equal({key: weights(trainer)[key] for key in added}, {key: fresh[key] for key in added})

    state = optimizer_state(trainer)
    assert_equal(host_part(state), optimizer_state(source, named))
    assert all("exp_avg" in values for values in host_part(state).values())
    assert not any(values for key, values in state.items() if key.startswith(ADDED))
    assert len(trainer.optimizer.param_groups) == (2 if decay else 1)
    assert_equal(host_part(decayed(trainer)), decayed(source, named))

    shadow = average(trainer)
    assert_equal(host_part(shadow), average(source, named))
    assert not torch.equal(shadow["backbone.sphere_embedding.weight"], fresh["backbone.sphere_embedding.weight"])
    assert_equal({k: v for k, v in shadow.items() if k in added}, {k: fresh[k] for k in shadow if k in added})
    assert trainer.ema.decay == 0.9

    stored = checkpoint.read(path)
    assert (trainer.step, trainer.epoch, trainer.best_val_metric) == (2, 1.0, stored["best_val_metric"])
    # The host stores the schedule before its step; the run itself was one further.
    assert trainer.scheduler.scheduler.state_dict() == source.scheduler.scheduler.state_dict()
    assert {g["lr"] for g in trainer.optimizer.param_groups} == {g["lr"] for g in source.optimizer.param_groups}

    if decay:
        trainer.train(disable_eval_tqdm=True)
        assert trainer.step == 4
        assert all(optimizer_state(trainer)[key] for key in added if key in state)


@pytest.mark.parametrize(
    ("kind", "name", "decay", "options"),
    [
        ("hydra", "equiformer_v2", 0.001, {}),
        ("legacy", "equiformer_v2", 0.001, {}),
        # A frozen parameter, which one group holds and the average does not, and parameters outside the blocks.
        ("legacy", "equiformer_v2", 0.0, {"load_energy_lin_ref": True, "share_atom_edge_embedding": True}),
        ("legacy", "equiformer_v2", 0.001, {"load_energy_lin_ref": True, "share_atom_edge_embedding": True}),
        ("hydra", "escn", 0.0, {}),
        ("legacy", "escn", 0.001, {}),
    ],
)
def test_without_a_denoising_step_it_goes_on_exactly_as_the_plain_run_would(
    kind, name, decay, options, finished, data, tmp_path
):
    """The host resumes its own checkpoint: what it then trains is what we must train from the same file."""
    _, path = finished(kind, name, decay, **options)
    named, options = names_of(kind), {"decay": decay, "epochs": 2, **options}
    host = trained(config_of(data, kind, name, PLAIN, **options), tmp_path / "host", path)
    ours = trained(config_of(data, kind, name, denoising=IDLE, **options), tmp_path / "ours", path)
    assert host.step == ours.step == 4
    assert_equal(host_part(weights(ours)), weights(host, named))
    assert_equal(host_part(average(ours)), average(host, named))
    assert ours.best_val_metric == host.best_val_metric


@pytest.mark.parametrize("kind", ["hydra", "legacy"])
def test_restart_counts_from_zero_and_keeps_what_was_learnt(kind, finished, data, tmp_path):
    source, path = finished(kind, "equiformer_v2")
    named = names_of(kind)
    trainer = make_trainer(config_of(data, kind, "equiformer_v2", denoising={**DENS, "restart": True}), tmp_path)
    schedule = copy.deepcopy(trainer.scheduler.scheduler.state_dict())
    rate = trainer.optimizer.param_groups[0]["lr"]
    # A best that no run beats must not keep the new one from writing its own.
    trainer.load_checkpoint("given", {**checkpoint.read(path), "best_val_metric": 0.0})
    assert_equal(host_part(weights(trainer)), weights(source, named))
    assert_equal(host_part(optimizer_state(trainer)), optimizer_state(source, named))
    assert_equal(host_part(average(trainer)), average(source, named))
    assert (trainer.step, trainer.epoch) == (0, 0)
    assert trainer.scheduler.scheduler.state_dict() == schedule
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {rate}
    trainer.train(disable_eval_tqdm=True)
    assert trainer.step == 2
    assert (folder_of(trainer) / "best_checkpoint.pt").is_file()


@pytest.mark.parametrize("given", ["hydra", "legacy"])
def test_the_configs_form_of_the_model_may_differ_from_the_checkpoints(given, finished, data, tmp_path):
    """The two forms decay other parameters: state goes by name, and the config's form says what is decayed."""
    source, path = finished(given, "equiformer_v2")
    wanted = {"hydra": "legacy", "legacy": "hydra"}[given]
    other, _ = finished(wanted, "equiformer_v2")
    named = names_of(given)
    assert decayed(source, named) != decayed(other, names_of(wanted))
    for denoising in (DENS, {}):
        config = config_of(data, wanted, "equiformer_v2", denoising=denoising, epochs=2)
        trainer = make_trainer(config, tmp_path / str(len(denoising)))
        trainer.load_checkpoint(str(path))
        assert_equal(host_part(weights(trainer)), weights(source, named))
        assert_equal(host_part(optimizer_state(trainer)), optimizer_state(source, named))
        assert_equal(host_part(decayed(trainer)), decayed(other, names_of(wanted)))
        assert trainer.step == 2


def published(path, folder, name):
    """The checkpoint as the host's older versions published theirs."""
    stored = checkpoint.read(path)
    arguments = {key: value for key, value in stored["config"]["model"].items() if key != "name"}
    old = {
        "state_dict": {f"module.module.{key}": value for key, value in stored["state_dict"].items()},
        "normalizers": {
            "target": {"mean": torch.tensor(-0.75), "std": torch.tensor(2.0)},
            "grad_target": {"mean": torch.tensor(0.0), "std": torch.tensor(3.0)},
        },
        "config": {
            "trainer": "forces",
            "task": {"dataset": "trajectory_lmdb"},
            "model": name,
            "model_attributes": arguments,
            "optim": {},
        },
        "val_metrics": None,
        "amp": None,
    }
    torch.save(old, folder / "published.pt")
    return folder / "published.pt"


@pytest.mark.parametrize("name", BACKBONES)
def test_a_published_checkpoint_is_a_start(name, finished, data, tmp_path):
    source, path = finished("legacy", name)
    trainer = make_trainer(config_of(data, "legacy", name), tmp_path)
    untouched = copy.deepcopy(trainer.optimizer.state_dict())
    trainer.load_checkpoint(str(published(path, tmp_path, name)))
    assert_equal(host_part(weights(trainer)), weights(source, hydra_key))
    assert trainer.optimizer.state_dict() == untouched
    assert (trainer.step, trainer.epoch) == (0, 0)
    normalizers = {key: (float(n.mean), float(n.rmsd)) for key, n in trainer.normalizers.items()}
    assert normalizers == {"energy": (-0.75, 2.0), "forces": (0.0, 3.0)}
    assert_equal(average(trainer), {key: p.detach() for key, p in parameters(trainer).items() if p.requires_grad})
    trainer.train(disable_eval_tqdm=True)
    assert trainer.step == 2


# --- of the same kind -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_a_checkpoint_of_the_same_kind_just_resumes(name, finished, data, tmp_path):
    source, path = finished("dens", name)
    trainer = make_trainer(config_of(data, "hydra", name, denoising={**DENS, "restart": True}, epochs=2), tmp_path)
    trainer.load_checkpoint(str(path))
    assert_equal(weights(trainer), weights(source))
    assert_equal(optimizer_state(trainer), optimizer_state(source))
    assert_equal(average(trainer), average(source))
    assert (trainer.step, trainer.epoch) == (2, 1.0)
    assert trainer.scheduler.scheduler.state_dict() == source.scheduler.scheduler.state_dict()


def test_a_task_that_both_have_is_kept_and_a_new_one_starts_fresh(finished, data, tmp_path):
    source, path = finished("dens", "equiformer_v2")
    tasks = {"dens": {"prob": 0.5}, "noisy_nodes": {"prob": 0.5}}
    trainer = make_trainer(config_of(data, "hydra", "equiformer_v2", denoising=tasks, epochs=2), tmp_path)
    fresh = weights(trainer)
    trainer.load_checkpoint(str(path))
    kept, new = weights(source), {key for key in fresh if key.startswith("denoising.noisy_nodes.")}
    assert_equal({key: value for key, value in weights(trainer).items() if key not in new}, kept)
    assert_equal({key: weights(trainer)[key] for key in new}, {key: fresh[key] for key in new})
    assert_equal(host_part(optimizer_state(trainer)), host_part(optimizer_state(source)))
    shadow = average(trainer)
    assert_equal(host_part(shadow), host_part(average(source)))
    added = {key for key in shadow if key.startswith(ADDED)}
    assert_equal({k: shadow[k] for k in added}, {k: weights(trainer)[k] for k in added})


@pytest.mark.parametrize("kind", ["hydra", "dens"])
@pytest.mark.parametrize("file", ["best_checkpoint.pt", "no average"])
def test_a_moving_average_that_the_checkpoint_lacks_is_made_anew(kind, file, finished, data, tmp_path):
    _, path = finished(kind, "equiformer_v2")
    if file == "no average":
        stored = {**checkpoint.read(path), "ema": None}
        path = tmp_path / "stored.pt"
        torch.save(stored, path)
    else:
        path = path.parent / file
    trainer = make_trainer(config_of(data, "hydra", "equiformer_v2", epochs=2), tmp_path)
    trainer.load_checkpoint(str(path))
    assert_equal(average(trainer), {key: p.detach() for key, p in parameters(trainer).items() if p.requires_grad})
    trainer.train(disable_eval_tqdm=True)
    assert checkpoint.read(folder_of(trainer) / "checkpoint.pt")["ema"] is not None


@pytest.mark.parametrize("part", ["optimizer", "ema"])
def test_training_state_that_does_not_fit_its_weights_is_left_out_with_a_warning(
    part, finished, data, tmp_path, caplog
):
    source, path = finished("hydra", "equiformer_v2")
    stored = copy.deepcopy(checkpoint.read(path))
    values = stored["ema"]["shadow_params"] if part == "ema" else stored["optimizer"]["param_groups"][1]["params"]
    values.pop()
    trainer = make_trainer(config_of(data, "hydra", "equiformer_v2", epochs=2), tmp_path)
    trainer.load_checkpoint("given", stored)
    assert_equal(host_part(weights(trainer)), weights(source))
    if part == "ema":
        assert "moving average does not fit its weights" in caplog.text
        assert_equal(host_part(optimizer_state(trainer)), optimizer_state(source))
        assert_equal(average(trainer), {key: p.detach() for key, p in parameters(trainer).items() if p.requires_grad})
    else:
        assert "optimiser state does not fit its weights" in caplog.text
        assert not trainer.optimizer.state
        assert_equal(host_part(average(trainer)), average(source))


# --- back to the plain host -----------------------------------------------------------------------------------------


def exported(path, folder):
    torch.save(checkpoint.to_plain(checkpoint.read(path)), folder / "plain.pt")
    return folder / "plain.pt"


@pytest.mark.parametrize("decay", [0.001, 0.0], ids=["two groups", "one group"])
@pytest.mark.parametrize("name", BACKBONES)
def test_a_denoising_run_goes_on_without_tasks_and_in_the_plain_host(name, decay, finished, data, tmp_path):
    source, path = finished("dens", name, decay)
    config = config_of(data, "hydra", name, denoising={}, decay=decay, epochs=2)
    ours = make_trainer(config, tmp_path / "ours")
    host = make_trainer(config_of(data, "hydra", name, PLAIN, decay=decay, epochs=2), tmp_path / "host")
    own_groups = decayed(host)
    ours.load_checkpoint(str(path))
    host.load_checkpoint(str(exported(path, tmp_path)))
    stored = checkpoint.read(path)
    for trainer in (ours, host):
        assert_equal(weights(trainer), host_part(weights(source)))
        assert_equal(optimizer_state(trainer), host_part(optimizer_state(source)))
        assert all("exp_avg" in values for values in optimizer_state(trainer).values())
        assert_equal(average(trainer), host_part(average(source)))
        assert decayed(trainer) == own_groups
        assert (trainer.step, trainer.epoch, trainer.best_val_metric) == (2, 1.0, stored["best_val_metric"])
        if trainer is host:  # which is a step behind
            trainer.scheduler.step()
        assert trainer.scheduler.scheduler.state_dict() == source.scheduler.scheduler.state_dict()
        assert {g["lr"] for g in trainer.optimizer.param_groups} == {source.optimizer.param_groups[0]["lr"]}
        torch.manual_seed(5)
        trainer.train(disable_eval_tqdm=True)
        assert trainer.step == 4
    assert_equal(weights(ours), weights(host))
    assert_equal(average(ours), average(host))


def test_a_run_from_a_legacy_config_goes_on_in_the_plain_host_by_its_rule_of_decay(finished, data, tmp_path):
    start, _ = finished("hydra", "equiformer_v2")
    source = trained(config_of(data, "legacy", "equiformer_v2"), tmp_path / "source")
    host = make_trainer(config_of(data, "hydra", "equiformer_v2", PLAIN, epochs=2), tmp_path / "host")
    host.load_checkpoint(str(exported(folder_of(source) / "checkpoint.pt", tmp_path)))
    assert_equal(optimizer_state(host), host_part(optimizer_state(source)))
    assert_equal(average(host), host_part(average(source)))
    assert host_part(decayed(source)) != decayed(host)
    assert decayed(host) == decayed(start)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_host_fine_tunes_from_the_checkpoint(name, finished, data, tmp_path):
    source, path = finished("dens", name)
    config = config_of(data, "hydra", name, PLAIN)
    config["model"] = {
        "name": "hydra",
        "otf_graph": True,
        "pass_through_head_outputs": True,
        "finetune_config": {"starting_checkpoint": str(path)},
    }
    host = make_trainer(config, tmp_path)
    assert type(host.model) is HydraModel
    assert_equal(weights(host), host_part(weights(source)))
    host.train(disable_eval_tqdm=True)
    assert host.step == 2


def test_fine_tuning_a_plain_checkpoint_with_denoising(finished, data, tmp_path):
    source, path = finished("hydra", "equiformer_v2")
    config = config_of(data, "hydra", "equiformer_v2")
    config["model"] = {
        "name": "hydra",
        "pass_through_head_outputs": True,
        "finetune_config": {"starting_checkpoint": str(path)},
    }
    trainer = make_trainer(config, tmp_path)
    assert type(trainer.model) is DenoisingHydra
    assert_equal(host_part(weights(trainer)), weights(source))
    trainer.train(disable_eval_tqdm=True)
    assert trainer.step == 2


def test_an_exported_fine_tuned_model_needs_no_starting_checkpoint(finished, rows, data, tmp_path):
    """Fine-tuned twice over: the backbone is named in the first run's config, one setting of it in the second's."""
    _, path = finished("dens", "equiformer_v2")
    config = config_of(data, "hydra", "equiformer_v2")
    for step in ("first", "second"):
        start = tmp_path / f"start_of_{step}.pt"
        start.write_bytes(path.read_bytes())
        config["model"] = {
            "name": "hydra",
            "pass_through_head_outputs": True,
            "finetune_config": {"starting_checkpoint": str(start), "override": {"activation_checkpoint": True}},
        }
        if step == "first":
            config["model"]["heads"] = {"forces": {"module": "equiformer_v2_force_head"}}
            config["model"]["heads"]["energy"] = {"module": "equiformer_v2_energy_head", "reduce": "mean"}
            del config["model"]["finetune_config"]["override"]
        trainer = trained(config, tmp_path / step)
        path = folder_of(trainer) / "checkpoint.pt"
    plain_path = exported(path, tmp_path)
    for start in tmp_path.glob("start_of_*.pt"):
        start.unlink()
    plain = load_model_and_weights_from_checkpoint(str(plain_path))
    assert type(plain) is HydraModel
    assert plain.backbone.activation_checkpoint
    assert plain.output_heads["energy"].reduce == "mean"
    predictions = []
    for model in (trainer.model, plain):
        model.eval()
        torch.manual_seed(3)
        predictions.append(model(collate(rows[:3])))
    assert_equal(*predictions)


# --- wrapped for several processes --------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("kind", ["hydra", "legacy", "dens"])
def test_keys_may_carry_any_number_of_module_prefixes(kind, wrapped, finished, data, tmp_path):
    source, path = finished(kind, "equiformer_v2")
    stored = checkpoint.read(path)
    form = "legacy" if kind == "legacy" else "hydra"
    if wrapped:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        trainer = make_trainer(config_of(data, form, "equiformer_v2", epochs=2), tmp_path)
        for count in (0, 1, 2):
            with torch.no_grad():
                for p in trainer.model.parameters():
                    p.zero_()
            prefix = count * "module."
            prefixed = {**stored, "state_dict": {prefix + key: v for key, v in stored["state_dict"].items()}}
            trainer.load_checkpoint("given", prefixed)
            assert all(key.startswith("module.") == wrapped for key in trainer.model.state_dict())
            compare = own if kind == "dens" else host_part
            assert_equal(compare(weights(trainer)), weights(source, names_of(kind)))
            assert_equal(compare(optimizer_state(trainer)), optimizer_state(source, names_of(kind)))
            assert_equal(compare(average(trainer)), average(source, names_of(kind)))
    finally:
        distutils.cleanup()


@pytest.fixture
def fairchem(tmp_path):
    """Train by the host's command, which wraps the model even on one rank. Returns the last checkpoint."""

    def train(name, config, *arguments):
        fairchem_on(config, tmp_path / name, "--mode", "train", *arguments)
        return next((tmp_path / name).glob("checkpoints/*/checkpoint.pt"))

    return train


def test_from_command_line_to_command_line(data, tmp_path, fairchem):
    def config(*arguments, **options):
        config = config_of(data, "legacy", "equiformer_v2", *arguments, **options)
        # Constant, since a resumed run of the host's is a step of the schedule behind.
        config["optim"]["scheduler_params"].update(warmup_factor=1.0, lr_min_factor=1.0)
        return config

    def read(path, named=own):
        stored = checkpoint.read(path)
        assert all(key.startswith("module.") for key in stored["state_dict"])
        return stored, {named(key.removeprefix("module.")): value for key, value in stored["state_dict"].items()}

    path = str(fairchem("plain", config(PLAIN)))
    host, expected = read(fairchem("host", config(PLAIN, epochs=2), "--checkpoint", path), hydra_key)
    idle, values = read(fairchem("idle", config(denoising=IDLE, epochs=2), "--checkpoint", path))
    assert idle["step"] == host["step"] == 4
    assert_equal(host_part(values), expected)

    path = str(fairchem("dens", config(epochs=2), "--checkpoint", path))
    _, values = read(path)
    plain = config_of(data, "hydra", "equiformer_v2", PLAIN, epochs=3)
    back, back_values = read(fairchem("back", plain, "--checkpoint", str(exported(path, tmp_path))))
    assert back["step"] == 6
    assert set(back_values) == set(host_part(values))


# --- what is refused ------------------------------------------------------------------------------------------------


def spoilt(case, path, folder):
    file = folder / "spoilt.pt"
    if case == "text":
        file.write_text("trainer: forces")
    elif case == "empty":
        file.touch()
    elif case == "cut short":
        content = path.read_bytes()
        file.write_bytes(content[: len(content) // 2])
    elif case == "weights alone":
        torch.save(checkpoint.read(path)["state_dict"], file)
    elif case == "a tensor":
        torch.save(torch.zeros(3), file)
    return file


@pytest.mark.parametrize("case", ["text", "empty", "cut short", "weights alone", "a tensor"])
def test_a_file_that_is_no_checkpoint(case, finished, tmp_path):
    _, path = finished("hydra", "equiformer_v2")
    file = spoilt(case, path, tmp_path)
    with pytest.raises(ConfigError, match=r"not a (fairchem )?checkpoint") as error:
        checkpoint.read(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_layers": 3}, r"missing, such as backbone\.blocks\.2\."),
        ({"num_layers": 1}, r"not in the model, such as backbone\.blocks\.1\."),
        ({"ffn_hidden_channels": 16}, r"of another shape, such as backbone\."),
    ],
)
def test_a_checkpoint_of_another_model(change, said, finished, data, tmp_path):
    trainer = make_trainer(config_of(data, "hydra", "equiformer_v2", **change), tmp_path)
    for kind in ("hydra", "legacy", "dens"):
        _, path = finished(kind, "equiformer_v2")
        with pytest.raises(ConfigError, match=f"the checkpoint is of another model .* {said}"):
            trainer.load_checkpoint(str(path))


def test_a_checkpoint_that_is_not_there_or_does_not_fit(finished, data, tmp_path):
    trainer = make_trainer(config_of(data, "hydra", "equiformer_v2", decay=0.0), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        trainer.load_checkpoint(str(tmp_path / "none.pt"))
    with pytest.raises(ConfigError, match="another model"):
        trainer.load_checkpoint(str(finished("hydra", "escn")[1]))
    with pytest.raises(ConfigError, match=r"optim\.optimizer_params\.weight_decay: zero in one"):
        trainer.load_checkpoint(str(finished("hydra", "equiformer_v2")[1]))


# --- which parameters have weight decay ------------------------------------------------------------------------------


@pytest.fixture
def of_before(data, tmp_path, monkeypatch):
    """A run of eSCN with DeNS, and its checkpoint, from when the force encoding had weight decay there too."""
    spec = ESCNAdapter.encoding_spec.fget
    with monkeypatch.context() as patch:
        patch.setattr(ESCNAdapter, "encoding_spec", property(lambda adapter: {**spec(adapter), "weight_decay": True}))
        trainer = trained(config_of(data, "hydra", "escn"), tmp_path / "before")
    assert decayed(trainer)["denoising.dens.encoding.force_weight"]
    return trainer, folder_of(trainer) / "checkpoint.pt"


def test_a_run_goes_on_from_before_its_force_encoding_lost_weight_decay(of_before, data, tmp_path):
    """Each parameter keeps its own optimiser state, though the states are stored by position."""
    before, path = of_before
    trainer = make_trainer(config_of(data, "hydra", "escn", epochs=2), tmp_path)
    trainer.load_checkpoint(str(path))
    assert_equal(optimizer_state(trainer), optimizer_state(before))
    assert_equal(average(trainer), average(before))
    assert not decayed(trainer)["denoising.dens.encoding.force_weight"]
    changed = {name for name, value in decayed(trainer).items() if value != decayed(before)[name]}
    assert changed == {"denoising.dens.encoding.force_weight"}
    stored = checkpoint.read(path)["optimizer"]["param_groups"]
    for group, former in zip(trainer.optimizer.param_groups, stored, strict=True):
        scheduled = {"params", "lr"}  # the schedule's step after the checkpoint was written is made up for
        assert {k: v for k, v in group.items() if k not in scheduled} == {
            k: v for k, v in former.items() if k not in scheduled
        }
    trainer.train(disable_eval_tqdm=True)
    assert trainer.step == 4


def test_with_other_tasks_it_goes_on_too(of_before, data, tmp_path):
    before, path = of_before
    trainer = make_trainer(config_of(data, "hydra", "escn", denoising={"scd": {}}), tmp_path)
    trainer.load_checkpoint(str(path))
    state = host_part(optimizer_state(trainer))
    assert_equal(state, host_part(optimizer_state(before)))


def test_a_checkpoint_of_the_present_groups_is_loaded_as_it_is(finished):
    trainer, path = finished("dens", "escn")
    stored = checkpoint.read(path)
    assert checkpoint.regrouped(stored, trainer._unwrapped_model, trainer.optimizer) is stored
