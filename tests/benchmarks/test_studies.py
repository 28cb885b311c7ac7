"""The studies in benchmarks/: resuming, pairing, tables, and what they do to the host's models."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ase
import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import setup_imports
from fairchem.core.datasets import data_list_collater
from fairchem.core.models.base import HydraModel
from fairchem.core.preprocessing import AtomsToGraphs

from benchmarks.evidence import (
    components,
    condition,
    condition_tables,
    databases,
    forms,
    frontier,
    learning,
    probes,
    report,
    structures,
    tables,
)
from benchmarks.evidence.neighbors import KeptNeighbors
from benchmarks.evidence.noise import (
    judge,
    judged,
    mean_of_structures,
    noise_errors,
    of_structures,
    shrinkage_errors,
    told_differences,
)
from benchmarks.evidence.results import Results, key_of
from benchmarks.evidence.trained import Length, Model, quieten
from fairchem_scd.denoising.conditions.self_condition import ConditionHead
from fairchem_scd.denoising.plan import NOISE, VALIDATION, Plan
from fairchem_scd.testing import stirred

setup_imports()


def record(arm: str, seed: int, force: float, labels: int | None = 12, energy: float = 0.01) -> dict[str, Any]:
    run = {"data": "Mo", "arm": arm, "seed": seed, "labels": labels, "model": {"backbone": "painn", "channels": 8}}
    run["length"] = {"steps": 300, "lr": 0.001}
    errors = {"force_mae": force, "energy_mae": energy}
    scores = {"test": errors, "held_out": errors, "seconds_per_step": 0.5}
    return {"suite": "few", "run": run, "scores": scores}


# --- resuming -----------------------------------------------------------------------------------------------------


def test_a_run_in_the_file_is_not_claimed_again_whatever_the_order_of_its_keys(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.jsonl")
    with results.claimed({"a": 1, "b": {"c": 2, "d": None}}) as mine:
        assert mine
        results.append({"run": {"a": 1, "b": {"c": 2, "d": None}}})
    with results.claimed({"b": {"d": None, "c": 2}, "a": 1}) as mine:
        assert not mine
    with results.claimed({"a": 1, "b": {"c": 3, "d": None}}) as mine:
        assert mine


def test_a_run_is_claimed_by_one_worker_at_a_time_and_free_after_it(tmp_path: Path) -> None:
    first, second = Results(tmp_path / "r.jsonl"), Results(tmp_path / "r.jsonl")
    with first.claimed({"a": 1}) as one, second.claimed({"a": 1}) as two, second.claimed({"a": 2}) as other:
        assert (one, two, other) == (True, False, True)
    with second.claimed({"a": 1}) as two:
        assert two


def test_a_line_cut_short_counts_as_not_done_and_the_next_is_whole(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.jsonl")
    results.append({"run": {"a": 1}})
    with results.path.open("a") as file:
        file.write('{"run": {"a": 2}, "scor')
    results.append({"run": {"a": 3}})
    assert [r["run"] for r in results.records()] == [{"a": 1}, {"a": 3}]
    assert {"a": 2} not in results
    assert {"a": 3} in results


def test_settings_that_differ_have_other_names() -> None:
    one = {"length": {"steps": 300, "lr": 1e-3}, "labels": None}
    assert key_of(one) == key_of(json.loads(json.dumps(one)))
    assert key_of(one) != key_of({**one, "labels": 12})


def test_options_narrow_a_suite_down() -> None:
    line = ["few", "--data", ".", "--only", "Mo", "--arms", "plain", "SCD, then plain", "--labels", "24", "all"]
    runs = list(learning.chosen(learning._parse([*line, "--seeds", "3"])))
    assert [(r.data, r.labels, r.length.steps, r.arm, r.seed) for r in runs] == [
        ("Mo", labels, steps, arm, 3)
        for labels in (24, None)
        for steps in (300, 1000)
        for arm in ("plain", "SCD, then plain")
    ]
    assert runs[0].pretraining is None
    assert runs[1].pretraining == runs[-1].pretraining
    assert (runs[1].pretraining.scd, runs[1].pretraining.seed) == ({"std": 0.04}, 3)


def test_plain_denoising_twice_as_long_passes_as_many_structures_as_scd() -> None:
    runs = {run.arm: asdict(run) for run in learning.SUITES["molecules"].runs([0])}
    assert tables.passed(runs["plain denoising twice as long, then plain"]) == tables.passed(runs["SCD, then plain"])


@pytest.mark.parametrize("name", learning.SUITES)
def test_no_two_runs_of_a_suite_have_one_name(name: str) -> None:
    names = [key_of(asdict(run)) for run in learning.SUITES[name].runs([0, 1])]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", condition.SUITES)
def test_no_two_runs_of_the_condition_have_one_name(name: str) -> None:
    names = [key_of(asdict(run)) for run in condition.suite(name, [0, 1], None, None)]
    assert len(names) == len(set(names))


# --- data ---------------------------------------------------------------------------------------------------------


def test_more_labels_of_a_seed_contain_fewer_and_other_seeds_have_others() -> None:
    splits = structures.Splits(train=[ase.Atoms(f"H{n}") for n in range(1, 41)], held_out=[], test=[])
    few, more, other = splits.labelled(12, 0), splits.labelled(24, 0), splits.labelled(12, 1)
    assert few == more[:12]
    assert len(splits.labelled(None, 0)) == 40
    assert [len(a) for a in few] != [len(a) for a in other]
    with pytest.raises(ValueError, match="41 labels asked for; there are 40"):
        splits.labelled(41, 0)


def test_no_structure_is_in_two_splits() -> None:
    splits = structures.load("two_atoms", None)
    seen = [atoms.positions.tobytes() for part in (splits.train, splits.held_out, splits.test) for atoms in part]
    assert len(seen) == len(set(seen)) == 2400 + 128
    one, again = (structures.CELLS["two_atoms"].make(np.random.default_rng(0)) for _ in range(2))
    assert np.array_equal(one.positions, again.positions)


def test_molecules_stand_in_cells_too_large_to_meet_their_images_and_keep_their_labels(tmp_path: Path) -> None:
    water = ase.Atoms("OHH", [[0, 0, 0], [0, 0.76, 0.59], [0, -0.76, 0.59]])
    water.calc = SinglePointCalculator(water, energy=-1.5, forces=np.eye(3))
    for part in ("train", "test"):
        structures.write([water] * 5, tmp_path / f"molecules_{part}.db")
    splits = structures.load("molecules", tmp_path)
    assert [len(splits.train), len(splits.held_out), len(splits.test)] == [4, 1, 5]
    path = structures.write(splits.test, tmp_path / "written.db")
    for read in databases.read_file(Path(path)):
        assert read.get_potential_energy() == -1.5
        assert np.array_equal(read.get_forces(), np.eye(3))
        assert np.allclose(read.get_all_distances(), water.get_all_distances())
        assert read.pbc.all()
        assert min(read.cell.lengths()) >= 10


@pytest.mark.parametrize(("count", "steps"), [(12, 300), (155, 312)])
def test_a_length_is_in_steps_whatever_the_number_of_structures(count: int, steps: int) -> None:
    block = Length(300, 4, 1e-3).optim(count)
    epoch = -(-count // 4)
    assert block["max_epochs"] * epoch == steps
    assert int(block["scheduler_params"]["warmup_epochs"] * epoch) == 15


# --- models -------------------------------------------------------------------------------------------------------


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


def test_told_differences_or_not_the_plain_model_stays_what_it_is(batch: Any) -> None:
    model = hydra("painn", scd={})
    before = model(batch)["forces"]
    told_differences(model)
    assert torch.equal(model(batch)["forces"], before)


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


@pytest.mark.parametrize("form", condition.LEVERS)
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


# What a form changes when models are judged; others change what is trained, or where training starts.
SAID_OTHERWISE = (
    *("standardised", "moments", "four vectors, pooled and read by attention", "into the input features too"),
    *("into the update layers too", "gates of vector features too", "shift, scale and gate of the condition alone"),
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


@pytest.mark.parametrize("form", ["into the update layers too", "gates of vector features too"])
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
    model, usual = changed("σ from large to small"), changed("embedding")
    seen = model.structures_of(batch)
    for step, factor in ((7, 4.0), (257, 2.0), (507, 1.0), (900, 1.0), (VALIDATION, 1.0)):
        drawn, expected = (m.denoising_tasks["scd"].corrupt(seen, seed=0, step=step) for m in (model, usual))
        torch.testing.assert_close(drawn.noise, factor * expected.noise)
        torch.testing.assert_close(drawn.sigma, factor * expected.sigma)


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


def changed(form: str) -> Any:
    """A small model with a form of the condition."""
    model = hydra("painn", scd={"std": 0.1, "std_reg": 0.0, **condition.FORMS[form].scd}, self_supervised=True)
    if (change := condition.FORMS[form].change) is not None:
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
    head.__class__ = forms._Moments
    atoms, one = torch.randn(1, 8), torch.zeros(1, dtype=torch.long)
    pooled = []
    head.structure.register_forward_pre_hook(lambda module, inputs: pooled.append(inputs[0]))
    head(atoms, one, 1)
    head(atoms.expand(3, -1), one.expand(3), 1)
    torch.testing.assert_close(pooled[1], pooled[0] * torch.tensor([3.0] * 4 + [1.0] * 4))


@pytest.mark.parametrize("form", ["embedding", "difference"])
def test_held_out_structures_are_judged_as_the_package_does_in_either_form(form: str, batch: Any) -> None:
    model = hydra("painn", scd={"std": 0.1}, self_supervised=True)
    if form == "difference":
        told_differences(model)
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


# --- tables -------------------------------------------------------------------------------------------------------


def test_changes_are_between_runs_of_the_same_seed() -> None:
    assert tables.change({0: 50.0, 1: 220.0, 2: 7.0}, {0: 100.0, 1: 200.0}) == "-50, +10 %"
    assert tables.change({0: 50.0, 1: 220.0, 2: 7.0}, {0: 100.0, 1: 200.0, 2: 7.0}) == "-13 ± 32 %"
    assert tables.change({0: 50.0}, {1: 100.0}) == ""


def test_labels_saved_are_exact_on_a_power_law() -> None:
    curve = {n: 8 / n**0.5 for n in (12, 24, 48, 96)}
    assert tables.labels_for(8 / 30**0.5, curve) == pytest.approx(30)
    assert tables.labels_for(0.1, curve) is None
    records = [record("plain", 0, error, n) for n, error in curve.items()]
    line = tables.saved_table([*records, record("SCD, then plain", 0, 8 / 36**0.5, 12)]).splitlines()[-1]
    assert "| 12 | 1 | 3.0 |" in line


def test_the_length_that_is_best_on_held_out_structures_is_taken_for_each_arm_and_budget() -> None:
    def run(arm: str, seed: int, steps: int, held_out: float, test: float) -> dict[str, Any]:
        line = record(arm, seed, test)
        line["run"]["length"]["steps"] = steps
        line["scores"]["held_out"] = {"force_mae": held_out, "energy_mae": 0.0}
        return line

    short = [run("plain", seed, 300, 0.3, 0.1) for seed in (0, 1)]
    long = [run("plain", seed, 1000, 0.2, 0.4) for seed in (0, 1)]
    once = run("plain", 0, 3000, 0.1, 0.1)  # not for as many seeds
    other = [run("SCD", 0, 300, 0.1, 0.2), run("SCD", 0, 1000, 0.2, 0.1)]
    assert tables.tuned([*short, *long, once, *other]) == [*long, other[0]]
    more = [record("plain", seed, 0.05, 24) for seed in (0, 1)]  # for 300 steps alone
    assert tables.tuned([*short, *long, *more, *other]) == [*short, *more, other[0]]


def test_the_rate_that_is_best_on_held_out_structures_is_shown() -> None:
    runs = [record("plain", 0, error) for error in (0.3, 0.2)]
    runs[0]["run"]["length"]["lr"] = 0.01
    assert tables.best_rates(runs) == runs[1:]


def test_arms_stand_beside_plain_training_of_the_same_labels() -> None:
    records = [record("plain", 0, 0.2), record("plain", 1, 0.1), record("plain", 0, 0.05, None)]
    records += [record("DeNS", 0, 0.1), record("DeNS", 1, 0.2)]
    lines = tables.arms_table(records).splitlines()[2:]
    assert [line.split(" | ")[2:8] for line in lines] == [
        ["8", "12", "300", "plain", "2", "0.001"],
        ["8", "12", "300", "DeNS", "2", "0.001"],
    ], "with all labels there is nothing to compare"
    assert "| 100.0, 200.0 | -50, +100 % |" in lines[1]


def test_the_last_fifth_of_a_curve_tells_whether_errors_still_fell() -> None:
    line = record("plain", 0, 0.1)
    line["scores"]["curve"] = [{"step": step, "energy_mae": error} for step, error in ((60, 3), (240, 2), (300, 1.5))]
    assert tables._last_fifth([line]) == "-25 %"


def test_a_ratio_of_paired_errors_has_no_error_where_they_are_proportional() -> None:
    assert condition_tables.ratio_of([0.5, 1.0, 2.0], [1.0, 2.0, 4.0]) == "0.500 ± 0.000"
    assert condition_tables.ratio_of([1.0, 3.0], [2.0, 2.0]) == "1.000 ± 0.500"


def test_the_frontier_compares_equal_settings_and_names_the_one_that_was_changed() -> None:
    def line(run: condition.Run, right: float) -> dict[str, Any]:
        told = {"none": [2 * right] * 2} if run.form == "plain" else {"right": [right, right]}
        last = {"none": [2 * right, 0.0], "other_minus_right": [0.3, 0.1], "dimensions": 2.0}
        scores = {"structures": told, "curve": [last]}
        return {"suite": "frontier", "run": asdict(run), "structures": run.count or 2000, "scores": scores}

    runs = list(condition.suite("frontier", [0], None, None))
    records = [line(run, 0.1 * run.model.channels) for run in runs]
    alone = line(replace(runs[0], form="embedding", std=9.0), 1.0)
    found = frontier.points([*records, alone])
    assert [(p.changed, p.values[p.changed or "channels"]) for p in found] == [
        (None, 64),
        *(("channels", channels) for channels in (16, 128)),
        *(("σ, Å", std) for std in (0.01, 0.1)),
        ("training structures", 100),
        ("batch size", 8),
        ("blocks", 5),
        ("training structures", 500),
        ("channels", 32),
        ("blocks", 2),
        ("σ, Å", 0.2),
    ]
    assert {p.gain.value for p in found} == {0.5}
    # The usual run has another suite's name where it was done for that.
    shared = [{**line, "suite": "levers"} for line in records[:2]]
    assert report.parted([*shared, *records[2:]]) == ([], [*shared, *records[2:]], shared)
    assert report.parted(shared) == ([], [], shared)
    rows = frontier.frontier_table(records).splitlines()
    assert "| molecules | 0 | channels 16 | 3.2000 ± 0.0000 | 0.500 ± 0.000 | 3.0 | 2.0 |" in rows


def test_only_structures_of_like_size_are_taken_together_and_few_ones_not_at_all() -> None:
    atoms = np.array([2] + [4] * 10 + [5] * 3 + [7] + [53] * 6 + [54] * 8)
    rows = components._of_like_size(atoms)
    assert [sorted(set(atoms[i].tolist())) for i in rows] == [[4, 5], [53, 54]]
    assert [len(i) for i in rows] == [13, 14]


def test_the_explained_share_is_counted_in_components_of_the_noise() -> None:
    atoms = np.full(20, 5)
    plain = np.linspace(0.5, 1.5, 20)
    group = components.Group("molecules", "painn 64", "embedding", 0, atoms, 0.75 * plain, plain)
    assert group.freedom == 12
    assert "| 20 | 1 | 25.0 ± 0.0 | 3.0 ± 0.0 | 3.0 |" in components.components_table([group])


def test_forms_are_compared_with_the_shipped_one_on_the_same_structures() -> None:
    def line(form: str, told: str, errors: list[float]) -> dict[str, Any]:
        run = {"data": "molecules", "form": form, "seed": 0}
        scores = {"steps": 9, "structures": {told: errors}, "curve": [{told: [0.5, 0.1]}]}
        return {"run": run, "scores": scores}

    records = [line("plain", "none", [2.0, 4.0]), line("embedding", "right", [1.0, 2.0])]
    rows = condition_tables.levers_table(records).splitlines()[2:]
    assert [row.split(" | ")[-2] for row in rows] == ["2.000 ± 0.000", "1.000 ± 0.000"]


def test_a_section_waits_for_both_sides_of_its_comparison() -> None:
    plain, other = record("plain", 0, 0.2), record("SCD, then plain", 0, 0.1)
    elsewhere = record("SCD, then plain", 1, 0.1)
    assert report.sections([plain, elsewhere], [])["few"] == ""
    assert "-50 %" in report.sections([plain, other], [])["few"]


def test_structures_passed_count_pretraining_and_both_passes_of_scd() -> None:
    length = {"steps": 300, "batch_size": 4}
    before = {"length": {"steps": 400, "batch_size": 8}}
    assert tables.passed({"length": length, "pretraining": None}) == 1200
    assert tables.passed({"length": length, "pretraining": {**before, "scd": {"condition": []}}}) == 1200 + 3200
    assert tables.passed({"length": length, "pretraining": {**before, "scd": {"std": 0.04}}}) == 1200 + 6400


def test_runs_of_few_labels_count_as_such_where_the_choice_of_rates_has_done_them() -> None:
    runs = [run for run in learning.SUITES["rates"].runs([0]) if run.data == "Mo" and run.arm == "plain"]
    records = [{**record("plain", 0, 0.1), "suite": "rates", "run": asdict(run)} for run in runs]
    usual = {length.lr for length in learning.SUITES["few"].lengths}
    found = report.few_labels(records)
    assert {(r["run"]["length"]["steps"], r["run"]["length"]["lr"]) for r in found} == {(300, 4e-3), (1000, 1e-3)}
    assert usual == {4e-3, 1e-3}
    assert len(records) > 2


def test_only_what_stands_between_marks_is_replaced() -> None:
    page = "a\n<!-- begin few -->\nold\n<!-- end few -->\nb\n"
    assert report.fill(page, {"few": "new\n", "more": ""}) == page.replace("old", "new")
    with pytest.raises(KeyError):
        report.fill(page, {})


def test_the_page_says_what_the_results_say() -> None:
    page = report.PAGE.read_text()
    assert report.fill(page, report.sections(*report.stored(report.HERE / "results"))) == page


def test_arms_of_other_studies_are_compared_with_their_first_arm_by_seed() -> None:
    def gap(arm: str, seed: int, error: float) -> dict[str, Any]:
        run = {"data": "gaps", "arm": arm, "labels": 64, "seed": seed, "model": {"backbone": "painn", "channels": 8}}
        run["length"] = {"steps": 600, "lr": 0.002}
        return {"run": run, "scores": {"test": error}}

    gaps = [gap("scratch", 0, 1.0), gap("scratch", 1, 2.0), gap("SCD", 0, 0.5), gap("SCD", 1, 1.0)]
    assert (
        "| painn | 8 | 64 | 600 | 0.002 | sum | SCD | 2 | 0.50, 1.00 | -50, -50 % |"
        in report.sections([], [], gaps)["properties"]
    )

    def errors(arm: str, force: float) -> dict[str, Any]:
        run = {"data": "Mo", "forces": "direct", "arm": arm, "labels": 24, "seed": 0, "size": {"steps": 300}}
        return {"run": run, "scores": {"test": {"force_mae": force, "energy_mae": 0.05}}}

    found = report.sections([], [], [], [errors("plain", 0.2), errors("DeNS", 0.3)])["fairchem2"]
    assert "| Mo | direct | 24 | 300 | DeNS | 1 | 300.0 | +50 % | 50.0 | +0 % |" in found


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
    unknowable = probes.probe(np.zeros((4, 1)), np.zeros((3, 1)), {"number": (classes == "a", mean_alone)})
    assert unknowable["number"] == pytest.approx(1.0)
