"""What comes out of a run is plain: the host uses it where this package cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.fairchem2.support import (
    UMA,
    UNIT,
    database,
    differences,
    model_config,
    run,
    run_config,
    sample_data,
)

_USE = """
import json, sys
import numpy as np
import ase.db

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fairchem_scd":
            raise ImportError("blocked")

sys.meta_path.insert(0, Blocked())
from fairchem.core import FAIRChemCalculator
from fairchem.core.units.mlip_unit import load_predict_unit
from fairchem.core.units.mlip_unit.mlip_unit import initialize_finetuning_model
from ase.optimize import LBFGS

out = {}
for path in sys.argv[2:]:
    if path.endswith(":backbone"):
        made = initialize_finetuning_model(path.removesuffix(":backbone"), heads={"energy": {"module": "HEAD"}})
        out[path] = sorted(made.output_heads)
        continue
    # Neither compiled nor in double precision, which take longer.
    unit = load_predict_unit(path, device="cpu", inference_settings="traineval")
    calculator = FAIRChemCalculator(unit, task_name="mo")
    atoms = next(ase.db.connect(sys.argv[1]).select()).toatoms()
    atoms.calc = calculator
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    LBFGS(atoms, logfile=None).run(steps=2)
    out[path] = [energy, forces.tolist(), atoms.get_potential_energy()]
print("RESULT" + json.dumps(out))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sample_data(tmp_path_factory.mktemp("inference"))


def used_without_us(folder, *paths):
    """What a process in which this package cannot be imported makes of inference checkpoints."""
    code = _USE.replace("HEAD", f"{UMA}.escn_md.MLP_Energy_Head")
    command = [sys.executable, "-W", "ignore", "-c", code, str(database(folder, "val")), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "RESULT" in done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT")[1])


MODELS = {
    "direct": model_config(),
    "conservative with experts": model_config(direct=False, stress=True, experts=4),
}


def test_inference_checkpoints_are_those_of_plain_runs_and_the_host_uses_them_without_us(folder):
    paths = []
    for name, model in MODELS.items():
        steps = {"model": model, "steps": 2}
        plain = run(run_config(folder, **steps), f"plain {name}").inference()
        finished = run(run_config(folder, denoising={"scd": {"prob": 0.5}, "dens": {}}, **steps), name)
        found = finished.inference()
        assert differences(plain.model_config, found.model_config) == []
        assert differences(plain.tasks_config, found.tasks_config) == []
        for weights in ("model_state_dict", "ema_state_dict"):
            assert list(getattr(plain, weights)) == list(getattr(found, weights))
            shapes = [{k: v.shape for k, v in getattr(each, weights).items()} for each in (plain, found)]
            assert shapes[0] == shapes[1]
        assert any("denoising" in key for key in finished.state()["model"])
        assert not list(finished.checkpoint().glob("*.part"))
        paths.append(finished.checkpoint() / "inference_ckpt.pt")
    pretrained = run(
        run_config(folder, tasks=[], model=model_config(heads={}), denoising={"scd": {}}, steps=2), "pretrained"
    )
    assert pretrained.inference().model_config["heads"] == {}
    backbone = f"{pretrained.checkpoint() / 'inference_ckpt.pt'}:backbone"
    out = used_without_us(folder, *paths, backbone)
    assert out[backbone] == ["energy"]
    for path in paths:
        energy, forces, relaxed = out[str(path)]
        assert np.isfinite([energy, relaxed]).all()
        assert np.abs(forces).max() > 1e-3


def test_pre_training_is_fine_tuned_from_its_inference_checkpoint(folder):
    pretrained = run(
        run_config(folder, tasks=[], model=model_config(heads={}), denoising={"scd": {}}, steps=2), "start"
    )
    heads = model_config()["heads"]
    model = {
        "_target_": f"{UNIT}.initialize_finetuning_model",
        "checkpoint_location": str(pretrained.checkpoint() / "inference_ckpt.pt"),
        "heads": heads,
    }
    tuned = run(run_config(folder, model=model, denoising={"scd": {"prob": 0.5}}, steps=2), "tuned")
    start, first = pretrained.state()["model"], tuned.state("step_0")["model"]
    backbone = [key for key in start if key.startswith("backbone.")]
    assert backbone
    assert all(torch.equal(start[key], first[key]) for key in backbone)
    assert set(tuned.inference().model_config["heads"]) == set(heads)
