"""The models of the studies: their neighbours, forms of the condition, and probes of their embeddings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.calculators.emt import EMT
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import setup_imports
from fairchem.core.datasets import data_list_collater
from fairchem.core.models.base import HydraModel
from fairchem.core.preprocessing import AtomsToGraphs

from benchmarks.evidence import (
    condition,
    forms,
    probes,
    structures,
)
from benchmarks.evidence.forms.difference import mean_of_structures
from benchmarks.evidence.neighbors import KeptNeighbors
from benchmarks.evidence.noise import (
    judge,
    judged,
    noise_errors,
    of_structures,
    shrinkage_errors,
)
from benchmarks.evidence.structures import Splits
from benchmarks.evidence.trained import Length, Model, Pretraining, pretrain, quieten, train_labels
from fairchem_scd.denoising.conditions.self_condition import ConditionHead
from fairchem_scd.denoising.passes import embed
from fairchem_scd.denoising.plan import NOISE, VALIDATION, Plan
from fairchem_scd.testing import stirred

setup_imports()


@pytest.fixture(scope="module")
def batch() -> Any:
    converter = AtomsToGraphs(r_energy=False, r_forces=False, r_edges=False, r_pbc=True)
    rows = []
    for i, atoms in enumerate(
        structures.load("four_atoms", None).test[:3] + structures.load("two_atoms", None).test[:2]
    ):
        row = converter.convert(atoms)
        row.sid, row.fid, row.natoms = i, 0, len(atoms)
        rows.append(row)
    return data_list_collater(rows, otf_graph=True)


def hydra(name: str, *, self_supervised: bool = False, **denoising: Any) -> Any:
    torch.manual_seed(0)
    block = Model(name, layers=2, channels=8, lmax=1, radius=4.5, neighbors=60).block()
    kind = registry.get_model_class("fairchem_scd.DenoisingHydra") if denoising else HydraModel
    if denoising:
        block |= {"denoising": denoising, "self_supervised": self_supervised}
    del block["name"]
    return kind(**block).eval()


def test_kept_neighbours_are_the_hosts_where_atoms_moved_a_little_and_where_far(batch: Any) -> None:
    host, kept = hydra("painn"), hydra("painn")
    KeptNeighbors(kept.backbone)
    start = batch.pos.clone()
    for displacement in (0.0, 0.1, 0.8):
        torch.manual_seed(1)
        batch.pos = start + displacement * torch.randn_like(start)
        expected, found = host.backbone.generate_graph(batch), kept.backbone.generate_graph(batch)
        assert torch.equal(found.neighbors, expected.neighbors)
        torch.testing.assert_close(found.edge_distance.sort().values, expected.edge_distance.sort().values)
        torch.testing.assert_close(kept(batch)["forces"], host(batch)["forces"], atol=1e-5, rtol=1e-4)
    batch.pos = start


@pytest.mark.parametrize("name", ["equiformer_v2", "escn", "esen", "esen_conservative"])
def test_kept_neighbours_change_no_other_backbone_either(name: str, batch: Any) -> None:
    host, kept = hydra(name), hydra(name)
    KeptNeighbors(kept.backbone)
    for model in (host, kept):
        torch.manual_seed(0)  # eSCN and EquiformerV2 turn their edges' frames at random
        model.seen = forces_of(model(batch.clone()))
    torch.testing.assert_close(kept.seen, host.seen, atol=1e-5, rtol=1e-3)


def forces_of(out: Any) -> torch.Tensor:
    return out.get("energy_and_forces", out)["forces"].detach()


def test_kept_neighbours_are_not_searched_again_for_atoms_that_come_back_into_the_cell(batch: Any) -> None:
    host, kept = hydra("painn"), hydra("painn")
    neighbors = KeptNeighbors(kept.backbone)
    start = batch.pos.clone()
    kept(batch)
    before = dict(neighbors._found)
    torch.manual_seed(1)
    cells = torch.einsum("ni,nij->nj", torch.randint(-1, 2, start.shape).float(), batch.cell[batch.batch])
    batch.pos = start + 0.05 * torch.randn_like(start)
    expected = host(batch)["forces"]
    batch.pos = batch.pos + cells
    torch.testing.assert_close(kept(batch)["forces"], expected, atol=1e-5, rtol=1e-4)
    assert neighbors._found == before
    batch.pos = start


def test_kept_neighbours_refuse_to_cut(batch: Any) -> None:
    model = hydra("painn")
    model.backbone.max_neighbors = 3
    KeptNeighbors(model.backbone)
    with pytest.raises(ValueError, match="more than 3 neighbours"):
        model(batch)


@pytest.mark.parametrize("name", ["painn", "equiformer_v2"])
def test_a_quiet_head_says_nothing_at_first_and_forces_stay(name: str, batch: Any) -> None:
    model = hydra(name)
    torch.manual_seed(0)
    before = model(batch)
    assert before["energy"].abs().min() > 0
    quieten(SimpleNamespace(_unwrapped_model=model, ema=None))
    torch.manual_seed(0)
    after = model(batch)
    assert torch.equal(after["energy"], torch.zeros_like(after["energy"]))
    assert torch.equal(after["forces"], before["forces"])


def test_means_of_structures(batch: Any) -> None:
    values = torch.arange(len(batch.pos), dtype=torch.float)[:, None] * torch.tensor([[1.0, -2.0]])
    expected = torch.stack([part.mean(dim=0) for part in values.split(batch.natoms.tolist())])
    torch.testing.assert_close(mean_of_structures(values, batch.batch, len(batch.natoms)), expected)


def test_shrinkage_leaves_of_the_noise_what_its_formula_says() -> None:
    cells = structures.CELLS["four_atoms"]
    rng = np.random.default_rng(3)
    made = [cells.make(rng) for _ in range(400)]
    rows = [AtomsToGraphs(r_energy=False, r_forces=False, r_edges=False).convert(atoms) for atoms in made]
    for i, row in enumerate(rows):
        row.sid, row.fid = i, 0
    model = hydra("painn", scd={"std": 0.1, "condition": []}, self_supervised=True)
    trainer = SimpleNamespace(
        _unwrapped_model=model,
        tasks=model.denoising_tasks,
        val_dataset=rows,
        collater=lambda some: data_list_collater(some, otf_graph=True),
    )
    known = [torch.from_numpy(cells.displacements(atoms, atoms.positions)) for atoms in made]
    found = shrinkage_errors(trainer, known, cells.displacement)
    expected = 0.15**2 / (0.15**2 + 0.1**2) * 3 / 4  # of four atoms three move about their mean
    assert abs(found.mean() - expected) < 3 * found.std() / 400**0.5


@pytest.mark.parametrize("form", ["difference", *forms.LEVERS])
def test_other_forms_are_without_a_condition_the_plain_model_before_and_after_a_pass(form: str, batch: Any) -> None:
    expected = hydra("painn", scd={}, self_supervised=True)(batch)["forces"]
    model = changed(form)
    stirred(model)
    task = model.denoising_tasks["scd"]
    seen = model.structures_of(batch)
    planned = Plan("scd", task.passes(seen, task.corrupt(seen, seed=0, step=1), seed=0, step=1))
    for _ in range(2):
        if form != "mask token":
            assert torch.equal(model(batch)["forces"], expected)
        noise = model(batch, plan=planned)[NOISE]
    assert torch.equal(model(batch, plan=planned)[NOISE], noise)


DIFFERENCES = [form for form in forms.FORMS if form.startswith("difference")]
# What a form changes when models are judged; others change what is trained, or where training starts.
SAID_OTHERWISE = (
    *(
        "standardised",
        "standardised by running statistics",
        "standardised, without elements",
        "moments",
        "four vectors, pooled and read by attention",
        "into the input features too",
    ),
    *("into the update layers too", "gates of vector features too", "shift, scale and gate of the condition alone"),
    "five of these together",
)


@pytest.mark.parametrize("form", SAID_OTHERWISE)
def test_other_forms_tell_the_blocks_something_else(form: str, batch: Any) -> None:
    model, usual = changed(form), changed("embedding")
    for some in (model, usual):
        stirred(some)
    weights = {name: value for name, value in usual.state_dict().items() if name in model.state_dict()}
    if form != "shift, scale and gate of the condition alone":  # which names its layers otherwise
        model.load_state_dict(weights, strict=False)
    else:
        for block, other in zip(*(m.denoising["scd"]["modulation"].blocks for m in (model, usual)), strict=True):
            torch.nn.Sequential(*[*block.mlp][1:]).load_state_dict(other.mlp.state_dict())
    found, expected = (noise_errors(validating(some, batch)) for some in (model, usual))
    assert (found - expected).abs().max() > 1e-4
    told = judged(validating(model, batch))
    assert (of_structures(told, "right") - of_structures(told, "other")).abs().max() > 1e-4


@pytest.mark.parametrize(
    "form", ["into the update layers too", "gates of vector features too", "five of these together"]
)
def test_forms_in_the_backbone_predict_noise_that_turns_with_the_structure(form: str, batch: Any) -> None:
    model = changed(form)
    stirred(model)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    turned = batch.clone()
    turned.pos, turned.cell = batch.pos @ turn, batch.cell @ turn
    noise = []
    for some, moved in ((batch, torch.eye(3)), (turned, turn)):
        seen = model.structures_of(some)
        task = model.denoising_tasks["scd"]
        drawn = task.corrupt(model.structures_of(batch), seed=0, step=1)
        passes = task.passes(seen, replace(drawn, noise=drawn.noise @ moved), seed=0, step=1)
        noise.append(model(some, plan=Plan("scd", passes))[NOISE])
    torch.testing.assert_close(noise[0] @ turn, noise[1], atol=1e-4, rtol=1e-3)


def test_faster_weights_take_five_times_the_step() -> None:
    fast, usual = changed("five times the learning rate"), changed("embedding")
    moved = []
    for model in (fast, usual):
        layer = model.denoising["scd"]["condition_head"].structure[1]
        before = layer.weight.detach().clone()
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
        (layer.weight * torch.arange(1.0, 9.0)).sum().backward()
        optimizer.step()
        moved.append(layer.weight.detach() - before)
    torch.testing.assert_close(moved[0], 5 * moved[1], rtol=1e-3, atol=1e-6)


def test_noise_falls_from_four_times_its_size(batch: Any) -> None:
    task, usual = (changed("embedding").denoising_tasks["scd"] for _ in range(2))
    forms.FORMS["σ from large to small"].change_task(task)
    seen = changed("embedding").structures_of(batch)
    for step, factor in ((7, 4.0), (257, 2.0), (507, 1.0), (900, 1.0), (VALIDATION, 1.0)):
        drawn, expected = (some.corrupt(seen, seed=0, step=step) for some in (task, usual))
        torch.testing.assert_close(drawn.noise, factor * expected.noise)
        torch.testing.assert_close(drawn.sigma, factor * expected.sigma)


def test_noise_keeps_its_mean_and_nothing_else_is_changed(batch: Any) -> None:
    task, usual = (changed("embedding").denoising_tasks["scd"] for _ in range(2))
    forms.FORMS["mean of the noise kept"].change_task(task)
    seen = changed("embedding").structures_of(batch)
    means = []
    for step in range(400):
        drawn, expected = (some.corrupt(seen, seed=0, step=step) for some in (task, usual))
        added = drawn.noise - expected.noise
        means.append(mean_of_structures(added, batch.batch, len(batch.natoms)))
        torch.testing.assert_close(added, means[-1][batch.batch])
    found = torch.stack(means).std(dim=(0, 2)) * batch.natoms.sqrt()
    torch.testing.assert_close(found, torch.full_like(found, 0.1), rtol=0.1, atol=0)
    judged_on = [some.corrupt(seen, seed=0, step=VALIDATION).noise for some in (task, usual)]
    assert torch.equal(*judged_on)


def test_shrinkage_is_told_the_displacements_of_the_structure_whose_noise_it_predicts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The host shuffles rows. Without their displacements two atoms are half of the cell's diagonal apart."""
    seen = []

    def errors(trainer: Any, known: list[torch.Tensor], size: float) -> torch.Tensor:
        for i, displacement in enumerate(known):
            row = trainer.val_dataset[i]
            sites = row.pos - displacement.float()
            seen.append((sites[1] - sites[0]) @ torch.linalg.inv(row.cell[0]) % 1)
        return torch.ones(len(known))

    monkeypatch.setattr(condition, "shrinkage_errors", errors)
    model = Model(layers=1, channels=8, neighbors=60, mixed_sizes=False)
    condition.train(condition.Run("two_atoms", condition.SHRINKAGE, 0.1, model, Length(1, 16, 1e-3), 0, 8), None)
    torch.testing.assert_close(torch.stack(seen), torch.full((len(seen), 3), 0.5), atol=1e-4, rtol=0)


