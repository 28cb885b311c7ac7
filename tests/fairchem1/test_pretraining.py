"""SCD through the host's trainers: beside other losses, alone without labels, and what comes after."""

from __future__ import annotations

import copy
import logging
import pickle
from dataclasses import replace

import lmdb
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.constraints import FixAtoms
from ase.db import connect
from fairchem.core.models.equiformer_v2.drop import GraphDropPath

from fairchem_scd.denoising.plan import NOISE, VALIDATION, Plan
from fairchem_scd.denoising.structures import structures_of
from fairchem_scd.errors import ConfigError, DataError
from fairchem_scd.fairchem1.backbones.equiformer_v2 import AtomDropPath
from fairchem_scd.fairchem1.checkpoint import read, to_plain
from fairchem_scd.testing import collate, make_trainer, slabs
from tests.support.configs import pretraining, tiny_config
from tests.support.models import HEADS
from tests.support.runs import batch_of, folder_of, step_of


def is2re_lmdb(folder, count=4):
    """Structures as the IS2RE LMDBs hold them: no frames, no forces, no labels of the structure as it is."""
    folder.mkdir()
    with lmdb.open(str(folder / "data.lmdb"), subdir=False, map_size=2**24) as db, db.begin(write=True) as transaction:
        for i, row in enumerate(slabs(count)):
            del row.energy, row.forces, row.fid
            row.sid, row.y_init, row.y_relaxed, row.pos_relaxed = i, 1.0, 0.5, row.pos + 0.1
            transaction.put(f"{i}".encode(), pickle.dumps(row))
    return folder


def plain_database(path, structures):
    with connect(path) as db:
        for atoms in structures:
            db.write(atoms)
    return {"format": "ase_db", "src": str(path), "a2g_args": {"r_energy": False, "r_forces": False}}


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["mse", "l2mae"])
@pytest.mark.parametrize("supervised", [True, False])
def test_loss_is_that_of_the_clean_structure_and_of_the_noise_over_free_atoms(supervised, loss, data, tmp_path):
    block = {"scd": {"coefficient": 3.0, "loss": loss}}
    config = tiny_config(data, denoising=block) if supervised else pretraining(data, denoising=block)
    trainer = make_trainer(config, tmp_path)
    batch = batch_of(trainer)
    out, value = step_of(trainer, batch)
    step = trainer._step
    free = batch.fixed == 0
    assert step.corruption.mask.equal(free)
    error = step.noise - step.corruption.noise / 0.04
    per_atom = error[free].double().square() if loss == "mse" else error[free].double().norm(dim=-1)
    expected = 3.0 * float(per_atom.mean())
    if supervised:
        energy = (batch.energy - 5.5) / 2.5 - out["energy"].view(-1)
        forces = (batch.forces / 1.5 - out["forces"])[free]
        expected += 2 * float(energy.abs().mean()) + 100 * float(forces.norm(dim=-1).mean())
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert step.corruption.noise[free].std() == pytest.approx(0.04, rel=0.2)
    assert set(step.terms) == ({"energy_loss", "forces_loss"} if supervised else set()) | {"denoising_pos_loss"}
    metrics = trainer._compute_metrics(out, batch, trainer.evaluator, {})
    wrong = (step.noise * 0.04 - step.corruption.noise)[free].abs().mean()
    assert metrics["denoising_pos_mae"]["metric"] == pytest.approx(float(wrong), rel=1e-5)
    assert ("forces_mae" in metrics) == supervised
    assert "denoising_force_mae" not in metrics, "forces are of the clean structure"


def test_outputs_beside_scd_are_those_of_an_ordinary_step(data, tmp_path):
    """Same weights and random state: energy, forces and their losses of an SCD step, and of a plain one."""
    trainer = make_trainer(tiny_config(data), tmp_path / "plain")
    ours = make_trainer(tiny_config(data, denoising={"scd": {}}), tmp_path / "scd")
    trainer.tasks["dens"].settings = trainer.tasks["dens"].settings.model_copy(update={"prob": 0.0})
    for each in (trainer, ours):
        torch.manual_seed(5)
        out, _ = step_of(each, batch_of(each))
        if each is trainer:
            expected, parts = out, each._step.terms
    for key in expected:
        assert torch.equal(out[key], expected[key])
    for key in ("energy_loss", "forces_loss"):
        assert torch.equal(ours._step.terms[key], parts[key])


