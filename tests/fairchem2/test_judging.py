"""What SCD's condition is worth, measured in validation, said at the end of a run, and drawn."""

from __future__ import annotations

import copy

import pytest
import torch
from torchtnt.framework import evaluate

from fairchem_scd.commands.fairchem2.training_log import find_run, read_curves
from fairchem_scd.commands.plot import training_run
from fairchem_scd.denoising import condition_judge
from fairchem_scd.denoising.condition_judge import ConditionJudge
from fairchem_scd.fairchem2.batch import identities, structures_of
from fairchem_scd.fairchem2.model import unwrapped
from tests.fairchem2.support import (
    Loader,
    batch_of,
    crystals,
    differences,
    inner,
    model_config,
    run,
    run_config,
    sample_data,
    stirred,
    tasks_config,
    unit_of,
    validate,
    with_rotations_fixed,
)

ERRORS = ["denoising_pos_mae", "denoising_pos_mae_other", "denoising_pos_mae_none", "denoising_pos_mae_zero"]
GAINS = [f"denoising_condition_{name}{error}" for name in ("gain", "gain_over_none") for error in ("", "_error")]
JUDGED = {f"val/{name}" for name in (*ERRORS, *GAINS, "denoising_condition_dimensions", "denoising_condition_spread")}
OF_PRETRAINING = {f"val/denoising_{name}" for name in ("pos_mae", "pos_mae_zero", "pos_loss", "left_out")}
MIXTURE = {"direct": False, "stress": True, "experts": 2, "moe_dropout": 0.3, "activation_checkpointing": True}


def judging_unit(supervised, settings=None, **how):
    """A unit that judges, of whose models the one that validation runs has been stirred."""
    block = {"scd": {**({"judge_condition": True} if supervised else {}), **(settings or {})}}
    if not supervised:
        how = {"tasks": [], "model": model_config(heads={}), **how}
    unit = unit_of(block, **how)
    model = stirred(unwrapped(unit.eval_unit.model))
    with torch.no_grad():  # so that it listens
        for parameter in model.denoising["scd"].parameters():
            parameter *= 8
    return unit


def batches(sizes=(3, 2, 1)):
    """The same six structures in batches of some sizes."""
    structures = crystals(6)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [batch_of(structures[start : start + size]) for start, size in zip(starts, sizes, strict=True)]


def by_hand(unit, model, data):
    """The metrics of a judge that runs all passes of a model by itself."""

    def structures(batch):
        return structures_of(batch, model.adapter.periodic(batch.pbc), unit.tasks)

    model.eval()
    with torch.no_grad():
        judge = ConditionJudge(model, unit.setup.tasks["scd"], model, structures=structures, names=identities)
        for batch in data:
            judge.first(copy.deepcopy(batch))
        judge.pair()
        for batch in data:
            judge.second(copy.deepcopy(batch))
    return {f"val/{name}": value for name, value in judge.report().metrics().items()}


# --- what is measured -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("supervised", [False, True])
def test_validation_reports_what_a_judge_finds_with_the_weights_that_validation_has(supervised):
    unit = judging_unit(supervised)
    found = validate(unit, batches())
    assert set(found) >= JUDGED
    for name, value in by_hand(unit, unwrapped(unit.ema_model), batches()).items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert found["val/denoising_pos_mae"] != found["val/denoising_pos_mae_other"]
    fresh = by_hand(unit, inner(unit), batches())  # these weights have not been stirred, and are deaf
    assert fresh["val/denoising_pos_mae"] == pytest.approx(fresh["val/denoising_pos_mae_other"], rel=1e-5)
    alone = judging_unit(supervised, ema_decay=None)
    assert alone.ema_model is None
    judged = {name: value for name, value in validate(alone, batches()).items() if name in JUDGED}
    assert judged == pytest.approx({name: found[name] for name in JUDGED}, rel=1e-4, abs=1e-6)


def test_told_its_own_embedding_as_anothers_a_structure_has_the_same_error(monkeypatch):
    unit = judging_unit(True)
    monkeypatch.setattr(condition_judge, "partners", lambda keys: {key[0]: key for key in keys})
    with with_rotations_fixed():  # passes in one call and in two draw other frames
        found = validate(unit, batches())
    assert found["val/denoising_pos_mae"] == found["val/denoising_pos_mae_other"]
    assert found["val/denoising_condition_gain"] == 0
    assert found["val/denoising_pos_mae"] != found["val/denoising_pos_mae_none"]


@pytest.mark.parametrize("supervised", [False, True])
@pytest.mark.parametrize("sizes", [(6,), (1,) * 6])
def test_neither_batches_nor_their_order_matter(sizes, supervised):
    expected = validate(judging_unit(supervised), batches())
    found = validate(judging_unit(supervised), batches(sizes)[::-1])
    for name in JUDGED:
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("model", [MIXTURE, {**MIXTURE, "direct": True}], ids=["conservative", "direct"])
def test_experts_and_energies_gradients_are_judged_as_well(model):
    unit = judging_unit(True, model=model_config(**model), tasks=tasks_config(stress=True))
    found = validate(unit, batches())
    assert unit.condition_report.structures == 6
    assert len({found[f"val/{name}"] for name in ERRORS}) == 4
    assert found["val/denoising_condition_dimensions"] > 1


