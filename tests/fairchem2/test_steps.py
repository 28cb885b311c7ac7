"""Steps of a unit: precision, gradients that are not finite, what is measured, validation."""

from __future__ import annotations

import logging

import pytest
import torch

from fairchem_scd.denoising.plan import VALIDATION
from fairchem_scd.fairchem2 import finite
from fairchem_scd.fairchem2.metrics import Measured
from fairchem_scd.fairchem2.step import DenoisingStep
from tests.fairchem2.support import (
    batch_of,
    crystal,
    crystals,
    differences,
    inner,
    mixture,
    model_config,
    tasks_config,
    train_on,
    unit_of,
)

RUNNING = {"scd": {"prob": 1, "num_steps": 3, "std_low": 0.01, "std_high": 0.1}}


@pytest.fixture
def steps(monkeypatch):
    """The denoising steps that units take, as they receive their noise."""
    seen = []
    receive = DenoisingStep.receive

    def spied(self, out, data):
        receive(self, out, data)
        seen.append(self)

    monkeypatch.setattr(DenoisingStep, "receive", spied)
    return seen


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [True, False])
def test_under_bf16_targets_and_statistics_are_float32(steps, direct):
    conditions = []
    for bf16 in (False, True):
        unit = unit_of(RUNNING, model=model_config(direct=direct), bf16=bf16)
        head = inner(unit).denoising["scd"]["condition_head"]
        condition = head.condition
        head.condition = lambda *args, condition=condition: conditions.append(condition(*args)) or conditions[-1]
        train_on(unit, [batch_of(crystals(2))])
    exact, rounded = steps
    assert torch.equal(exact.noise_target, rounded.noise_target)
    assert {exact.noise_target.dtype, rounded.noise.dtype, rounded.objective.scale.dtype} == {torch.float32}
    assert {condition.dtype for condition in conditions} == {torch.float32}
    assert not torch.equal(exact.noise, rounded.noise), "the forward was to be of lower precision"
    assert torch.allclose(exact.noise, rounded.noise, atol=0.1)
    added = inner(unit).denoising.state_dict().values()
    assert {value.dtype for value in added if value.is_floating_point()} == {torch.float32}


# --- gradients that are not finite ------------------------------------------------------------------------------------


def test_a_step_without_finite_gradients_changes_nothing_and_is_counted(caplog):
    unit, batches = unit_of({"scd": {"prob": 0.5}}), [batch_of(crystals(2, seed)) for seed in range(4)]
    train_on(unit, batches[:2])
    parameter = inner(unit).backbone.norm.affine_weight
    before = _copied(unit)
    hook = parameter.register_hook(lambda gradient: gradient * torch.nan)
    with caplog.at_level(logging.WARNING):
        train_on(unit, batches[2:3])
    hook.remove()
    after = _copied(unit)
    assert differences(before, after) == []
    assert unit.scheduler.last_epoch == 3, "it counts the steps of the run"
    assert unit._finite.skipped == [2]
    assert "step 2: gradients that are not finite" in caplog.text
    assert "1 steps had gradients that are not finite and changed nothing; the first was step 2" in caplog.text
    train_on(unit, batches[3:])
    changed = differences(after, _copied(unit))
    assert {line.split("/")[1] for line in changed} == {"model", "optim", "ema"}


def test_a_run_that_has_diverged_ends(monkeypatch):
    monkeypatch.setattr(finite, "_PATIENCE", 2)
    unit = unit_of({"scd": {}})
    inner(unit).backbone.norm.affine_weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(RuntimeError, match=r"2 steps in a row, up to step 1.*lower learning rate"):
        train_on(unit, [batch_of(crystals(2))] * 3)


def _copied(unit):
    """All tensors of the model, its moving average and the optimiser as they are now."""
    state = unit.state_dict()
    return {name: value.clone() for key in ("model", "optim", "ema") for name, value in _tensors(state[key], key)}


def _tensors(state, path):
    pairs = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    for key, value in pairs:
        if isinstance(value, torch.Tensor):
            yield f"{path}/{key}", value
        else:
            yield from _tensors(value, f"{path}/{key}")


# --- the scale and the rate of a step ---------------------------------------------------------------------------------


def test_the_running_scale_is_the_root_mean_square_of_all_noise(steps):
    unit = unit_of(RUNNING)
    train_on(unit, [batch_of(crystals(2, seed)) for seed in range(3)])
    noise = torch.cat([step.corruption.noise[step.corruption.mask] for step in steps])
    running = inner(unit).denoising["scd"].running_scale
    assert running.scale.item() == pytest.approx(noise.square().mean().sqrt().item(), rel=1e-5)
    assert running.count == noise.numel()
    before = running.mean_square.clone()
    unit._corrupted(batch_of(crystals(2)), unit.draw_task(0), VALIDATION)
    assert torch.equal(running.mean_square, before), "validation is to leave it as it is"


def test_the_coefficient_of_dens_falls_with_the_steps_of_the_run(steps):
    unit = unit_of({"dens": {"prob": 1, "coefficient": 10, "coefficient_decay": 0.2}})
    train_on(unit, [batch_of(crystals(1))] * 4)  # an epoch of four
    assert [step.objective.coefficient for step in steps] == pytest.approx([10, 8, 6, 4])


# --- what is measured -------------------------------------------------------------------------------------------------


