"""A training step through the host's trainers: loss, metrics, logging and what must not change."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from fairchem.core.models.equiformer_v2.trainers.dens_trainer import DenoisingForcesTrainer
from fairchem.core.modules.evaluator import Evaluator

from fairchem_scd.denoising.plan import NOISE, Plan
from fairchem_scd.denoising.structures import structures_of
from fairchem_scd.denoising.tasks import TaskDraw
from fairchem_scd.fairchem1.data.guarded import Guarded
from fairchem_scd.testing import collate, make_trainer, slabs
from tests.support.configs import tiny_config
from tests.support.models import edge_frames_without_chance, hydra_arguments
from tests.support.runs import batch_of, folder_of, step_of


def formula(trainer, out, batch, *, lambda_e=2.0, lambda_f=100.0, lambda_dens=10.0, sigma=0.1, all_atoms=False):
    """The loss of arXiv 2403.09549, atom by atom, in double precision."""
    corruption, noise = trainer._step.corruption, trainer._step.noise.double()
    mean_e, std_e, std_f = 5.5, 2.5, 1.5
    energy = sum(
        abs(float(out["energy"][b]) - (float(batch.energy[b]) - mean_e) / std_e) for b in range(len(batch.natoms))
    ) / len(batch.natoms)
    terms = []
    for i in range(len(batch.pos)):
        moved = bool(corruption.mask[i])
        if bool(batch.fixed[i]) and not (all_atoms and moved):
            continue
        if moved:
            target = corruption.noise[i].double() / sigma
            terms.append(lambda_dens * math.dist(target.tolist(), noise[i].tolist()))
        else:
            target = batch.forces[i].double() / std_f
            terms.append(lambda_f * math.dist(target.tolist(), out["forces"][i].tolist()))
    return lambda_e * energy + sum(terms) / len(terms)


@pytest.mark.parametrize("name", ["equiformer_v2", "escn"])
@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({}, {}),
        ({"std": 0.3, "corrupt_ratio": 0.8, "coefficient": 25}, {"sigma": 0.3, "lambda_dens": 25}),
        ({"corrupt_ratio": None}, {}),
        ({"all_atoms": True}, {"all_atoms": True}),
        ({"num_steps": 3, "std_low": 0.05, "std_high": 0.2, "sigma_encoding": True}, {"sigma": 0.2}),
    ],
    ids=["partial", "other values", "full", "all atoms", "schedule"],
)
def test_loss_is_the_papers_formula(name, settings, arguments, data, tmp_path):
    trainer = make_trainer(tiny_config(data, name, {"dens": {"prob": 1.0, **settings}}), tmp_path)
    batch = batch_of(trainer)
    out, loss = step_of(trainer, batch)
    assert trainer._step.corruption.mask.any()
    assert float(loss) == pytest.approx(formula(trainer, out, batch, **arguments), rel=1e-5)


def test_loss_differs_from_the_hosts_double_count(data, tmp_path):
    """The host adds the hybrid term and then the force term again, at full weight on targets normalised twice."""
    config = tiny_config(data)
    trainer = make_trainer(config, tmp_path)
    batch = batch_of(trainer)
    out, loss = step_of(trainer, batch)

    theirs = copy.deepcopy(config)
    theirs["trainer"], theirs["task"] = "equiformerv2_dens", {}
    theirs["optim"].update(
        use_denoising_pos=True,
        denoising_pos_coefficient=10,
        denoising_pos_params={"prob": 1.0, "fixed_noise_std": True, "std": 0.1, "corrupt_ratio": 0.5},
    )
    theirs["model"]["backbone"]["model"] = "equiformer_v2_dens_backbone"
    theirs["model"]["heads"] = {
        "energy": {"module": "eqV2_DeNS_scalar_head"},
        "forces": {"module": "eqV2_DeNS_vector_head"},
    }
    host = make_trainer(theirs, tmp_path, identifier="host")
    corruption = trainer._step.corruption
    batch.denoising_pos_forward, batch.noise_mask, batch.noise_vec = True, corruption.mask, corruption.noise
    hybrid = torch.where(corruption.mask[:, None], trainer._step.noise, out["forces"])
    counted = DenoisingForcesTrainer._compute_loss(host, {"energy": out["energy"], "forces": hybrid}, batch)
    assert float(loss) == pytest.approx(formula(trainer, out, batch), rel=1e-5)
    # Their extra term, by hand: targets of the hybrid, normalised a second time, fixed atoms included.
    target = torch.where(corruption.mask[:, None], corruption.noise / 0.1, batch.forces / 1.5) / 1.5
    extra = 100 * (hybrid - target).norm(dim=1).mean()
    assert float(counted - loss) == pytest.approx(float(extra), rel=1e-4)


@pytest.fixture
def _edge_frames_without_chance():
    """The host draws them from the global random state, this package's trainers by step."""
    with edge_frames_without_chance():
        yield