def test_forces_beside_the_embedding_are_told_in_validation_too():
    settings = {"condition": ["self", "forces"], "num_steps": 3, "std_low": 0.01, "std_high": 0.1}
    unit = judging_unit(True, settings)
    data = batches()
    found = validate(unit, data)
    for batch in data:
        batch.forces *= -1
    other = validate(unit, data)
    assert found["val/denoising_pos_mae"] != pytest.approx(other["val/denoising_pos_mae"], rel=1e-5)
    assert found["val/denoising_pos_mae_zero"] == other["val/denoising_pos_mae_zero"]


# --- what it leaves alone ---------------------------------------------------------------------------------------------


def test_the_hosts_own_metrics_are_the_same_to_the_last_bit():
    found = {judge: validate(judging_unit(True, {"judge_condition": judge}), batches()) for judge in (True, False)}
    own = set(found[False]) - {"val/atoms_per_second"}
    assert own == {"val/loss", "val/epoch", "val/mo.train,energy,mae", "val/mo.train,forces,mae"}
    assert {name: found[True][name] for name in own} == {name: found[False][name] for name in own}
    assert set(found[True]) - set(found[False]) == JUDGED


def test_pre_training_says_what_it_said_without_the_judge():
    found = {judge: validate(judging_unit(False, {"judge_condition": judge}), batches()) for judge in (None, False)}
    own = {"val/loss", "val/epoch", "val/atoms_per_second"}
    assert set(found[False]) - own == OF_PRETRAINING
    assert set(found[None]) - own == OF_PRETRAINING | JUDGED
    for name in OF_PRETRAINING:
        assert found[None][name] == pytest.approx(found[False][name], rel=1e-5), name


@pytest.mark.parametrize(("block", "supervised"), [({"scd": {}}, True), ({"scd": {"condition": []}}, False)])
def test_beside_labels_and_without_a_condition_nothing_is_judged(block, supervised):
    how = {} if supervised else {"tasks": [], "model": model_config(heads={})}
    unit = unit_of(block, **how)
    found = validate(unit, batches())
    assert unit.condition_report is None
    denoising = {name for name in found if "denoising" in name}
    assert denoising == (set() if supervised else OF_PRETRAINING)


@pytest.mark.parametrize("supervised", [False, True])
def test_no_random_number_is_drawn_and_no_more_is_read_than_validation_had(supervised):
    states, given = {}, {}
    for judge in (True, False):
        unit, loader = judging_unit(supervised, {"judge_condition": judge}), Loader(batches((2, 2, 2)))
        torch.manual_seed(7)
        evaluate(unit, loader, max_steps_per_epoch=2)
        states[judge], given[judge] = torch.get_rng_state(), loader.given
        assert (unit.condition_report.structures if judge else 4) == 4
    assert torch.equal(states[True], states[False])
    assert given == {True: 4, False: 2}


def test_one_structure_alone_cannot_be_judged():
    unit = judging_unit(False)
    found = validate(unit, [batch_of(crystals(1))] * 2)
    assert unit.condition_report is None
    assert not any("condition" in name for name in found)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Pre-training with the judge and without, validated twice on the way."""
    folder, finished = sample_data(tmp_path_factory.mktemp("judged")), {}
    for judge in (None, False):
        block = {"scd": {"judge_condition": judge, "noise_scale": "running"}}
        model = model_config(heads={}, **{**MIXTURE, "stress": False}, num_layers=1)
        config = run_config(folder, tasks=[], model=model, denoising=block, evaluate_every=2, steps=4)
        finished[judge] = run(config, f"judge-{judge}")
    return finished


def test_training_is_the_same_with_the_judge_to_the_last_bit(runs):
    assert differences(runs[False].state(), runs[None].state()) == []
    assert runs[None].logged("val/denoising_condition_gain") != []
    assert runs[False].logged("val/denoising_condition_gain") == []


def test_a_run_ends_with_a_sentence_on_what_the_condition_was_worth(runs):
    report = runs[None].unit.condition_report
    assert report.structures == 4
    said = [line for line in runs[None].lines if isinstance(line, str) and "The condition" in line]
    assert said == [f"{report.sentence(supervised=False)}\n{report.numbers()}"]
    assert not any("condition" in str(line) for line in runs[False].lines if isinstance(line, str) and "cost" in line)
    assert runs[None].logged("val/denoising_condition_gain")[-1] == report.gain.value


def test_plot_draws_it_from_the_console(runs, tmp_path):
    path = tmp_path / "run.log"
    path.write_text("\n".join(map(str, runs[None].lines)))
    curves = read_curves(find_run(path)[1], training_run.ENDINGS)
    assert curves["val/denoising_pos_mae_other"].steps[0] == 2
    logged = runs[None].logged("val/denoising_condition_gain_over_none")
    assert curves["val/denoising_condition_gain_over_none"].values[0] == logged[0]
    panels = {ax.get_ylabel(): ax for ax in training_run.draw(curves).axes}
    labels = {line.get_label() for line in panels["denoising error (Å)"].get_lines()}
    assert {"validation", "told another's", "told none", "predicting nothing"} <= labels
    assert {"over another's", "over none"} <= {line.get_label() for line in panels["condition's gain (%)"].get_lines()}