def test_a_structure_with_nothing_to_denoise_is_left_out_and_counted(tmp_path, caplog):
    free, held = Atoms("CuAu", positions=[[0, 0, 0], [0, 0, 2.4]], cell=[9] * 3, pbc=True), None
    held = free.copy()
    held.set_constraint(FixAtoms([0, 1]))
    lone = Atoms("Cu", cell=[2.5] * 3, pbc=True)
    config = pretraining(tmp_path)
    config["dataset"] = {"train": plain_database(tmp_path / "data.db", [free, held, lone, free])}
    trainer = make_trainer(config, tmp_path)
    batch = batch_of(trainer)
    out, loss = step_of(trainer, batch)
    metrics = trainer._compute_metrics(out, batch, trainer.evaluator, {})
    assert metrics["denoising_left_out"] == {"metric": 0.5, "total": 2, "numel": 4}
    mask = trainer._step.corruption.mask
    assert int(mask.sum()) == 4
    error = (trainer._step.noise - trainer._step.corruption.noise / 0.04)[mask]
    assert float(loss) == pytest.approx(float(error.square().mean()), rel=1e-5)
    with caplog.at_level(logging.WARNING):
        trainer.train(disable_eval_tqdm=True)
    assert "structures had nothing to denoise and were left out" in caplog.text


def test_two_tasks_in_one_config_share_the_steps(data, tmp_path):
    config = tiny_config(data, denoising={"dens": {"prob": 0.5}, "scd": {}}, optim={"max_epochs": 4})
    trainer = make_trainer(config, tmp_path)
    drawn = [trainer.draw_task(step) for step in range(1, 9)]
    assert {task.name for task in drawn} == {"dens", "scd"}
    trainer.train(disable_eval_tqdm=True)
    assert {"denoising_force_mae", "forces_mae", "denoising_pos_mae"} <= set(trainer.metrics)


# --- without labels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["equiformer_v2", "escn"])
def test_pre_training_needs_no_labels_and_moves_no_element_embedding(name, data, tmp_path):
    """On IS2RE-like data; the best checkpoint is that of the least denoising error."""
    config = pretraining(data, name, optim={"max_epochs": 3})
    config["dataset"] = {"train": {"format": "lmdb", "src": str(is2re_lmdb(tmp_path / "is2re"))}}
    config["dataset"]["val"] = copy.deepcopy(config["dataset"]["train"])
    trainer = make_trainer(config, tmp_path)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train(disable_eval_tqdm=True)
    after = trainer.model.state_dict()
    assert torch.equal(after["backbone.sphere_embedding.weight"], before["backbone.sphere_embedding.weight"])
    moved = [key for key, p in trainer.model.named_parameters() if p.requires_grad]
    still = [key for key in moved if torch.equal(after[key], before[key])]
    assert len(still) < 0.05 * len(moved), still
    assert trainer.primary_metric is None or "denoising" in trainer.primary_metric
    best = read(folder_of(trainer) / "best_checkpoint.pt")
    assert best["val_metrics"]["denoising_pos_mae"]["metric"] == trainer.best_val_metric < 0.04
    assert read(f"{folder_of(trainer)}/checkpoint.pt")["primary_metric"] == "denoising_pos_mae"


def test_labels_that_are_there_are_ignored(data, tmp_path):
    config = pretraining(data)
    config["dataset"]["val"] = {}
    trainer = make_trainer(config, tmp_path)
    batch = batch_of(trainer)
    batch.energy[:], batch.forces[:] = 1e6, float("nan")
    _, loss = step_of(trainer, batch)
    assert float(loss) < 10


