"""eSEN: the host's own DeNS of it, forces that are a gradient, activation checkpointing, and its trainer."""

from __future__ import annotations

import copy

import pytest
import torch
from fairchem.core.common.relaxation.ase_utils import OCPCalculator
from fairchem.core.models.base import HydraModel
from fairchem.core.models.esen.trainers.trainer import MLIPTrainer
from torch import nn

from fairchem_scd import ConfigError, DenoisingHydra
from fairchem_scd.denoising.plan import NOISE, Pass, Plan
from fairchem_scd.fairchem1 import checkpoint
from fairchem_scd.fairchem1.data.emt_slabs import emt_slabs
from fairchem_scd.fairchem1.legacy import to_hydra
from fairchem_scd.testing import (
    collate,
    make_trainer,
    plan_of,
    run,
    self_supervised,
    stirred,
    training_config,
)
from tests.support.models import ESEN, ESEN_GRADIENT_HEAD, ESEN_HEADS, ESEN_SMOOTH
from tests.support.runs import assert_same, folder_of, state_of, stopped_at

DENS, SCD = {"dens": {"prob": 1.0}}, {"scd": {}}
KINDS = {"direct": (ESEN, ESEN_HEADS), "conservative": (ESEN_SMOOTH, ESEN_GRADIENT_HEAD)}


def arguments(kind, **backbone):
    chosen, heads = KINDS[kind]
    return {
        "backbone": {**chosen, **backbone},
        "heads": copy.deepcopy(heads),
        "pass_through_head_outputs": True,
    }


def model_of(kind, block, **backbone):
    torch.manual_seed(0)
    return stirred(DenoisingHydra(denoising=block, **arguments(kind, **backbone))).train()


# --- DeNS -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_dens_pass_is_that_of_the_hosts_own_dens_model(kind, rows):
    """Same weights, same corrupted structures, same forces told: bit for bit.

    But for energy and forces of the host's conservative one, which are zero there.
    """
    ours, batch = model_of(kind, DENS), collate(rows[:3])
    theirs = arguments(kind)
    theirs["backbone"]["model"] += "_dens"
    for head in theirs["heads"].values():
        head["module"] += "_dens" if head["module"] != "esen_mlp_energy_head" else ""
    theirs = HydraModel(**theirs).train()
    state = theirs.state_dict()
    name = "both" if kind == "conservative" else "forces"
    for key, value in ours.state_dict().items():
        key = key.replace("denoising.dens.noise_head.linear", f"output_heads.{name}.denoising_linear")
        if key == "denoising.dens.encoding.force_weight":
            state["backbone.force_embedding.weight"] = value[:, :, None]
        else:
            assert key in state, key
            state[key] = value
    state["backbone.force_embedding.bias"].zero_()
    theirs.load_state_dict(state)
    plan, corruption = plan_of(batch, DENS, step=1)
    assert 0 < int(corruption.mask.sum()) < len(corruption.mask)
    conditioned = copy.deepcopy(batch)
    conditioned.pos = batch.pos + corruption.noise
    conditioned.denoising_pos_forward, conditioned.noise_mask = True, corruption.mask
    out, expected = run(ours, batch, plan), run(theirs, conditioned)
    mask = corruption.mask
    assert torch.equal(out[NOISE][mask], expected["forces"][mask])
    if kind == "direct":
        assert torch.equal(out["energy"], expected["energy"])
        assert torch.equal(out["forces"][~mask], expected["forces"][~mask])
    else:
        assert not expected["energy"].any()
        assert out["forces"][~mask].abs().min(dim=0).values.all()


def test_forces_of_a_conservative_dens_pass_are_the_gradient_of_its_energy(rows):
    """Of the energy of the structure that was told its forces, by central differences."""
    model, batch = model_of("conservative", DENS).eval(), collate(rows[:2])
    plan, _ = plan_of(batch, DENS, step=1)
    (only,) = plan.passes
    direction = torch.randn(only.pos.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        moved = [Pass(only.pos + step * direction, encoding=only.encoding) for step in (1e-3, -1e-3)]
        energies = [run(model, batch, Plan("dens", (one,)))["energy"].double().sum() for one in moved]
        forces = run(model, batch, plan)["forces"]
    expected = (energies[0] - energies[1]) / 2e-3
    assert abs(float((-forces * direction).sum() / expected) - 1) < 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_the_hosts_dens_config_becomes_the_plain_model_with_its_settings(kind):
    block = {"name": "hydra", **arguments(kind)}
    theirs = copy.deepcopy(block)
    theirs["backbone"]["model"] += "_dens"
    for head in theirs["heads"].values():
        head["module"] += "_dens" if head["module"] != "esen_mlp_energy_head" else ""
    assert to_hydra(theirs) == to_hydra(block)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"regress_stress": True}, {"act_type": "s2", "mlp_type": "grid"}])
