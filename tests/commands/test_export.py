"""`fairchem-scd export`: what fairchem loads without this package predicts what the training-side model does."""

from __future__ import annotations

import copy
import gc
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fairchem.core.common.relaxation.ase_utils import OCPCalculator
from fairchem.core.common.utils import load_model_and_weights_from_checkpoint
from fairchem.core.models.base import HydraModel

from fairchem_scd import ConfigError
from fairchem_scd.commands import main
from fairchem_scd.fairchem1 import checkpoint
from fairchem_scd.fairchem1.data.emt_slabs import emt_slabs
from fairchem_scd.testing import collate, make_trainer, slabs
from tests.support.claims import ESCN, EquiformerV2, PaiNN
from tests.support.command_line import fairchem_scd
from tests.support.configs import pretraining, tiny_config

RUNS = {
    "dens": ("equiformer_v2", {"dens": {"prob": 1.0}}),
    "scd": ("equiformer_v2", {"scd": {"prob": 1.0}}),
    "dens escn": ("escn", {"dens": {"prob": 1.0}}),
    "scd escn": ("escn", {"scd": {"prob": 1.0}}),
}
PRETRAINED = {"pre-training": "equiformer_v2", "pre-training escn": "escn"}

# What a user does where fairchem is installed and this package is not.
PLAIN_FAIRCHEM = """
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fairchem_scd":
            raise ImportError("this package is not here")

sys.meta_path.insert(0, Refused())

import numpy as np
import torch
from ase.io import read
from ase.optimize import BFGS
from fairchem.core.common.relaxation.ase_utils import OCPCalculator
from fairchem.core.common.relaxation.ase_utils import OCPCalculator
from fairchem.core.models.base import HydraModel

torch.set_num_threads(1)
folder, heads = sys.argv[1], {"escn": "escn", "equi": "equiformerV2"}
results = {}
for path in sys.argv[2:]:
    if "pre-training" in path:
        import fairchem.core.models.escn.escn, fairchem.core.models.equiformer_v2.heads
        name = "escn_force_head" if "escn" in path else "equiformerV2_vector_head"
        model = HydraModel(finetune_config={"starting_checkpoint": path}, heads={"forces": {"module": name}})
        # No head reads eSCN's energy_block here.
        used = (p for n, p in model.backbone.named_parameters() if "energy_block" not in n)
        results[path] = np.array([float(sum(p.double().sum() for p in used))])
        continue
    calculator = OCPCalculator(checkpoint_path=path, cpu=True)
    atoms = read(folder + "/atoms.traj")
    torch.manual_seed(3)
    calculator.calculate(atoms, ["energy", "forces"], [])
    results[path + "/energy"] = np.array(calculator.results["energy"])
    results[path + "/forces"] = calculator.results["forces"]
    atoms.calc = calculator
    start = atoms.get_positions()
    BFGS(atoms, logfile=None).run(fmax=1e-6, steps=3)
    results[path + "/moved"] = np.abs(atoms.get_positions() - start).max(axis=1)
assert "fairchem_scd" not in sys.modules
np.savez(folder + "/plain.npz", **results)
"""


def trained(config, folder):
    trainer = make_trainer(config, folder)
    torch.manual_seed(5)
    trainer.train(disable_eval_tqdm=True)
    return trainer, Path(trainer.config["cmd"]["checkpoint_dir"])


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Finished runs: their trainers, and the folders of their checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    made = {name: trained(tiny_config(data, *of), folder / name) for name, of in RUNS.items()}
    return made | {name: trained(pretraining(data, of), folder / name) for name, of in PRETRAINED.items()}


@pytest.fixture(scope="module")
def atoms():
    return next(iter(emt_slabs(1, 3, 6)))[0]  # what slabs(1, seed=3) holds