def test_validation_has_the_same_noise_in_every_epoch_and_run_whatever_the_batches(data, tmp_path):
    results = []
    for seed, batch_size in ((0, 4), (7, 2)):
        config = pretraining(data, optim={"eval_batch_size": batch_size})
        config["model"]["backbone"]["max_neighbors"] = 300
        trainer = make_trainer(config, tmp_path, seed=seed, identifier=f"{seed}")
        if seed == 0:
            state = trainer.model.state_dict()
        trainer.model.load_state_dict(state)
        noise = {}
        for _ in range(2):
            for batch in trainer.val_loader:
                trainer.model.eval()
                trainer._validating = True
                with torch.no_grad():
                    trainer._forward(batch)
                parts = trainer._step.corruption.noise.split(batch.natoms.tolist())
                for name, part in zip(structures_of(batch).ids, parts, strict=True):
                    assert torch.equal(noise.setdefault(name, part), part)
        trainer.ema = None
        results.append((noise, trainer.validate(disable_tqdm=True)["denoising_pos_mae"]["metric"]))
    assert results[0][0].keys() == results[1][0].keys()
    assert all(torch.equal(noise, results[1][0][name]) for name, noise in results[0][0].items())
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4)
    # Another noise than any training step's.
    trainer.model.train()
    trainer._step = None
    structures = structures_of(next(iter(trainer.val_loader)))
    drawn = [trainer.tasks["scd"].corrupt(structures, seed=0, step=step).noise for step in (VALIDATION, 1, 2)]
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_supervised_validation_never_corrupts(data, tmp_path):
    trainer = make_trainer(tiny_config(data, denoising={"scd": {}}), tmp_path)
    metrics = trainer.validate(disable_tqdm=True)
    assert set(metrics) == {"energy_mae", "forces_mae", "loss"}


def test_the_users_heads_are_kept_and_stay_as_they_are(data, tmp_path):
    config = pretraining(data)
    config["model"]["heads"] = copy.deepcopy(HEADS["equiformer_v2"])
    trainer = make_trainer(config, tmp_path)
    before = {key: value.clone() for key, value in trainer.model.output_heads.state_dict().items()}
    trainer.train(disable_eval_tqdm=True)
    for key, value in trainer.model.output_heads.state_dict().items():
        assert torch.equal(value, before[key])


def test_no_weight_decay_on_biases_norms_alphas_tokens_and_embeddings(data, tmp_path):
    block = {"scd": {"null_condition": "mask_token"}}
    trainer = make_trainer(pretraining(data, denoising=block), tmp_path)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    groups = {
        group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in trainer.optimizer.param_groups
    }
    none, some = groups[0], groups[0.001]
    for word in ("bias", "alpha", ".a", "norm", "embedding"):
        wrong = [n for n in some if (n.endswith(word) or (word in ("norm", "embedding") and word in n))]
        # alpha_dot is a matrix of the host's attention, and decays in the host.
        assert not wrong, (word, wrong)
    weights = {
        n for n, p in trainer.model.named_parameters() if p.requires_grad and p.dim() > 1 and "embedding" not in n
    }
    assert weights - none == weights & some
    assert any("modulation.blocks.0.mlp.0.weight" in n for n in some)
    assert not trainer.model.denoising["scd"]["condition_head"].mask_token.requires_grad


def test_noisy_nodes_alone_are_plain_denoising_pre_training(data, tmp_path):
    trainer = make_trainer(pretraining(data, denoising={"noisy_nodes": {"std": 0.04}}), tmp_path)
    _, loss = step_of(trainer, batch_of(trainer))
    loss.backward()
    assert len(trainer._step.plan.passes) == 1
    assert not trainer._step.plan.passes[0].outputs