def test_a_loss_on_gradient_forces_beside_scd_has_the_right_gradient(options, rows):
    """Second derivatives of the energy, by central differences along a random direction of all weights."""
    model, batch = model_of("conservative", SCD, **options), collate(rows[:2])
    with torch.no_grad():
        for block in model.denoising["scd"]["modulation"].blocks:
            block.mlp[0].weight[:, model.adapter.scalar_channels :] = 0  # sg(x̂) has a slope, but by design no gradient
    plan, _ = plan_of(batch, SCD)
    weights = list(model.parameters())
    generator = torch.Generator().manual_seed(2)
    direction = [p.detach() * torch.randn(p.shape, generator=generator) for p in weights]

    def loss():
        out = run(model, batch, plan)
        terms = [10 * (out["forces"] - batch.forces).norm(dim=1).mean(), out["energy"].square().mean()]
        terms += [3 * out[NOISE].square().mean(), 1e4 * out.get("stress", torch.zeros(1)).square().sum()]
        return sum(terms)

    found = torch.autograd.grad(loss(), weights, allow_unused=True)
    slope = sum((g * d).sum() for g, d in zip(found, direction, strict=True) if g is not None)
    values = []
    for step in (1e-3, -2e-3):
        with torch.no_grad():
            torch._foreach_add_(weights, direction, alpha=step)
        values.append(loss().detach().double())
    assert abs(float((values[0] - values[1]) / 2e-3 / slope) - 1) < 1e-3


def test_stress_of_a_conservative_model_is_the_hosts(rows):
    """In an ordinary step, and from the clean pass of an SCD step, which leaves the batch as it was."""
    model, batch = model_of("conservative", SCD, regress_stress=True), collate(rows[:2])
    plain = HydraModel(**arguments("conservative", regress_stress=True)).train()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("denoising.")})
    plan, _ = plan_of(batch, SCD)
    expected = run(plain, batch)
    assert expected["stress"].any()
    for out in (run(model, batch), run(model, batch, plan)):
        assert all(torch.equal(out[key], value) for key, value in expected.items())
    modulation = copy.deepcopy(batch)
    model(modulation, plan)
    assert torch.equal(modulation.pos, batch.pos)
    assert torch.equal(modulation.cell, batch.cell)
    assert not modulation.pos.requires_grad


def test_passes_without_outputs_keep_nothing_to_differentiate(rows):
    """Validation of pre-training, and embedding, as trainers and the command run them."""
    model, batch = model_of("conservative", SCD).eval(), collate(rows[:2])
    plan, _ = plan_of(batch, SCD, supervised=False)
    with torch.no_grad():
        assert not run(model, batch, plan)[NOISE].requires_grad
        assert not model.embed(copy.deepcopy(batch)).requires_grad
    assert model.backbone.regress_forces


def test_a_condition_in_every_pass_and_forces_from_the_energy_exclude_each_other():
    """What a block is told counts as constant in the gradient, which would not be the energy's."""
    token = {"scd": {"null_condition": "mask_token"}}
    with pytest.raises(ConfigError, match=r"null_condition: mask_token.*gradient"):
        DenoisingHydra(denoising=token, **arguments("conservative"))
    DenoisingHydra(denoising=token, **arguments("direct"))


# --- training ---------------------------------------------------------------------------------------------------------


def config_of(data, kind="conservative", denoising=SCD, **optim):
    """eSEN's trainer: two epochs of four steps, a checkpoint every step and validation every third."""
    config = training_config(data, arguments(kind, lmax=1, mmax=1, num_layers=1), denoising)
    config["trainer"] = "fairchem_scd.MLIPDenoisingTrainer"
    config["optim"].update(batch_size=2, max_epochs=2, checkpoint_every=1, eval_every=3, **optim)
    return config