@pytest.mark.usefixtures("_edge_frames_without_chance")
def test_ordinary_steps_and_validation_are_the_plain_hosts(data, tmp_path):
    plain = tiny_config(data)
    plain["trainer"], plain["task"] = "equiformerv2_forces", {}
    host = make_trainer(plain, tmp_path, identifier="plain")
    ours = make_trainer(tiny_config(data, denoising={"dens": {"prob": 0.0}}), tmp_path)
    results = []
    for trainer in (host, ours):
        trainer.model.train()
        batch = batch_of(trainer)
        torch.manual_seed(0)
        out = trainer._forward(batch)
        loss = trainer._compute_loss(out, batch)
        metrics = trainer._compute_metrics(out, batch, trainer.evaluator)
        torch.manual_seed(0)
        validation = trainer.validate(disable_tqdm=True)
        results.append((out, loss, metrics, validation))
    (out, loss, metrics, validation), (our_out, our_loss, our_metrics, our_validation) = results
    assert torch.equal(loss, our_loss)
    assert all(torch.equal(out[key], our_out[key]) for key in out)
    assert {key: our_metrics[key] for key in metrics} == metrics
    assert set(our_metrics) - set(metrics) == {"energy_loss", "forces_loss"}
    assert our_validation == validation


@pytest.mark.usefixtures("_edge_frames_without_chance")
def test_a_run_without_denoising_steps_ends_in_the_plain_runs_weights(data, tmp_path):
    plain = tiny_config(data)
    plain["trainer"], plain["task"] = "equiformerv2_forces", {}
    host = make_trainer(plain, tmp_path, identifier="plain")
    torch.manual_seed(0)
    host.train(disable_eval_tqdm=True)
    ours = make_trainer(tiny_config(data, denoising={"dens": {"prob": 0.0}}), tmp_path)
    torch.manual_seed(0)
    ours.train(disable_eval_tqdm=True)
    state = ours.model.state_dict()
    # Clipping sums the squared gradients of other parameters beside the host's, all zero.
    for key, value in host.model.state_dict().items():
        assert torch.equal(state[key], value), key


def test_losses_and_errors_are_logged_by_part(data, tmp_path):
    trainer = make_trainer(tiny_config(data), tmp_path)
    batch = batch_of(trainer)
    out, loss = step_of(trainer, batch)
    metrics = trainer._compute_metrics(out, batch, Evaluator(eval_metrics={"energy": ["mae"], "forces": ["mae"]}))
    assert set(metrics) == {
        "denoising_energy_mae", "denoising_force_mae", "denoising_pos_mae",
        "denoising_energy_loss", "denoising_force_loss", "denoising_pos_loss",
    }  # fmt: skip
    parts = [metrics[f"denoising_{part}_loss"]["metric"] for part in ("energy", "force", "pos")]
    assert sum(parts) == pytest.approx(float(loss), rel=1e-5)
    step = trainer._step
    moved, free = step.corruption.mask, batch.fixed == 0
    noise_error = (0.1 * step.noise - step.corruption.noise)[moved].abs().mean()
    force_error = (1.5 * out["forces"] - batch.forces)[free & ~moved].abs().mean()
    energy_error = (2.5 * out["energy"].view(-1) + 5.5 - batch.energy).abs().mean()
    assert metrics["denoising_pos_mae"]["metric"] == pytest.approx(float(noise_error), rel=1e-5)
    assert metrics["denoising_force_mae"]["metric"] == pytest.approx(float(force_error), rel=1e-5)
    assert metrics["denoising_energy_mae"]["metric"] == pytest.approx(float(energy_error), rel=1e-5)