def predicted(trainer, state, batch):
    """The training-side model's denormalised outputs under some weights."""
    model = copy.deepcopy(trainer._unwrapped_model).eval()
    model.load_state_dict(state, strict=False)
    torch.manual_seed(3)
    out = model(batch)
    return {key: trainer._denorm_preds(key, out[key].detach(), batch).numpy() for key in ("energy", "forces")}


def averaged(trainer):
    names = [name for name, p in trainer._unwrapped_model.named_parameters() if p.requires_grad]
    return dict(zip(names, trainer.ema.shadow_params, strict=True))


def test_exports_predict_the_same_where_this_package_is_not_installed(runs, atoms, tmp_path):
    """Energies and forces, and a relaxation; of pre-training, a backbone to fine-tune from."""
    atoms.write(tmp_path / "atoms.traj")
    exported = {}
    for name, (_, folder) in runs.items():
        flags = ["--backbone-only"] if name in PRETRAINED else []
        for weights in ("ema", "raw") if name in ("scd", "pre-training") else ("ema",):
            exported[name, weights] = str(tmp_path / f"{name} {weights}.pt")
            fairchem_scd("export", folder / "checkpoint.pt", exported[name, weights], "--weights", weights, *flags)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLAIN_FAIRCHEM, str(tmp_path), *exported.values()],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(tmp_path / "plain.npz") as file:
        plain = dict(file)
    batch = collate(slabs(1, seed=3))
    for (name, weights), path in exported.items():
        trainer, _ = runs[name]
        state = averaged(trainer) if weights == "ema" else trainer._unwrapped_model.state_dict()
        if name in PRETRAINED:
            total = sum(
                float(state.get(key, p).double().sum())
                for key, p in trainer._unwrapped_model.named_parameters()
                if key.startswith("backbone.")
            )
            assert plain[path][0] == pytest.approx(total, rel=1e-9)
            continue
        expected = predicted(trainer, state, batch)
        for key in ("energy", "forces"):
            scale = np.abs(expected[key]).max()
            assert np.abs(plain[f"{path}/{key}"].reshape(expected[key].shape) - expected[key]).max() < 1e-6 * scale
        moved, fixed = plain[f"{path}/moved"], batch.fixed.numpy() != 0
        assert (moved[fixed] == 0).all()
        assert (moved[~fixed] > 0).all()
    # The two kinds of weights do differ.
    assert plain[exported["scd", "ema"] + "/energy"] != plain[exported["scd", "raw"] + "/energy"]


def test_by_default_the_moving_average_is_exported_where_there_is_one(runs, data, tmp_path):
    trainer, folder = runs["dens"]
    fairchem_scd("export", folder / "checkpoint.pt", tmp_path / "default.pt")
    state = checkpoint.read(tmp_path / "default.pt")["state_dict"]
    for key, value in averaged(trainer).items():
        if not key.startswith(checkpoint.ADDED):
            assert torch.equal(state[key], value), key
    config = tiny_config(data, optim={"ema_decay": None})
    trainer, folder = trained(config, tmp_path / "without")
    fairchem_scd("export", folder / "checkpoint.pt", tmp_path / "raw.pt")
    state = checkpoint.read(tmp_path / "raw.pt")["state_dict"]
    raw = trainer._unwrapped_model.state_dict()
    assert all(torch.equal(raw[key], value) for key, value in state.items())
    assert (
        "no moving average"
        in fairchem_scd("export", folder / "checkpoint.pt", tmp_path / "x.pt", "--weights", "ema", code=1).output
    )