def test_stopping_and_resuming_is_never_having_stopped(data, tmp_path):
    block = {"dens": {"prob": 0.5}, "scd": {}}
    whole = make_trainer(config_of(data, denoising=block), tmp_path / "whole")
    whole.train(disable_eval_tqdm=True)
    assert 0 < whole.best_val_metric < 1e9
    first = make_trainer(config_of(data, denoising=block), tmp_path / "first")
    stopped_at(first, 5)
    again = make_trainer(config_of(data, denoising=block), tmp_path / "again")
    again.load_checkpoint(str(folder_of(first) / "checkpoint.pt"))
    assert again.optimizer.param_groups[0]["lr"] == first.optimizer.param_groups[0]["lr"]
    again.train(disable_eval_tqdm=True)
    assert_same(state_of(again), state_of(whole))


def test_the_export_of_a_run_is_plain_fairchems_with_its_trainer(data, tmp_path):
    """With the rate of the host's own trainer at each step, and loaded by its calculator."""
    trainer = make_trainer(config_of(data), tmp_path / "ours")
    trainer.train(disable_eval_tqdm=True)
    plain = config_of(data)
    plain.update(trainer="mlip_trainer", task={})
    theirs = make_trainer(plain, tmp_path / "theirs")
    assert type(theirs) is MLIPTrainer
    for step in range(9):
        assert theirs.scheduler.scheduler.lr_lambdas[0](step) == trainer.scheduler.scheduler.lr_lambdas[0](step)
    path = tmp_path / "plain.pt"
    torch.save(checkpoint.export(checkpoint.read(folder_of(trainer) / "checkpoint.pt"), weights="raw"), path)
    theirs.load_checkpoint(str(path), inference_only=True)
    model = trainer._unwrapped_model.eval()
    atoms, _, _ = next(emt_slabs(1, 0))
    calculator = OCPCalculator(checkpoint_path=str(path), cpu=True)
    assert type(calculator.trainer._unwrapped_model) is HydraModel
    calculator.calculate(atoms, ["energy", "forces"], [])
    assert calculator.results["forces"].any()
    for key, value in model.state_dict().items():
        if not key.startswith("denoising."):
            for other in (theirs._unwrapped_model, calculator.trainer._unwrapped_model):
                assert torch.equal(other.state_dict()[key], value), key


def test_a_warm_up_of_no_steps_is_none(data, tmp_path):
    config = config_of(data)
    config["optim"]["scheduler_params"]["warmup_epochs"] = 0.1
    trainer = make_trainer(config, tmp_path)
    assert trainer.scheduler.scheduler.lr_lambdas[0](0) == 1.0


def test_pretraining_validates_and_a_conservative_model_is_fine_tuned_from_it(data, rows, tmp_path):
    """Neither biases nor norms nor embeddings decay in pre-training, which has no forces of its own."""
    config = self_supervised(config_of(data, kind="direct", denoising={"scd": {"noise_scale": "running"}}))
    trainer = make_trainer(config, tmp_path)
    model = trainer._unwrapped_model
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
    spared = {
        f"{name}.{key}"
        for name, module in model.backbone.named_modules(prefix="backbone")
        for key, p in module.named_parameters(recurse=False)
        if p.requires_grad and (key == "bias" or "Norm" in type(module).__name__ or isinstance(module, nn.Embedding))
    }
    no_weight_decay_names = {name for name, weight in decay.items() if name.startswith("backbone.") and not weight}
    assert no_weight_decay_names >= spared
    assert all(
        "embedding" in name for name in no_weight_decay_names - spared
    )  # by its name, as in the host's own hydras
    assert not model.backbone.sphere_embedding.weight.requires_grad
    trainer.train(disable_eval_tqdm=True)
    assert 0 < trainer.best_val_metric < 1e9

    start = {"starting_checkpoint": str(folder_of(trainer) / "checkpoint.pt")}
    heads, batch = {"heads": ESEN_GRADIENT_HEAD, "pass_through_head_outputs": True}, collate(rows[:2])
    torch.manual_seed(0)
    tuned = DenoisingHydra(denoising=SCD, finetune_config=start, **heads).train()
    assert tuned.adapter.conservative
    state = tuned.backbone.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.backbone.state_dict().items())
    out = run(tuned, batch, plan_of(batch, SCD)[0])
    assert out["forces"].requires_grad
    assert out["forces"].any()