@pytest.mark.parametrize("fn", ["mae", "mse"])
def test_another_force_loss_serves_the_noise_too(fn, data, tmp_path):
    losses = [{"energy": {"fn": "mae", "coefficient": 2}}, {"forces": {"fn": fn, "coefficient": 3}}]
    trainer = make_trainer(tiny_config(data, loss_functions=losses), tmp_path)
    batch = batch_of(trainer)
    out, loss = step_of(trainer, batch)
    moved, free = trainer._step.corruption.mask, batch.fixed == 0
    noise = 10 * (trainer._step.noise - trainer._step.corruption.noise / 0.1)[moved].abs().pow(1 + (fn == "mse"))
    # The weight stands outside the loss function.
    noise = noise if fn == "mae" else noise / 10
    force = 3 * (out["forces"] - batch.forces / 1.5)[free & ~moved].abs().pow(1 + (fn == "mse"))
    energy = 2 * (out["energy"].view(-1) - (batch.energy - 5.5) / 2.5).abs().mean()
    count = 3 * int(free.sum())
    expected = energy + (noise.sum() * (10 if fn == "mse" else 1) + force.sum()) / count
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_coefficient_decays_linearly_over_the_run(data, tmp_path):
    config = tiny_config(data, denoising={"dens": {"prob": 1.0, "coefficient_decay": 0.2}}, optim={"max_epochs": 5})
    trainer = make_trainer(config, tmp_path)  # 2 steps an epoch
    batch = batch_of(trainer)
    for step, weight in ((0, 10.0), (5, 6.0), (10, 2.0), (12, 2.0)):
        out, loss = step_of(trainer, copy.deepcopy(batch), step)
        assert float(loss) == pytest.approx(formula(trainer, out, batch, lambda_dens=weight), rel=1e-5)


def test_noisy_nodes_add_a_term_and_keep_every_label(data, tmp_path):
    block = {"noisy_nodes": {"std": 0.05, "coefficient": 0.3}}
    trainer = make_trainer(tiny_config(data, denoising=block), tmp_path)
    batch = batch_of(trainer)
    out, loss = step_of(trainer, batch)
    step, free = trainer._step, batch.fixed == 0
    assert torch.equal(step.corruption.mask, free)
    energy = 2 * (out["energy"].view(-1) - (batch.energy - 5.5) / 2.5).abs().mean()
    forces = 100 * (out["forces"] - batch.forces / 1.5)[free].norm(dim=1).mean()
    noise = 0.3 * (step.noise - step.corruption.noise / 0.05)[free].pow(2).mean()
    assert float(loss) == pytest.approx(float(energy + forces + noise), rel=1e-5)
    metrics = trainer._compute_metrics(out, batch, trainer.evaluator, {})
    assert metrics["denoising_force_mae"]["numel"] == 3 * int(free.sum())


def test_noisy_fixed_atoms_do_not_train_on_forces(data, tmp_path):
    block = {"noisy_nodes": {"std": 0.05, "coefficient": 0, "all_atoms": True}}
    trainer = make_trainer(tiny_config(data, denoising=block), tmp_path)
    batch = batch_of(trainer)
    out, loss = step_of(trainer, batch)
    assert trainer._step.corruption.mask.all()
    energy = 2 * (out["energy"].view(-1) - (batch.energy - 5.5) / 2.5).abs().mean()
    forces = 100 * (out["forces"] - batch.forces / 1.5)[batch.fixed == 0].norm(dim=1).mean()
    assert float(loss) == pytest.approx(float(energy + forces), rel=1e-5)


def test_added_parameters_have_a_gradient_whichever_output_is_in_the_loss(data, tmp_path):
    config = tiny_config(data, denoising={"dens": {"prob": 0.0}})
    trainer = make_trainer(config, tmp_path)
    trainer.model.train()
    for output in ("energy", "forces"):
        trainer.model.zero_grad()
        trainer.step = 1
        trainer._forward(batch_of(trainer))[output].sum().backward()
        assert all(p.grad is not None for p in trainer.model.denoising.parameters())


def test_a_run_without_tasks_resumes_and_ends_in_a_checkpoint(data, tmp_path):
    config = tiny_config(data, denoising={}, optim={"eval_every": 1000})
    trainer = make_trainer(config, tmp_path, is_debug=False)
    trainer.train(disable_eval_tqdm=True)
    path = str(folder_of(trainer) / "checkpoint.pt")
    again = make_trainer(config, tmp_path, identifier="again")
    again.load_checkpoint(path)
    assert again.step == trainer.step == 2


def test_a_sample_of_very_large_data_stays_within_it():
    class Large:
        def __len__(self):
            return 172_249_423

        def __getitem__(self, index):
            assert 0 <= index < len(self)
            return row

    row = slabs(1)[0]
    assert len(Guarded(Large(), "train", lambda row: None).sample(skip=False)) == 32


@pytest.fixture
def _rows_without_stress(monkeypatch):
    """Their labels come with the batch."""
    monkeypatch.setattr("fairchem_scd.fairchem1.trainer.row_check.check_row", lambda row, **_: None)


