"""Files of fairchem 2.x, given to a command where 1.x is installed, are named as such."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.support.command_line import fairchem_scd

CONFIGS = Path(__file__).parents[2] / "configs" / "fairchem2"
MEANT = ("for fairchem-core 2.x", "fairchem-core 1.10.0 is installed", "uv run --project hosts/fairchem2")


def said(*words) -> str:
    return " ".join(fairchem_scd(*words, code=1).output.split())


@pytest.mark.parametrize("name", ["quickstart.yml", "plain_sample.yaml", "scd_escn_md_omat.yaml"])
def test_configs(name, tmp_path):
    for output in (said("add", "scd", CONFIGS / name, tmp_path / name), said("check", CONFIGS / name, "--cpu")):
        assert all(part in output for part in MEANT), output


def test_a_folder_of_a_training_checkpoint(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "resume.yaml").write_text("job: {}\n")
    output = said("export", tmp_path / "final", tmp_path / "out.pt")
    assert all(part in output for part in MEANT), output


def test_an_inference_checkpoint(tmp_path, monkeypatch):
    names = ["fairchem.core.units", "fairchem.core.units.mlip_unit"]
    modules = {name: ModuleType(name) for name in names}
    with monkeypatch.context() as here:
        for name, module in modules.items():
            here.setitem(sys.modules, name, module)
        kind = type("MLIPInferenceCheckpoint", (), {"__module__": names[-1]})
        modules[names[-1]].MLIPInferenceCheckpoint = kind
        torch.save(kind(), tmp_path / "inference_ckpt.pt")
    output = said("export", tmp_path / "inference_ckpt.pt", tmp_path / "out.pt")
    assert all(part in output for part in MEANT), output
