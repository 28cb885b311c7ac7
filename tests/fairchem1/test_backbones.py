"""The claims about every backbone of the host that has an adapter."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from fairchem.core.common.registry import registry
from fairchem.core.models.base import HydraModel
from fairchem.core.models.equiformer_v2.so3 import SO3_LinearV2
from fairchem.core.models.equiformer_v2.weight_initialization import eqv2_init_weights
from scipy.stats import ks_2samp

from fairchem_scd import ConfigError, DenoisingHydra
from fairchem_scd.denoising.conditions import ForceEncoding
from fairchem_scd.fairchem1.backbones import adapter_for, adapters
from fairchem_scd.fairchem1.backbones.equiformer_v2 import AtomDropPath
from fairchem_scd.fairchem1.legacy import hydra_key, to_hydra
from fairchem_scd.fairchem1.legacy_models import LEGACY_MODELS
from fairchem_scd.testing import SCD, BackboneClaims, collate, gradients
from tests.support import claims
from tests.support.models import hydra_arguments


class TestEquiformerV2(claims.EquiformerV2):
    pass


class TestESCN(claims.ESCN):
    pass


class TestDirectESEN(claims.DirectESEN):
    pass


class TestConservativeESEN(claims.ConservativeESEN):
    pass


class TestPaiNN(claims.PaiNN):
    pass


class TestGemNetT(claims.GemNetT):
    pass


class TestConservativeGemNetT(claims.ConservativeGemNetT):
    pass


class TestGemNetOC(claims.GemNetOC):
    pass


class TestConservativeGemNetOC(claims.ConservativeGemNetOC):
    pass


class TestDimeNetPlusPlus(claims.DimeNetPlusPlus):
    pass


@pytest.mark.parametrize("backbone", [claims.PaiNN, claims.ESCN, claims.GemNetOC])
def test_an_adapter_takes_nothing_out_of_a_plain_model(backbone):
    """Its checkpoint must have what the host's model has, with fewer heads than the backbone has output layers too."""
    model = HydraModel(**{**backbone().arguments(), "heads": {}})
    before = [*model.state_dict()]
    adapter = adapter_for(model.backbone)
    assert [*model.state_dict()] == before
    adapter.drop_legacy_outputs()
    assert len(model.state_dict()) < len(before)


def test_a_legacy_painn_is_its_hydra_bit_for_bit(rows):
    """Outputs and gradients, of the same weights."""
    arguments = {key: value for key, value in claims.PAINN.items() if key != "model"}
    torch.manual_seed(0)
    legacy = registry.get_model_class("painn")(**arguments).train()
    block, _ = to_hydra({"name": "painn", **arguments})
    converted = DenoisingHydra(denoising=SCD, **{key: value for key, value in block.items() if key != "name"}).train()
    state = {hydra_key(key): value for key, value in legacy.state_dict().items()}
    assert set(state) == {key for key in converted.state_dict() if not key.startswith("denoising.")}
    converted.load_state_dict(state, strict=False)
    batch = collate(rows[:3])
    expected, expected_gradients = gradients(legacy, batch)
    out, found = gradients(converted, batch)
    for key, value in expected.items():
        assert torch.equal(out[key].view(-1), value.view(-1)), key
    for key, value in expected_gradients.items():
        ours = found[hydra_key(key)]
        assert torch.equal(ours, value) if value is not None else ours is None, key  # scale factors are not trained


def test_painn_without_direct_forces_is_refused_with_the_reason():
    class Gradient(claims.PaiNN):
        backbone = {**claims.PAINN, "direct_forces": False}

    with pytest.raises(ConfigError, match="direct_forces"):
        Gradient().ours(SCD)


def test_schnet_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"schnet.*no hydra backbone"):
        to_hydra({"name": "schnet", "hidden_channels": 8})


# --- EquiformerV2's own ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_init", ["normal", "uniform"])
def test_the_force_encoding_starts_as_the_hosts_own_maps_from_one_channel_do(weight_init):
    """EquiformerV2's DeNS models encode forces by an SO3_LinearV2 and σ by a Linear, and initialise both so."""
    torch.manual_seed(0)
    channels = 4000
    block = {"weight_init": weight_init}
    model = DenoisingHydra(denoising={"dens": {}}, **hydra_arguments("equiformer_v2", **block))
    spec = {**model.adapter.encoding_spec, "channels": channels}
    ours = ForceEncoding(**spec, sigma=True)
    for weight, theirs in (
        (ours.force_weight, SO3_LinearV2(1, channels, lmax=2)),
        (ours.sigma_weight, torch.nn.Linear(1, channels)),
    ):
        eqv2_init_weights(theirs, weight_init)
        samples = weight.detach().flatten(), theirs.weight.detach().flatten()
        assert len(samples[0]) == len(samples[1])
        assert ks_2samp(*samples).pvalue > 1e-3
        others = torch.rand(len(samples[0])) * 2 - 1 if weight_init == "normal" else torch.randn(len(samples[0]))
        assert ks_2samp(samples[0], others).pvalue < 1e-9, "samples of this size tell the two apart"


def test_drop_path_per_atom_leaves_out_the_update_of_each_atom_on_its_own():
    """All degrees and channels of an atom together, as the host does it for whole structures."""
    torch.manual_seed(0)
    rate, natoms = 0.3, 3000
    batch, x = torch.zeros(natoms, dtype=torch.long), 1 + torch.rand(natoms, 9, 4)
    drop = AtomDropPath(rate)
    kept = drop(x, batch) / x
    assert torch.equal(kept.amin(dim=(1, 2)) > 0, kept.amax(dim=(1, 2)) > 0)
    of_atom = kept[:, 0, 0]
    assert abs(float((of_atom == 0).float().mean()) - rate) < 4 * (rate * (1 - rate) / natoms) ** 0.5
    torch.testing.assert_close(kept[of_atom > 0], torch.full_like(kept[of_atom > 0], 1 / (1 - rate)))
    assert torch.equal(drop.eval()(x, batch), x)


def test_the_readme_says_what_works_on_which_backbone():
    """A claim a cell: every adapter has its classes here, and DeNS is where forces can be told."""
    claimed = {}
    for name, each in globals().items():
        if name.startswith("Test") and issubclass(each, BackboneClaims):
            claimed.setdefault(each.backbone["model"], []).append(each())
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    table = readme.split("| backbone |")[1].split("\n\n")[0].splitlines()[2:]
    table = [line for line in table if "fairchem 2.x" not in line]
    rows = {re.search(r"`(\w+)`", line)[1]: [cell.strip() for cell in line.split("|")[1:-1]] for line in table}
    hosts = [cls for cls in adapters() if cls.host_class.__module__.startswith("fairchem.")]  # others register theirs
    assert set(rows) - {"schnet"} == {name for cls in hosts for name in cls.names}
    for name, (title, forces, *cells) in rows.items():
        if name == "schnet":
            assert "✓" not in "".join(cells)
            continue
        assert cells == ["✓" if claimed[name][0].conditions_on_forces() else "–", "✓", "✓", "✓"], title
        kinds = {"conservative" if each.ours(SCD).adapter.conservative else "direct" for each in claimed[name]}
        assert set(forces.split(", ")) == kinds, title
        legacy = {old for old, model in LEGACY_MODELS.items() if model.backbone == name and not old.endswith("_dens")}
        assert set(re.findall(r"`(\w+)`", title)) == {name, *legacy}