@pytest.mark.parametrize("name", ["dens", "dens escn"])
def test_the_calculator_takes_the_raw_weights_of_a_checkpoint_and_the_average_of_the_best(name, runs, atoms, tmp_path):
    """Of unexported ones, as docs/checkpoints.md says; and of an export what was exported."""
    trainer, folder = runs[name]
    fairchem_scd("export", folder / "checkpoint.pt", tmp_path / "plain.pt")
    batch = collate(slabs(1, seed=3))
    raw, average = (
        predicted(trainer, state, batch) for state in (trainer._unwrapped_model.state_dict(), averaged(trainer))
    )
    assert raw["energy"] != average["energy"]
    for path, expected in (
        (folder / "checkpoint.pt", raw),
        (folder / "best_checkpoint.pt", average),
        (tmp_path / "plain.pt", average),
    ):
        calculator = OCPCalculator(checkpoint_path=str(path), cpu=True)
        torch.manual_seed(3)
        calculator.calculate(atoms, ["energy", "forces"], [])
        assert not calculator.trainer.model.training
        assert calculator.results["energy"] == pytest.approx(expected["energy"].item(), rel=1e-6)
        slack = 1e-6 * np.abs(expected["forces"]).max()
        assert np.abs(calculator.results["forces"] - expected["forces"]).max() <= slack


def test_the_best_checkpoint_holds_the_average_alone(runs, tmp_path):
    _, folder = runs["dens"]
    fairchem_scd("export", folder / "best_checkpoint.pt", tmp_path / "best.pt")
    fairchem_scd("export", folder / "best_checkpoint.pt", tmp_path / "ema.pt", "--weights", "ema")
    best, ema = (checkpoint.read(tmp_path / name)["state_dict"] for name in ("best.pt", "ema.pt"))
    assert all(torch.equal(best[key], ema[key]) for key in best)
    message = fairchem_scd(
        "export", folder / "best_checkpoint.pt", tmp_path / "raw.pt", "--weights", "raw", code=1
    ).output
    assert "moving average alone" in message
    assert not (tmp_path / "raw.pt").exists()


def test_an_export_has_the_normalisers_and_none_of_the_training_state(runs, tmp_path):
    _, folder = runs["scd"]
    fairchem_scd("export", folder / "checkpoint.pt", tmp_path / "plain.pt")
    source, plain = checkpoint.read(folder / "checkpoint.pt"), checkpoint.read(tmp_path / "plain.pt")
    assert plain["normalizers"].keys() == source["normalizers"].keys() == {"energy", "forces"}
    assert plain["config"]["model"]["name"] == "hydra"
    assert plain["config"]["task"] == {}
    assert not {"optimizer", "ema", "step", "scheduler"} & set(plain)
    keys = HydraModel(**{k: v for k, v in plain["config"]["model"].items() if k != "name"}).state_dict().keys()
    assert list(plain["state_dict"]) == list(keys)


def test_training_state_is_kept_when_asked_for(runs, tmp_path):
    trainer, folder = runs["dens"]
    fairchem_scd("export", folder / "checkpoint.pt", tmp_path / "plain.pt", "--training-state")
    plain = checkpoint.read(tmp_path / "plain.pt")
    assert plain["step"] == trainer.step
    assert plain["optimizer"]["state"]
    assert len(plain["ema"]["shadow_params"]) < len(trainer.ema.shadow_params)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"null_condition": "mask_token"}, "mask_token.*computes something else"), (None, "no heads.*--backbone-only")],
)
def test_what_the_plain_model_cannot_compute_is_refused(settings, said, runs, data, tmp_path):
    if settings is None:
        _, folder = runs["pre-training"]
    else:
        _, folder = trained(tiny_config(data, denoising={"scd": settings}), tmp_path / "run")
    message = fairchem_scd("export", folder / "checkpoint.pt", tmp_path / "plain.pt", code=1).output
    assert re.search(said, message, re.S), message
    assert not (tmp_path / "plain.pt").exists()