def test_the_embedding_tells_structures_apart_after_a_short_pre_training(tmp_path):
    """Same elements, same size: under the right c the noise is known better than under another's c or none.

    One atom sits at one of four places about four fixed ones, and is moved so far that it could have come from any.
    """
    frame = np.array([[0, 0, 0], [2.2, 0, 0], [0, 3.0, 0], [0, 0, 4.0]])
    places = 1.0 + 0.9 * np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    held = FixAtoms(range(4))
    structures = [Atoms("Cu5", [*frame, place], cell=[20] * 3, pbc=True, constraint=held) for place in places]
    config = pretraining(tmp_path, denoising={"scd": {"std": 1.0}})
    config["dataset"] = {"train": plain_database(tmp_path / "data.db", structures * 40)}
    config["model"]["backbone"].update(
        num_layers=1, max_radius=6.0, avg_degree=1.0, sphere_channels=16, attn_hidden_channels=16, num_heads=4
    )
    config["optim"].update(batch_size=16, max_epochs=20, lr_initial=0.002, optimizer_params={}, ema_decay=None)
    config["optim"].update(clip_grad_norm=10, eval_every=10**9)
    config["optim"]["scheduler_params"] |= {"lr_min_factor": 0.5}
    trainer = make_trainer(config, tmp_path)
    with torch.no_grad():
        # All atoms are copper: smaller first features let geometry show sooner.
        trainer.model.backbone.sphere_embedding.weight *= 0.1
    trainer.train(disable_eval_tqdm=True)
    model, task = trainer.model.eval(), trainer.tasks["scd"]
    rows = [trainer.train_dataset[i] for i in range(160)][:16]
    for i, row in enumerate(rows):
        row.sid = i
    batch = collate(rows)
    known, errors = structures_of(batch), dict.fromkeys(("right", "wrong", "none", "zero"), 0.0)
    place = batch.pos[4::5]
    # Each is told the embedding of the next that is another.
    order = [next(j % 16 for j in range(i, i + 16) if not torch.equal(place[i], place[j % 16])) for i in range(16)]
    for draw in range(10):
        corruption = task.corrupt(known, seed=5, step=draw)
        clean, noisy = task.passes(known, corruption, seed=5, step=VALIDATION)
        other = torch.cat([clean.pos.split(5)[i] for i in order])
        variants = {
            "right": (clean, noisy),
            "wrong": (replace(clean, pos=other), noisy),
            "none": (clean, replace(noisy, conditioned=torch.zeros_like(noisy.conditioned))),
        }
        mask = corruption.mask
        for which, passes in variants.items():
            with torch.no_grad():
                noise = model(copy.deepcopy(batch), Plan("scd", passes))[NOISE]
            errors[which] += float((noise - corruption.noise)[mask].square().mean())
        errors["zero"] += float(corruption.noise[mask].square().mean())
    assert errors["right"] < 0.8 * errors["none"], errors
    assert errors["right"] < 0.8 * errors["wrong"], errors
    assert errors["none"] < errors["zero"], errors


# --- fine-tuning -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    """A checkpoint of two steps of pre-training."""
    trainer = make_trainer(pretraining(data), tmp_path_factory.mktemp("pretrained"))
    trainer.train(disable_eval_tqdm=True)
    return folder_of(trainer) / "best_checkpoint.pt"


def finetuning(data, start, denoising, **changes):
    config = tiny_config(data, denoising=denoising, **changes)
    config["model"].pop("backbone")
    config["model"]["finetune_config"] = {"starting_checkpoint": str(start)}
    return config


def test_the_hosts_own_trainer_fine_tunes_from_it(data, pretrained, tmp_path):
    config = finetuning(data, pretrained, {})
    config.update(trainer="equiformerv2_forces", task={})
    trainer = make_trainer(config, tmp_path)
    start = read(pretrained)["state_dict"]
    for key, value in trainer.model.backbone.state_dict().items():
        assert torch.equal(value, start[f"backbone.{key}"]), key
    assert all(p.requires_grad for key, p in trainer.model.named_parameters() if "energy_lin_ref" not in key)
    trainer.train(disable_eval_tqdm=True)
    embedding = trainer.model.backbone.sphere_embedding.weight
    assert not torch.equal(embedding, start["backbone.sphere_embedding.weight"]), "frozen in pre-training alone"


