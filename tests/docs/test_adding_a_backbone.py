"""docs/adding-a-backbone.md, followed word by word: its backbone, its adapter, and the claims about them."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
import yaml
from fairchem.core.common.registry import registry
from torch import nn

from fairchem_scd import DenoisingHydra
from fairchem_scd.denoising import adapter as base
from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1.backbones import Fairchem1Adapter, adapter_for
from fairchem_scd.fairchem1.legacy import hydra_key, to_hydra
from fairchem_scd.fairchem1.legacy_models import LEGACY_MODELS
from fairchem_scd.testing import gradients, make_trainer, plan_of, stirred, training_config

PAGE = (Path(__file__).parents[2] / "docs" / "adding-a-backbone.md").read_text()
FORMER_ADAPTER = (Path(__file__).parents[1] / "data" / "former_toy_adapter.py").read_text()
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
        class ForeignAdapter(Fairchem1Adapter):
            host_class, names = Foreign, ("Foreign",)

            def vector_head(self):
                return nn.Identity()

    found = [EntryPoint("foreign", "foreign_adapter", "fairchem_scd.adapters")]
    monkeypatch.setattr(base, "_ADAPTERS", dict(base._ADAPTERS))
    with mock.patch.object(base, "entry_points", return_value=found), mock.patch.object(EntryPoint, "load", load):
        assert adapter_for(Foreign()).names == ("Foreign",)


def test_an_adapter_without_the_rest_says_what_is_missing():
    class VectorsOnly(Fairchem1Adapter):
        host_class, names = toy.ToyBackbone, ("vectors only",)

        def vector_head(self):
            return nn.Identity()

    adapter = VectorsOnly(toy.ToyBackbone())
    for asked in ("scalar_channels", "blocks", "num_modulated"):
        with pytest.raises(ConfigError, match=r"it needs scalar_channels, .* blocks and modulated"):
            getattr(adapter, asked)
    with pytest.raises(ConfigError, match="vector features"):
        _ = adapter.encoding_spec


def test_every_member_that_the_page_names_exists():
    text = re.sub(r"```.*?```", "", PAGE.split("## The adapter")[1].split("## What must hold")[0], flags=re.DOTALL)
    members = set(re.findall(r"`(\w+)`", text))
    names = {name for name, _ in inspect.getmembers(Fairchem1Adapter)}
    hooks = {"changed_inputs", "changed_output"}
    assert members - names - hooks == {"Adapter", "EdgeVectorHead", "Fairchem1Adapter", "forward"}
    assert members & names >= {"check", "conservative", "readout", "set_drop_path", "recomputed", "state_of_pass"}
    assert registry.get_model_class("toy.ToyBackbone") is toy.ToyBackbone


# --- adapters that follow an earlier version of the page --------------------------------------------------------------


@pytest.fixture
def former(monkeypatch) -> Iterator[ModuleType]:
    """The adapter that the page once had, in place of its present one. After the test all is as before."""
    for name in [name for name in sys.modules if name.startswith("fairchem_scd.backbones")]:
        monkeypatch.delitem(sys.modules, name)  # a module warns when it is first imported
    with mock.patch.dict(base._ADAPTERS), mock.patch.dict(LEGACY_MODELS):
        with pytest.warns(DeprecationWarning, match="fairchem_scd.backbones is now fairchem_scd.fairchem1.backbones"):
            made = module("former_toy", FORMER_ADAPTER)
        yield made


@pytest.mark.parametrize("block", [{"scd": {}}, {"dens": {"prob": 1.0}}], ids=["scd", "dens"])
def test_a_former_adapter_computes_what_the_pages_does(block, former):
    batch, results = TestToy().batch(), []
    for adapter in (toy.ToyAdapter, former.ToyAdapter):
        base.register_adapter(adapter)
        torch.manual_seed(0)
        model = stirred(DenoisingHydra(denoising=block, **TestToy().arguments())).train()
        assert type(model.adapter) is adapter
        results.append(gradients(model, batch, plan_of(batch, block, step=1)[0]))
    (expected, expected_gradients), (out, found) = results
    assert all(torch.equal(out[key], value) for key, value in expected.items())
    assert all(torch.equal(found[key], value) for key, value in expected_gradients.items())


def test_former_names_of_members_still_count(former):
    from fairchem_scd.backbones import register_adapter

    entered = []

    class Legacy(former.ToyAdapter):
        one_piece = {"old_toy": {"energy": {"module": "toy.ToyEnergy"}}}
        moved = {"readout": "energy"}
        dropped = {"extra": 0}
        lone_structures = False

        @classmethod
        def twin_heads(cls, name, arguments):
            return {**super().twin_heads(name, arguments), "forces": {"module": "toy.ToyForces"}}

        def energy_free(self):
            entered.append(self)
            return super().energy_free()

        @classmethod
        def cannot_tell_forces(cls):
            return ConfigError("no")

    with pytest.warns(DeprecationWarning, match="Legacy.energy_free is now skip_energy_readout"):
        register_adapter(Legacy)
    adapter = adapter_for(toy.ToyBackbone())
    with adapter.skip_energy_readout():
        assert entered == [adapter]
    assert not adapter.runs_lone_structures
    assert str(adapter.cannot_condition_on_forces()) == "no"
    block, _ = to_hydra({"name": "old_toy", "channels": 4, "extra": 0})
    assert block["backbone"] == {"model": "toy.ToyBackbone", "channels": 4, "otf_graph": True}
    assert set(block["heads"]) == {"energy", "forces"}
    assert hydra_key("readout.weight") == "output_heads.energy.readout.weight"
    with pytest.raises(ConfigError, match=r"model\.extra: 'old_toy'"):
        to_hydra({"name": "old_toy", "extra": 1})


def test_former_names_in_an_adapter_that_cannot_have_them_are_refused(former):
    from fairchem_scd.backbones import register_adapter

    class Mixed(Fairchem1Adapter):
        host_class, names = toy.ToyBackbone, ("mixed",)
        one_piece = {"old_toy": {}}

    with pytest.raises(TypeError, match=r"Mixed\.one_piece.*LEGACY_MODELS"):
        register_adapter(Mixed)