def with_a_second_energy(data, denoising):
    """A config with another system property, `stress` by name and energy by value, as a stand-in for one."""
    config = tiny_config(data, denoising=denoising)
    config["model"]["heads"]["stress"] = {"module": "equiformerV2_scalar_head", "output_name": "stress"}
    config["outputs"]["stress"] = {"level": "system"}
    config["loss_functions"].append({"stress": {"fn": "mae", "coefficient": 7}})
    return config


@pytest.mark.usefixtures("_rows_without_stress")
@pytest.mark.parametrize("outputs", [["energy"], ["energy", "stress"], []])
def test_outputs_train_on_corrupted_structures_as_asked(outputs, data, tmp_path):
    dens = {"prob": 1.0, "train_outputs": outputs}
    trainer = make_trainer(with_a_second_energy(data, {"dens": dens}), tmp_path)
    batch = batch_of(trainer)
    batch.stress = batch.energy.clone()
    batch.md = torch.tensor([1, 0, 0, 1])  # left alone
    out, loss = step_of(trainer, batch)
    corrupted = trainer._step.corruption.corrupted
    assert corrupted.any()
    assert not corrupted.all()
    everything = torch.ones_like(corrupted)
    parts = trainer._step.terms
    energy_error = (out["energy"].view(-1) - (batch.energy - 5.5) / 2.5).abs()
    stress_error = (out["stress"].view(-1) - batch.stress).abs()
    for name, error, weight in (("energy", energy_error, 2), ("stress", stress_error, 7)):
        kept = everything if name in outputs else ~corrupted
        assert float(parts[f"denoising_{name}_loss"]) == pytest.approx(float(weight * error[kept].mean()), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in trainer.model.parameters() if p.requires_grad)


@pytest.mark.usefixtures("_rows_without_stress")
def test_an_output_with_no_structure_left_is_zero_and_still_has_gradients(data, tmp_path):
    trainer = make_trainer(with_a_second_energy(data, {"dens": {"prob": 1.0}}), tmp_path)
    batch = batch_of(trainer)
    batch.stress = batch.energy.clone()
    _, loss = step_of(trainer, batch)
    assert trainer._step.corruption.corrupted.all()
    assert float(trainer._step.terms["denoising_stress_loss"]) == 0
    loss.backward()
    gradients = [p.grad for n, p in trainer.model.named_parameters() if "heads.stress" in n and p.requires_grad]
    assert gradients
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_a_batch_that_nothing_moves_in_is_an_ordinary_one_with_a_silent_noise_head(data, tmp_path):
    trainer = make_trainer(tiny_config(data), tmp_path)
    batch = batch_of(trainer)
    batch.md = torch.ones(len(batch.natoms), dtype=torch.long)
    out, loss = step_of(trainer, batch)
    assert not trainer._step.corruption.mask.any()
    assert float(loss) == pytest.approx(formula(trainer, out, batch), rel=1e-5)
    metrics = trainer._compute_metrics(out, batch, trainer.evaluator, {})
    assert "denoising_pos_mae" not in metrics
    loss.backward()
    assert all(p.grad is not None for p in trainer.model.parameters() if p.requires_grad)
    assert all(not p.grad.any() for p in trainer.model.denoising.parameters())


def test_same_step_of_the_same_seed_corrupts_alike_whatever_ran_before(data, tmp_path):
    trainers = [make_trainer(tiny_config(data), tmp_path, identifier=str(i)) for i in range(2)]
    batches = [batch_of(trainer) for trainer in trainers]
    torch.rand(17)
    step_of(trainers[0], copy.deepcopy(batches[0]), step=3)
    step_of(trainers[0], batches[0], step=9)
    step_of(trainers[1], batches[1], step=9)
    first, second = (trainer._step.corruption for trainer in trainers)
    assert torch.equal(first.noise, second.noise)
    other = make_trainer(tiny_config(data), tmp_path, identifier="seed", seed=1)
    step_of(other, copy.deepcopy(batches[0]), step=9)
    assert not torch.equal(other._step.corruption.noise, first.noise)


def test_loss_functions_are_the_configs_own_after_a_step(data, tmp_path):
    trainer = make_trainer(tiny_config(data), tmp_path)
    before = list(trainer.loss_functions)
    step_of(trainer, batch_of(trainer))
    assert trainer.loss_functions == before