def test_errors_are_in_the_datas_units_and_over_the_atoms_that_they_are_of(steps):
    unit = unit_of({"dens": {"prob": 1}}, tasks=tasks_config(stress=True), model=model_config(stress=True))
    returned = []
    inner(unit).register_forward_hook(lambda module, args, out: returned.append((args[0], dict(out))))
    train_on(unit, [batch_of([*crystals(2), crystal(5)])])
    (step,), ((data, out),) = steps, returned
    means, moved = step.measured.means(), step.corruption.mask
    noise = step.noise.detach() * step.objective.scale
    assert means["denoising_pos_mae"] == pytest.approx((noise - step.corruption.noise)[moved].abs().mean().item())
    forces, judged = out["forces"]["forces"].detach() * 0.729, ~moved & (data.fixed == 0)
    assert means["denoising_force_mae"] == pytest.approx((forces - data.forces)[judged].abs().mean().item(), rel=1e-5)
    references = torch.tensor([0.1 * (z % 7) for z in range(100)])
    energy = out["energy"]["energy"].detach() * 0.729
    energy += torch.zeros(3).index_add(0, data.batch, references[data.atomic_numbers])
    # The references are taken off before the target is divided by its scale.
    assert means["denoising_energy_mae"] == pytest.approx((energy - data.energy).abs().mean().item(), rel=1e-4)
    assert "denoising_stress_mae" not in means, "it does not train on corrupted structures"
    total = sum(value for name, value in means.items() if name.endswith("_loss"))
    assert total == pytest.approx(unit.last_loss if isinstance(unit.last_loss, float) else unit.last_loss.item())


def test_terms_and_errors_have_the_names_of_the_first_hosts_wing(steps):
    """docs/metrics.md names them. With several data sets, tasks have their own names."""
    names = {}
    for name, block in {"scd": {"scd": {"prob": 1}}, "dens": {"dens": {"prob": 1}}, "nn": {"noisy_nodes": {}}}.items():
        steps.clear()
        train_on(unit_of(block), [batch_of(crystals(2))])
        names[name] = set(steps[0].measured.means())
    noise = {"denoising_pos_mae", "denoising_pos_loss"}
    errors = {"denoising_energy_mae", "denoising_force_mae", "denoising_energy_loss", "denoising_force_loss"}
    assert names["scd"] == {*noise, "energy_loss", "forces_loss", "denoising_left_out"}
    assert names["dens"] == noise | errors
    assert names["nn"] == {*noise, *errors, "denoising_left_out"}


def test_structures_with_nothing_to_denoise_are_counted(steps):
    unit, batch = unit_of({"scd": {"prob": 1}}), batch_of(crystals(4))
    batch.fixed[batch.batch == 1] = 1
    train_on(unit, [batch])
    assert steps[0].measured.means()["denoising_left_out"] == 0.25


def test_means_are_over_all_that_was_added_and_terms_are_summed():
    measured, other = Measured(), Measured()
    measured.add_errors("error", torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([True, False]))
    other.add_errors("error", torch.tensor([[2.0, 2.0]]), torch.tensor([[False, True]]))
    measured.update(other)
    for value in (1.0, 2.0):
        measured.add_term("loss", torch.tensor(value, requires_grad=True))
    measured.add_errors("none", torch.tensor([[1.0]]), torch.tensor([False]))
    assert measured.means() == {"error": 2.0, "loss": 3.0}
    assert measured.means_of_all_ranks() == measured.means()


# --- several data sets ------------------------------------------------------------------------------------------------


def mixed_batch():
    """Structures of two data sets, with charge and spin, whose labels are infinite under the other's names."""
    batch = batch_of(crystals(4))
    batch.dataset, batch.dataset_name = ["a", "b", "a", "b"], ["a.train", "b.train", "a.train", "b.train"]
    batch.charge, batch.spin = torch.tensor([0, 1, -1, 0]), torch.tensor([0, 2, 1, 1])
    of_a = torch.tensor([name == "a" for name in batch.dataset])
    for dataset, mine in (("a", of_a), ("b", ~of_a)):
        batch[f"{dataset}_energy"] = torch.where(mine, batch.energy, torch.inf)
        batch[f"{dataset}_forces"] = torch.where(mine[batch.batch][:, None], batch.forces, torch.inf)
    return batch


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("block", [{"scd": {"prob": 1}}, {"dens": {"prob": 1}}, {"noisy_nodes": {}}])
def test_several_data_sets_with_heads_of_their_own_train_together(steps, block, direct):
    model, tasks = mixture("ab", direct=direct)
    unit = unit_of(block, model=model, tasks=tasks)
    start = {name: parameter.clone() for name, parameter in inner(unit).named_parameters()}
    train_on(unit, [mixed_batch()] * 2)
    means = steps[-1].measured.means()
    prefix = "" if "scd" in block else "denoising_"
    force = "forces" if "scd" in block else "force"
    assert {f"{prefix}{dataset}_{name}_loss" for dataset in "ab" for name in ("energy", force)} <= set(means)
    assert steps[-1].corruption.corrupted.all()
    trained = {name for name, value in inner(unit).named_parameters() if not torch.equal(value, start[name])}
    untrained = {name for name, value in inner(unit).named_parameters() if value.requires_grad} - trained
    assert all(name.endswith("linear.bias") for name in untrained), untrained
    assert all(value.isfinite().all() for value in inner(unit).state_dict().values())