def test_ours_fine_tunes_with_what_pre_training_added_and_a_falling_drop_path(data, pretrained, tmp_path):
    start = {key: value for key, value in read(pretrained)["state_dict"].items() if key.startswith("denoising.")}
    block = {"noisy_nodes": {"prob": 0.5, "std": 0.01}, "scd": {"prob": 0.5}}
    block["drop_path"] = {"start": 0.4, "end": 0.1, "steps": 3}
    trainer = make_trainer(finetuning(data, pretrained, block, optim={"max_epochs": 3}), tmp_path)
    state = trainer.model.state_dict()
    for key, value in start.items():
        assert torch.equal(state[key], value), key
        if "noise_head" in key:
            assert torch.equal(state[key.replace(".scd.", ".noisy_nodes.")], value), "the same head, for every task"
    rates = []
    trainer.model.backbone.blocks[0].register_forward_pre_hook(
        lambda block, _: rates.append((trainer.step, block.drop_path.drop_prob)) if block.training else None
    )
    trainer.train(disable_eval_tqdm=True)
    expected = {1: 0.4, 2: 0.3, 3: 0.2, 4: 0.1, 5: 0.1, 6: 0.1}
    assert {step for step, _ in rates} == set(expected)
    assert all(rate == pytest.approx(expected[step]) for step, rate in rates)
    alone = make_trainer(finetuning(data, pretrained, {"drop_path": {"start": 0.2}}), tmp_path, identifier="alone")
    step_of(alone, batch_of(alone))
    assert alone.model.backbone.blocks[1].drop_path.drop_prob == 0.2, "without any task too"
    with pytest.raises(ConfigError, match=r"task\.denoising\.drop_path: escn_backbone has no drop path"):
        make_trainer(tiny_config(data, "escn", {"scd": {}, "drop_path": {}}), tmp_path, identifier="escn")


def dropping(data, folder, rate=0.2, make=pretraining, name="equiformer_v2", **block):
    """A trainer whose backbone has a drop path, and the drop path of each block."""
    config = make(data, name, denoising={"scd": {}, **block}, optim={"max_epochs": 1})
    if name == "equiformer_v2":
        config["model"]["backbone"]["drop_path_rate"] = rate
    trainer = make_trainer(config, folder, identifier="dropping")
    return trainer, lambda: [block.drop_path for block in trainer.model.backbone.blocks]


@pytest.mark.parametrize(
    ("make", "block", "expected"),
    [
        (pretraining, {}, AtomDropPath),
        (tiny_config, {}, GraphDropPath),
        (pretraining, {"drop_path_per": "structure"}, GraphDropPath),
        (tiny_config, {"drop_path_per": "atom"}, AtomDropPath),
    ],
)
def test_drop_path_draws_for_atoms_in_pre_training_and_otherwise_as_the_config_says(
    make, block, expected, data, tmp_path
):
    trainer, drops = dropping(data, tmp_path, make=make, **block)
    assert [(type(drop), drop.drop_prob) for drop in drops()] == [(expected, 0.2)] * 2
    trainer.train(disable_eval_tqdm=True)
    assert np.isfinite(trainer.metrics["loss"]["metric"])


def test_a_drop_path_with_a_schedule_draws_for_atoms_too(data, tmp_path):
    trainer, drops = dropping(data, tmp_path, rate=0.0, drop_path={"start": 0.4, "end": 0.1, "steps": 1})
    trainer.train(disable_eval_tqdm=True)
    assert [type(drop) for drop in drops()] == [AtomDropPath] * 2
    assert [drop.drop_prob for drop in drops()] == pytest.approx([0.1, 0.1])


def test_a_pre_training_that_goes_on_draws_as_it_did_so_far(data, tmp_path):
    """Also one from before there was a choice, whose checkpoint does not say it. What a config says comes first."""
    first, _ = dropping(data, tmp_path / "first")
    first.train(disable_eval_tqdm=True)
    new = folder_of(first) / "checkpoint.pt"
    stored = read(new)
    assert stored["config"]["cmd"].pop("drop_path_per") == "atom"
    torch.save(stored, old := tmp_path / "old.pt")
    for path, block, expected in (
        (new, {}, AtomDropPath),
        (old, {}, GraphDropPath),
        (old, {"drop_path_per": "atom"}, AtomDropPath),
        (new, {"drop_path_per": "structure"}, GraphDropPath),
    ):
        trainer, drops = dropping(data, tmp_path, **block)
        trainer.load_checkpoint(str(path))
        assert [type(drop) for drop in drops()] == [expected] * 2
        assert trainer.config["cmd"]["drop_path_per"] == ("atom" if expected is AtomDropPath else "structure")