def test_bad_files_end_in_one_line_and_write_nothing(runs, tmp_path, monkeypatch):
    _, folder = runs["dens"]
    good = folder / "checkpoint.pt"
    whole = good.read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    fairchem_scd("export", good, tmp_path / "plain.pt")
    plain = (tmp_path / "plain.pt").read_bytes()
    (tmp_path / "closed").mkdir()
    cases = {
        ("cut.pt", "out.pt"): "not a checkpoint, or cut short",
        ("text.pt", "out.pt"): "not a checkpoint",
        ("other.pt", "out.pt"): "no 'state_dict'",
        ("missing.pt", "out.pt"): "checkpoint file not found",
        ("plain.pt", "out.pt"): "fairchem loads it as it is",
        (good, "plain.pt"): "exists already; --force",
        (good, "nowhere/out.pt"): "there is no folder",
        (good, "closed"): "is a folder",
    }
    for (source, out), said in cases.items():
        message = fairchem_scd("export", tmp_path / source, tmp_path / out, code=1).output
        assert said in message
        assert message.count("Error: ") == 1
    assert (tmp_path / "plain.pt").read_bytes() == plain

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save", full)
    message = fairchem_scd("export", good, tmp_path / "plain.pt", "--force", code=1).output
    assert "No space left on device" in message
    assert (tmp_path / "plain.pt").read_bytes() == plain
    assert {path.name for path in tmp_path.iterdir()} == {"cut.pt", "text.pt", "other.pt", "plain.pt", "closed"}


@pytest.mark.parametrize(("key", "same"), [("max_neighbors", True), ("max_radius", False), ("cutoff", False)])
def test_overrides_of_fine_tuning_are_exported_where_an_argument_means_the_same(key, same, runs, data, rows, tmp_path):
    """The host sets them on the finished backbone, where some do something else than the argument of that name."""
    _, folder = runs["dens"]
    start = tmp_path / "start.pt"
    start.write_bytes((folder / "best_checkpoint.pt").read_bytes())
    config = tiny_config(data)
    tuning = {"starting_checkpoint": str(start), "override": {key: 5 if key == "max_neighbors" else 3.0}}
    config["model"] = {"name": "hydra", "otf_graph": True, "pass_through_head_outputs": True, "finetune_config": tuning}
    trainer, folder = trained(config, tmp_path / "run")
    path = folder / "checkpoint.pt"
    outputs = [trainer._unwrapped_model]
    stored = checkpoint.read(path)
    outputs.append(checkpoint.build(stored))  # which embed uses
    outputs[1].load_state_dict(checkpoint.inference_weights(stored, "raw"))
    if same:
        fairchem_scd("export", path, tmp_path / "plain.pt", "--weights", "raw")
        outputs.append(load_model_and_weights_from_checkpoint(str(tmp_path / "plain.pt")))
    else:
        message = fairchem_scd("export", path, tmp_path / "plain.pt", code=1).output
        assert f"model.finetune_config.override: {key}" in message
    energies = []
    for model in outputs:
        model.eval()
        torch.manual_seed(3)
        energies.append(model(collate(rows[:2]))["energy"])
    assert all(torch.equal(energy, energies[0]) for energy in energies)
    start.unlink()
    assert "fine-tuned from" in fairchem_scd("export", path, tmp_path / "gone.pt", code=1).output


@pytest.mark.parametrize(("backbone", "left_out"), [(EquiformerV2, None), (PaiNN, "forces"), (ESCN, "energy")])
def test_a_run_without_a_task_that_was_fine_tuned_is_exported_whole(backbone, left_out, data, rows, tmp_path):
    """Its own checkpoint cannot be loaded without the one that it started from, which is this package's.

    Where a head is left out, what it would take out of the backbone is not in the starting checkpoint.
    """
    model, before = {"name": "hydra", "otf_graph": True, **backbone().arguments()}, pretraining(data)
    before["model"] = {key: value for key, value in model.items() if key != "heads"}
    _, folder = trained(before, tmp_path / "before")
    start = folder / "checkpoint.pt"
    config = tiny_config(data, denoising={"quiet_heads": left_out != "energy"})
    config["model"] = {**model, "backbone": None, "finetune_config": {"starting_checkpoint": str(start)}}
    if left_out is not None:
        kept = {"energy": "forces", "forces": "energy"}[left_out]
        del config["model"]["heads"][left_out], config["outputs"][left_out]
        config["loss_functions"] = [{kept: {"fn": "mae", "coefficient": 1}}]
        config["evaluation_metrics"] = {"primary_metric": f"{kept}_mae", "metrics": {kept: ["mae"]}}
    trainer, folder = trained(config, tmp_path / "run")
    assert checkpoint.read(folder / "checkpoint.pt")["config"]["model"]["name"] == "hydra"
    fairchem_scd("export", folder / "checkpoint.pt", tmp_path / "plain.pt", "--weights", "raw")
    start.unlink()
    outputs = []
    for model in (trainer._unwrapped_model, load_model_and_weights_from_checkpoint(str(tmp_path / "plain.pt"))):
        torch.manual_seed(3)
        outputs.append(model.eval()(collate(rows[:2])))
    assert all(torch.equal(value, outputs[1][key]) for key, value in outputs[0].items())