def test_what_a_form_changes_reaches_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer has tasks of its own, beside those of its model."""
    seen = []

    def watched(trainer: Any, points: int) -> dict[str, Any]:
        batch = next(iter(trainer.train_loader))
        structures_seen = trainer._unwrapped_model.structures_of(batch)
        drawn = trainer.draw_task(0).corrupt(structures_seen, seed=0, step=0)
        trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        added = getattr(trainer._unwrapped_model.denoising["scd"]["modulation"], "added", None)
        seen.append((drawn.sigma[0].item(), added is not None and id(added.weight) in trained))
        return {}

    monkeypatch.setattr(condition, "watch_denoising", watched)
    for form in ("σ from large to small", "into the input features too"):
        model = Model(layers=1, channels=8, neighbors=60)
        condition.train(condition.Run("two_atoms", form, 0.1, model, Length(4, 2, 1e-3), seed=0, count=8), None)
    assert seen == [(pytest.approx(0.4), False), (pytest.approx(0.1), True)]


def test_the_contrastive_term_pulls_the_two_errors_apart(batch: Any) -> None:
    def gap_and_gradient(form: str) -> tuple[float, torch.Tensor]:
        model = changed(form).train()
        stirred(model)
        task = model.denoising_tasks["scd"]
        seen = model.structures_of(batch)
        corruption = task.corrupt(seen, seed=0, step=1)
        noise = model(batch, plan=Plan("scd", task.passes(seen, corruption, seed=0, step=VALIDATION)))[NOISE]
        weight = model.denoising["scd"]["condition_head"].structure[-1].weight
        (noise * 0).sum().backward()
        return noise.detach(), weight.grad

    (noise, gradient), (usual, none) = gap_and_gradient("contrastive term"), gap_and_gradient("embedding")
    torch.testing.assert_close(noise, usual)
    assert none.abs().max() == 0 < gradient.abs().max()


def test_dropped_by_atom_some_atoms_of_a_structure_have_no_condition(batch: Any) -> None:
    modulation = changed("dropped by atom").denoising["scd"]["modulation"]
    all_of_them = torch.ones(1000, dtype=torch.bool)
    for training, share in ((True, 0.9), (False, 1.0)):
        bound = modulation.train(training).bind(torch.zeros(1000, 8), all_of_them)
        assert bound._conditioned.float().mean() == pytest.approx(share, abs=0.04)


def test_an_atom_is_told_of_its_own_element_alone() -> None:
    model = changed("pooled by element")
    stirred(model)
    told = []
    head, block = model.denoising["scd"]["condition_head"], model.denoising["scd"]["modulation"].blocks[0]
    block.mlp.register_forward_pre_hook(lambda module, inputs: told.append(inputs[0][:, :8]))
    numbers, features = torch.tensor([1, 8, 1]), torch.randn(3, 8)
    one = torch.zeros(3, dtype=torch.long)
    for moved in (features, features + torch.tensor([0.0, 1.0, 0.0])[:, None] * torch.randn(8)):
        head.numbers.note(None, (SimpleNamespace(atomic_numbers=numbers),))
        condition = head.condition(head(moved, one, 1), torch.ones(1, dtype=torch.bool))
        block(features, condition[one], torch.ones(3, dtype=torch.bool))
    before, after = told
    assert torch.equal(before[0], before[2])
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert (before[1] - after[1]).abs().max() > 1e-3
    expected = head.norm(head.structure(head.atoms(features)[[0, 2]].sum(dim=0)))
    torch.testing.assert_close(before[0], expected)


def test_what_features_owe_to_their_elements_is_not_told() -> None:
    model = changed("standardised, without elements")
    head = model.denoising["scd"]["condition_head"].train()
    numbers, features = torch.tensor([1, 8, 1, 8]), torch.randn(4, 8)
    made = []
    for moved in (features, features + torch.randn(100, 8)[numbers]):
        head.atoms[0].seen.zero_()
        head.atoms[0].scale.batches.zero_()
        head.numbers.note(None, (SimpleNamespace(atomic_numbers=numbers),))
        made.append(head(moved, torch.tensor([0, 0, 1, 1]), 2))
    torch.testing.assert_close(*made)
    assert (made[0][0] - made[0][1]).abs().max() > 1e-3


def test_the_difference_of_embeddings_is_that_of_the_clean_and_the_noisy_structure(batch: Any) -> None:
    model = changed("difference of embeddings")
    stirred(model)
    differences = []
    model.scales[0].register_forward_pre_hook(lambda _, inputs: differences.append(inputs[0]))
    task, seen = model.denoising_tasks["scd"], model.structures_of(batch)
    planned = task.passes(seen, task.corrupt(seen, seed=0, step=1), seed=0, step=1)
    model(batch, plan=Plan("scd", planned))
    moved = batch.clone()
    moved.pos = planned[-1].pos
    clean, noisy = (embed(model, some, model.structures_of(some)) for some in (batch, moved))
    torch.testing.assert_close(differences, [clean - noisy])
    assert differences[0].abs().max() > 1e-3


@pytest.mark.parametrize("form", DIFFERENCES)
def test_beside_differences_the_embedding_counts_where_the_form_says_so(
    form: str, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = changed(form)
    stirred(model)
    monkeypatch.setattr(type(model.scales[0]), "forward", lambda scale, difference: torch.zeros_like(difference))
    told = judged(validating(model, batch))
    apart = (of_structures(told, "right") - of_structures(told, "other")).abs().max()
    assert (apart > 1e-3) == ("beside" in form)


def changed(form: str) -> Any:
    """A small model with a form of the condition."""
    model = hydra("painn", scd={"std": 0.1, "std_reg": 0.0, **forms.FORMS[form].scd}, self_supervised=True)
    if (change := forms.FORMS[form].change) is not None:
        change(model)
    return model.eval()


def validating(model: Any, batch: Any) -> Any:
    """As much of a trainer as judging needs."""
    rows = batch.to_data_list()
    return SimpleNamespace(
        _unwrapped_model=model,
        tasks=model.denoising_tasks,
        val_dataset=rows,
        collater=lambda some: data_list_collater(some, otf_graph=True),
    )


def test_moments_of_equal_atoms_are_those_of_one_atom() -> None:
    head = ConditionHead(8)
    head.__class__ = forms.embeddings.Moments
    atoms, one = torch.randn(1, 8), torch.zeros(1, dtype=torch.long)
    pooled = []
    head.structure.register_forward_pre_hook(lambda module, inputs: pooled.append(inputs[0]))
    head(atoms, one, 1)
    head(atoms.expand(3, -1), one.expand(3), 1)
    torch.testing.assert_close(pooled[1], pooled[0] * torch.tensor([3.0] * 4 + [1.0] * 4))


@pytest.mark.parametrize("form", ["embedding", *DIFFERENCES])
def test_held_out_structures_are_judged_as_the_package_does_in_any_form(form: str, batch: Any) -> None:
    model = changed(form)
    stirred(model)
    trainer = validating(model, batch)
    found, errors = judged(trainer), noise_errors(trainer)
    right, other, none = (of_structures(found, told) for told in ("right", "other", "none"))
    torch.testing.assert_close(right, errors, rtol=1e-4, atol=0)
    assert judge(trainer)["right"][0] == pytest.approx(float(right.mean()), abs=1e-6)
    report = found.report()
    assert report.mse.right == pytest.approx(float(right.mean()))
    assert all((a - b).abs().max() > 1e-3 for a, b in ((right, other), (right, none), (other, none)))
    channels = 8
    assert 1 < report.dimensions < channels
    # Told its own means as "another's", a structure is told the right ones.
    found._others = {what: embedding for (what, _), embedding in found._told.items()}
    with torch.no_grad():
        found.second(batch)
    torch.testing.assert_close(of_structures(found, "other"), right, rtol=1e-4, atol=0)


# --- probes -------------------------------------------------------------------------------------------------------


def test_a_linear_probe_finds_what_is_linear_and_chooses_its_penalty_as_leaving_each_out_does() -> None:
    rng = np.random.default_rng(0)
    x, x_test = rng.standard_normal((40, 6)), rng.standard_normal((20, 6))
    w = rng.standard_normal(6)
    np.testing.assert_allclose(probes.ridge(x, x @ w + 3, x_test), x_test @ w + 3, atol=1e-2)
    y = x @ w + 3 * rng.standard_normal(40)
    errors = []
    for penalty in probes.PENALTIES * len(x):
        left = []
        for i in range(len(x)):
            others = np.arange(len(x)) != i
            # Standardised by all, as the probe does it; the mean is of the others.
            z = (x - x.mean(axis=0)) / x.std(axis=0)
            augmented = np.c_[z[others], np.ones(len(x) - 1)]
            gram = augmented.T @ augmented + np.diag([*[penalty] * 6, 0])
            left.append(y[i] - np.r_[z[i], 1] @ np.linalg.solve(gram, augmented.T @ y[others]))
        errors.append(np.mean(np.square(left)))
    penalty = len(x) * probes.PENALTIES[int(np.argmin(errors))]
    z, z_test = ((values - x.mean(axis=0)) / x.std(axis=0) for values in (x, x_test))
    weights = np.linalg.solve(z.T @ z + penalty * np.eye(6), z.T @ (y - y.mean()))
    np.testing.assert_allclose(probes.ridge(x, y, x_test), z_test @ weights + y.mean(), rtol=1e-6)


def test_probes_score_by_the_variance_left_over_and_by_wrong_classes() -> None:
    x = np.array([[0.0], [1.0], [10.0], [11.0]])
    classes = np.array(["a", "a", "b", "b"])
    x_test, test = np.array([[2.0], [9.0], [9.5]]), np.array(["a", "b", "a"])
    mean_alone = np.array([1.0, -1.0, 1.0])
    scores = probes.probe(x, x_test, {"group": (classes, test), "number": (x[:, 0], x_test[:, 0])})
    assert scores["group"] == pytest.approx(1 / 3, abs=1e-5)
    assert scores["number"] < 1e-3
    apart = np.array([[False, False, True, True]] * 2 + [[True, True, False, False]])
    assert probes.nearest(x, classes, x_test, apart).tolist() == ["a", "a", "b"]
    unknowable = probes.probe(np.zeros((4, 1)), np.zeros((3, 1)), {"number": (classes == "a", mean_alone)})
    assert unknowable["number"] == pytest.approx(1.0)


# --- starts -------------------------------------------------------------------------------------------------------


def test_a_backbone_pre_trained_in_a_form_with_other_modules_starts_a_run(tmp_path: Path) -> None:
    rows = []
    for seed in range(3):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(0.1, seed=seed)
        atoms.calc = EMT()
        rows.append(structures.with_labels(atoms))
    model, splits, checkpoint = Model(layers=1, channels=8, neighbors=60), Splits(rows, rows[:2], rows), tmp_path / "c"
    pretrain(model, Pretraining("standardised", 0.1, Length(2, 3, 1e-2), seed=0), splits, checkpoint)
    last = tmp_path / "after"
    length = Length(1, 3, 0.0, ema=None)
    options = {
        "start": checkpoint,
        "start_form": forms.FORMS["standardised"],
        "quiet_heads": True,
        "points": 1,
        "keep": last,
    }
    train_labels(model, length, splits, rows, seed=5, denoising={}, **options)
    before, after = (torch.load(path, weights_only=False)["state_dict"] for path in (checkpoint, last))
    for name, value in after.items():
        if ".backbone." in name:
            assert torch.equal(value, before[name]), name


# --- errors -------------------------------------------------------------------------------------------------------


def test_errors_of_groups_are_those_of_all_test_structures_taken_apart() -> None:
    rows = []
    for count, group in ((1, "Bulk"), (2, "Surface"), (2, "Bulk")):
        atoms = bulk("Cu", cubic=True).repeat((count, 1, 1))
        atoms.rattle(0.1, seed=len(rows))
        atoms.calc = EMT()
        atoms = structures.with_labels(atoms)
        atoms.info["group"] = group
        rows.append(atoms)
    scores = train_labels(
        Model(layers=1, channels=8, neighbors=60),
        Length(2, 3, 1e-3),
        Splits(rows, rows[:1], rows),
        rows,
        seed=0,
        denoising={},
        start=None,
        quiet_heads=False,
        points=1,
    )
    groups, together = scores["test_groups"], scores["test"]
    assert {name: group["structures"] for name, group in groups.items()} == {"Bulk": 2, "Surface": 1}
    for error, weights in (("energy_mae", {"Bulk": 2, "Surface": 1}), ("force_mae", {"Bulk": 4 + 8, "Surface": 8})):
        mean = sum(weights[name] * groups[name][error] for name in groups) / sum(weights.values())
        assert mean == pytest.approx(together[error], rel=1e-4)
    assert groups["Bulk"]["energy_mae"] != groups["Surface"]["energy_mae"]
