"""docs/adding-a-backbone.md, followed word by word: its backbone, its adapter, and the claims about them."""

from __future__ import annotations

import inspect
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
import yaml
from fairchem.core.common.registry import registry
from torch import nn

from fairchem_scd.denoising import adapter as base
from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1.backbones import Adapter, adapter_for
from fairchem_scd.testing import make_trainer, training_config

PAGE = (Path(__file__).parents[2] / "docs" / "adding-a-backbone.md").read_text()
BACKBONE, ADAPTER, TESTS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def module(name: str, text: str) -> ModuleType:
    made = ModuleType(name)
    sys.modules[name] = made
    exec(compile(text, f"{name}.py", "exec"), vars(made))
    return made


toy = module("toy", BACKBONE + ADAPTER)
TestToy = module("test_toy", TESTS).TestToy


def test_an_adapter_is_short():
    assert len(ADAPTER.splitlines()) < 60


def test_the_config_of_the_page_trains(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    model = yaml.safe_load(text)["model"]
    config = {**training_config(tmp_path, {}, {"dens": {"prob": 0.5}, "scd": {}}), "model": model}
    trainer = make_trainer(config, tmp_path)
    trainer.train(disable_eval_tqdm=True)
    assert trainer.step == 2
    assert type(trainer._unwrapped_model.backbone) is toy.ToyBackbone


def test_an_adapter_that_an_installed_package_names_is_found(monkeypatch):
    class Foreign(nn.Module):
        """A backbone whose module knows of no adapter."""

    with pytest.raises(ConfigError, match=r"no adapter for .*Foreign.*docs/adding-a-backbone"):
        adapter_for(Foreign())
    module("foreign_adapter", "")  # imported late, as a package's would be

    def load(self):
        assert self.value == "foreign_adapter"

        @base.register_adapter
        class ForeignAdapter(Adapter):
            host_class, names = Foreign, ("Foreign",)

            def vector_head(self):
                return nn.Identity()

    found = [EntryPoint("foreign", "foreign_adapter", "fairchem_scd.adapters")]
    monkeypatch.setattr(base, "_ADAPTERS", dict(base._ADAPTERS))
    with mock.patch.object(base, "entry_points", return_value=found), mock.patch.object(EntryPoint, "load", load):
        assert adapter_for(Foreign()).names == ("Foreign",)


def test_an_adapter_without_the_rest_says_what_is_missing():
    class AtomSubset(Adapter):
        host_class, names = toy.ToyBackbone, ("part",)

        def vector_head(self):
            return nn.Identity()

    part = AtomSubset(toy.ToyBackbone())
    for missing in ("scalar_channels", "num_modulated"):
        with pytest.raises(ConfigError, match=missing):
            getattr(part, missing)
    with pytest.raises(ConfigError, match="vector features"):
        _ = part.encoding_spec


def test_every_member_that_the_page_names_exists():
    members = set(re.findall(r"`(\w+)`", PAGE.split("## The adapter")[1].split("## What must hold")[0]))
    names = {name for name, _ in inspect.getmembers(Adapter)} | set(Adapter.__annotations__)
    assert members & names >= {"check", "conservative", "readout", "set_drop_path", "legacy_heads", "hydra_heads"}
    assert registry.get_model_class("toy.ToyBackbone") is toy.ToyBackbone
    assert torch.nn.Module in toy.ToyBackbone.__mro__