def test_the_state_of_a_step_ends_with_the_step(data, tmp_path, monkeypatch):
    """In training, validation and prediction, whatever the step's task."""
    trainer = make_trainer(tiny_config(data, denoising={"scd": {"prob": 0.5}}), tmp_path)
    for task in (None, trainer.tasks["scd"]):
        monkeypatch.setattr(TaskDraw, "__call__", lambda self, step, task=task: task)
        batch = batch_of(trainer)
        out, loss = step_of(trainer, batch)
        assert trainer._step is not None
        trainer._compute_metrics(out, batch, trainer.evaluator, {})
        trainer._backward(loss)
        assert trainer._step is None
    trainer.validate(disable_tqdm=True)
    assert trainer._step is None
    trainer.model.eval()
    trainer._forward(batch_of(trainer))
    assert trainer._step is None


def test_zero_warmup_steps_mean_no_warmup(data, tmp_path):
    config = tiny_config(data)
    config["optim"]["scheduler_params"]["warmup_epochs"] = 0
    trainer = make_trainer(config, tmp_path)
    assert trainer.scheduler.get_lr() == pytest.approx(0.001)
    trainer.train(disable_eval_tqdm=True)


def test_zero_warmup_steps_mean_no_warmup_on_the_other_base(data, tmp_path):
    config = tiny_config(data)
    config["trainer"] = "fairchem_scd.DenoisingTrainer"
    for key in ("scheduler", "scheduler_params"):
        del config["optim"][key]
    config["optim"].update(warmup_steps=0, warmup_factor=0.2, lr_milestones=[100], lr_gamma=0.1)
    trainer = make_trainer(config, tmp_path)
    assert trainer.scheduler.get_lr() == pytest.approx(0.001)
    trainer.train(disable_eval_tqdm=True)


@pytest.mark.parametrize(("name", "epochs"), [("equiformer_v2", 7), pytest.param("escn", 20, marks=pytest.mark.slow)])
def test_the_branch_is_alive(name, epochs, data, tmp_path):
    """After a short training the noise of held-out frames is told from the forces of the right original."""
    config = tiny_config(data, name, {"dens": {"prob": 1.0, "std": 0.15, "corrupt_ratio": None, "coefficient": 100}})
    config["dataset"]["train"].update(src=str(data / "alive"), num_structures=48, num_systems=2)
    del config["dataset"]["val"]
    config["model"]["backbone"].update(max_neighbors=12)
    config["optim"].update(max_epochs=epochs, lr_initial=0.005, ema_decay=None, eval_every=10**9)
    trainer = make_trainer(config, tmp_path)
    trainer.train(disable_eval_tqdm=True)
    model, task = trainer.model.eval(), trainer.tasks["dens"]
    frames = slabs(16, seed=5, systems=2)
    errors = {"right": 0.0, "wrong": 0.0, "zero": 0.0}
    for index, row in enumerate(frames):
        batch = collate([row])
        structures = structures_of(batch)
        corruption = task.corrupt(structures, seed=0, step=index)
        (run,) = task.passes(structures, corruption, seed=0, step=1)
        other = next(frame for frame in frames[index:] + frames if frame.sid == row.sid and frame.fid != row.fid)
        mask, target = corruption.mask, corruption.noise / 0.15
        for which, forces in (("right", row.forces), ("wrong", other.forces)):
            conditioned = replace(run, encoding=(forces, *run.encoding[1:]))
            with torch.no_grad():
                noise = model(batch, Plan("dens", (conditioned,)))[NOISE]
            errors[which] += float((noise - target)[mask].norm(dim=1).sum())
        errors["zero"] += float(target[mask].norm(dim=1).sum())
    assert errors["right"] < 0.8 * errors["zero"], errors
    assert errors["right"] < 0.9 * errors["wrong"], errors


def test_structures_see_their_labels_through_the_hosts_key_mapping(data, tmp_path):
    trainer = make_trainer(tiny_config(data), tmp_path)
    structures = structures_of(batch_of(trainer))
    assert structures.forces is not None
    assert structures.fixed.any()
    assert len(set(structures.ids)) == 4


def test_hydra_heads_may_return_nested_outputs(data, tmp_path):
    config = tiny_config(data)
    config["model"] = {"name": "hydra", "otf_graph": True, **hydra_arguments("equiformer_v2")}
    config["model"]["pass_through_head_outputs"] = False
    config["outputs"]["energy"]["property"] = "energy"
    config["outputs"]["forces"]["property"] = "forces"
    trainer = make_trainer(config, tmp_path)
    batch = batch_of(trainer)
    out, loss = step_of(trainer, batch)
    assert float(loss) == pytest.approx(formula(trainer, out, batch), rel=1e-5)
    trainer.train(disable_eval_tqdm=True)