def test_a_choice_where_nothing_is_dropped_is_warned_of(data, tmp_path, caplog):
    dropping(data, tmp_path, rate=0.0)
    assert "drop_path_per" not in caplog.text
    for name in ("equiformer_v2", "escn"):
        caplog.clear()
        dropping(data, tmp_path, rate=0.0, name=name, drop_path_per="atom")
        assert "task.denoising.drop_path_per: no effect" in caplog.text


def test_a_checkpoint_of_pre_training_is_no_checkpoint_of_training_and_says_what_to_do(data, pretrained, tmp_path):
    trainer = make_trainer(tiny_config(data, denoising={"scd": {}}), tmp_path)
    with pytest.raises(ConfigError, match=r"--checkpoint: it is of a run without outputs.*finetune_config"):
        trainer.load_checkpoint(pretrained)
    trainer.save()
    other = make_trainer(pretraining(data), tmp_path, identifier="other")
    with pytest.raises(ConfigError, match=r"--checkpoint: it is of a run with outputs.*finetune_config"):
        other.load_checkpoint(f"{folder_of(trainer)}/checkpoint.pt")
    with pytest.raises(ConfigError, match=r"no heads and predicts nothing.*finetune_config"):
        to_plain(read(pretrained))
    config = pretraining(data)
    config["model"]["heads"] = copy.deepcopy(HEADS["equiformer_v2"])  # the same weights as with outputs
    kept = make_trainer(config, tmp_path, identifier="kept")
    kept.save()
    with pytest.raises(ConfigError, match=r"--checkpoint: it is of a run without outputs.*finetune_config"):
        trainer.load_checkpoint(f"{folder_of(kept)}/checkpoint.pt")


def test_a_mask_token_goes_along_or_is_an_error(data, tmp_path):
    block = {"scd": {"null_condition": "mask_token"}}
    masked = make_trainer(pretraining(data, denoising=block), tmp_path)
    masked.train(disable_eval_tqdm=True)
    start = f"{folder_of(masked)}/checkpoint.pt"
    for other in ({"noisy_nodes": {}}, {"scd": {}}):
        with pytest.raises(ConfigError, match=r"starting_checkpoint: its backbone was trained under a mask token"):
            make_trainer(finetuning(data, start, other), tmp_path, identifier="other")
    kept = finetuning(data, start, {"noisy_nodes": {}, "scd": {"null_condition": "mask_token", "prob": 0}})
    trainer = make_trainer(kept, tmp_path, identifier="kept")
    state, source = trainer.model.state_dict(), read(start)["state_dict"]
    added = [key for key in source if key.startswith("denoising.scd.")]
    assert all(torch.equal(state[key], source[key]) for key in added)
    identity = make_trainer(pretraining(data), tmp_path, identifier="identity")
    for trainer, path in ((identity, start), (masked, None)):
        if path is None:
            identity.save()
            path = f"{folder_of(identity)}/checkpoint.pt"
        with pytest.raises(ConfigError, match="mask_token"):
            trainer.load_checkpoint(path)


def test_fine_tuning_with_a_backbone_of_its_own_is_warned_of_and_without_heads_refused(
    data, pretrained, tmp_path, caplog
):
    config = finetuning(data, pretrained, {"scd": {}})
    config["model"]["backbone"] = tiny_config(data)["model"]["backbone"]
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(config, tmp_path)
    assert "the backbone starts from scratch" in caplog.text
    head = "denoising.scd.noise_head.force_block.alpha_dot"
    assert not torch.equal(trainer.model.state_dict()[head], read(pretrained)["state_dict"][head])
    config = finetuning(data, pretrained, {"scd": {}})
    config["model"].pop("heads")
    with pytest.raises(ConfigError, match=r"model\.heads: none, but outputs names some"):
        make_trainer(config, tmp_path)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_absent_outputs_are_not_taken_for_none(data, tmp_path):
    config = pretraining(data)
    config.update(loss_functions={})
    with pytest.raises(ConfigError, match=r"outputs, loss_functions: absent.*outputs: \{\}.*loss_functions: \[\]"):
        make_trainer(config, tmp_path)
    for key, there, gone in (("outputs", "loss_functions", {}), ("loss_functions", "outputs", [])):
        config = tiny_config(data, denoising={"scd": {}})
        config[key] = gone
        with pytest.raises(ConfigError, match=rf"{there} is there, and {key} empty or absent"):
            make_trainer(config, tmp_path)