def test_an_export_says_which_weights_it_holds(runs, tmp_path):
    _, folder = runs["dens"]
    for weights, other in (("raw", "ema"), ("ema", "raw")):
        fairchem_scd("export", folder / "checkpoint.pt", tmp_path / f"{weights}.pt", "--weights", weights)
        stored = checkpoint.read(tmp_path / f"{weights}.pt")
        assert checkpoint.inference_weights(stored, weights)
        with pytest.raises(ConfigError, match=f"--weights {other}"):
            checkpoint.inference_weights(stored, other)


@pytest.mark.parametrize("flags", [[], ["--weights", "raw"], ["--training-state"]])
@pytest.mark.parametrize("damage", ["missing", "shape", "argument", "config", "weights"])
def test_damaged_checkpoints_end_in_one_line(damage, flags, runs, tmp_path):
    _, folder = runs["dens"]
    stored = checkpoint.read(folder / "checkpoint.pt")
    key = "backbone.sphere_embedding.weight"
    if damage == "missing":
        del stored["state_dict"][key]
    elif damage == "shape":
        stored["state_dict"][key] = stored["state_dict"][key][:3]
    elif damage == "argument":
        stored["config"]["model"]["backbone"]["colour"] = "red"
    elif damage == "config":
        stored["config"] = None
    else:
        stored["state_dict"] = list(stored["state_dict"])
    torch.save(stored, tmp_path / "damaged.pt")
    message = fairchem_scd("export", tmp_path / "damaged.pt", tmp_path / "out.pt", *flags, code=1).output
    assert message.count("Error: ") == 1
    assert not (tmp_path / "out.pt").exists()


def test_what_would_do_nothing_is_refused(runs, tmp_path):
    _, folder = runs["dens"]
    message = fairchem_scd(
        "export", folder / "best_checkpoint.pt", tmp_path / "out.pt", "--training-state", code=2
    ).output
    assert "checkpoint.pt of the same run has it" in message
    same = folder / "best_checkpoint.pt"
    before = same.read_bytes()
    assert "OUT is CHECKPOINT itself" in fairchem_scd("export", same, same, "--force", code=2).output
    assert same.read_bytes() == before


def test_a_full_disk_ends_in_one_line(runs, tmp_path, tmp_path_factory):
    """A limit on the size of files stands in for it, which libraries meet deep in their own code."""
    _, folder = runs["dens"]
    said = tmp_path_factory.mktemp("said") / "stderr"
    child = os.fork()
    if child == 0:  # limits are for a process, and starting another Python takes long
        gc.freeze()
        code = 2
        try:
            sys.stderr = said.open("w")
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            main(["export", str(folder / "checkpoint.pt"), str(tmp_path / "out.pt")])
        except SystemExit as stopped:
            code = stopped.code
        finally:
            sys.stderr.flush()
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert "could not be written" in said.read_text()
    assert "Traceback" not in said.read_text()
    assert not list(tmp_path.iterdir())


def test_help_and_version_do_not_wait_for_the_host():
    code = (
        "import sys; from fairchem_scd.commands import main; "
        "[main(words, standalone_mode=False) for words in (['--help'], ['export', '--help'])]; "
        "assert not {'torch', 'fairchem'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