def test_structures_of_one_atom_are_refused_unless_their_cells_are_repeated(tmp_path):
    config = pretraining(tmp_path)
    config["dataset"] = {"train": plain_database(tmp_path / "data.db", [Atoms("Cu", cell=[2.5] * 3, pbc=True)] * 4)}
    with pytest.raises(ConfigError, match=r"have one atom each.*repeat_cells"):
        make_trainer(config, tmp_path)
    config["task"]["denoising"]["repeat_cells"] = {}
    trainer = make_trainer(config, tmp_path)
    assert batch_of(trainer).natoms.min() >= 4


def test_every_step_of_pre_training_must_denoise(data, tmp_path):
    with pytest.raises(ConfigError, match=r"task\.denoising\.scd\.prob: 0\.5.*must sum to 1"):
        make_trainer(pretraining(data, denoising={"scd": {"prob": 0.5}}), tmp_path)
    with pytest.raises(ConfigError, match=r"task\.denoising names no task"):
        make_trainer(pretraining(data, denoising={}), tmp_path)
    with pytest.raises(ConfigError, match=r"outputs: no 'forces'; task\.denoising\.dens"):
        make_trainer(pretraining(data, denoising={"dens": {"prob": 1}}), tmp_path)


@pytest.mark.parametrize(
    ("block", "change", "error", "message"),
    [
        ({"condition": ["self", "forces"]}, {}, ConfigError, r"task\.denoising\.scd needs the label 'forces'"),
        ({"denoise_tags": [2]}, {"tags": None}, ConfigError, r"task\.denoising\.scd needs the label 'tags'"),
        (
            {"denoise_tags": [7]},
            {},
            ConfigError,
            r"denoise_tags: none of .* an atom .* \[7\]; their tags: \[0, 1, 2\]",
        ),
        ({"embed_tags": [7]}, {}, ConfigError, r"embed_tags: none of .* an atom .* \[7\]; their tags: \[0, 1, 2\]"),
        ({}, {"fixed": 1}, ConfigError, r"every atom of the 4 structures .* is fixed"),
        ({}, {"pos": float("nan")}, DataError, r"structure sid/fid 2: pos of an atom is not finite"),
        ({}, {"cell": float("inf")}, DataError, r"structure sid/fid 2: cell is not finite"),
    ],
)
def test_data_that_cannot_be_denoised_ends_in_one_error(block, change, error, message, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    with lmdb.open(str(folder / "data.lmdb"), subdir=False, map_size=2**24) as db, db.begin(write=True) as transaction:
        for i, row in enumerate(slabs(4)):
            del row.energy, row.forces, row.fid
            row.sid = i
            for key, value in change.items():
                if value is None:
                    del row[key]
                elif key == "fixed" or i == 2:
                    row[key].view(-1)[-1 if key == "pos" else slice(None)] = value
            transaction.put(f"{i}".encode(), pickle.dumps(row))
    config = pretraining(tmp_path, denoising={"scd": block})
    config["dataset"] = {"train": {"format": "lmdb", "src": str(folder)}}
    with pytest.raises(error, match=message):
        make_trainer(config, tmp_path)


def test_a_label_that_is_not_finite_stops_before_the_weights_are_touched(data, tmp_path):
    class Spoilt:
        def __getitem__(self, index):
            row = inner[index]
            if index == 1:
                row.energy = torch.tensor(float("nan"))
            return row

        def __len__(self):
            return len(inner)

    trainer = make_trainer(tiny_config(data, denoising={"scd": {}}, optim={"batch_size": 8}), tmp_path)
    guarded = trainer.train_loader.dataset
    inner, guarded.dataset = guarded.dataset, Spoilt()
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    name = structures_of(inner[1]).ids[0]
    with pytest.raises(DataError, match=rf"dataset\.train, row \d+: structure sid/fid {name}: energy is not finite"):
        trainer.train(disable_eval_tqdm=True)
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())
