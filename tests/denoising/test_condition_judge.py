"""What a condition is worth: the judge against loops written out, and on models whose true answer is known."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fairchem_scd.denoising import condition_judge
from fairchem_scd.denoising.condition_judge import ConditionJudge, keys_of, partners, structure_errors
from fairchem_scd.denoising.condition_report import ConditionReport, Errors, Gain, participation_ratio, relative_spread
from fairchem_scd.denoising.conditions import SelfCondition
from fairchem_scd.denoising.plan import NOISE, VALIDATION, Plan
from fairchem_scd.denoising.structures import structures_of
from fairchem_scd.errors import ConfigError
from tests.denoising.support import ToyModel, clusters, models, plan_of, stirred, with_conditioned

SIZES = (5, 6, 4, 5, 3, 1, 7)  # the structure of one atom has nothing to denoise
SIGMA = 0.3
TOLD = ("right", "other", "none")


def parts(batch: Any, sizes: list[int]) -> list[Any]:
    """The batch in several batches."""
    made, first = [], 0
    for size in sizes:
        made.append(clusters(tuple(batch.natoms[first : first + size].tolist()), first=first))
        first += size
    return made


def judged(model: ToyModel, batches: list[Any]) -> ConditionJudge:
    """A judge after both sweeps."""
    judge = ConditionJudge(model.eval(), model.denoising_tasks["scd"], model)
    with torch.no_grad():
        for batch in batches:
            judge.first(copy.deepcopy(batch))
        judge.pair()
        for batch in batches:
            judge.second(copy.deepcopy(batch))
    return judge


def toy(block: dict[str, Any] | None = None, supervised: bool = False) -> ToyModel:
    return stirred(models({"scd": {"std": SIGMA, **(block or {})}}, supervised)[1]).eval()


# --- against a loop -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("supervised", [False, True])
@pytest.mark.parametrize(
    "block",
    [
        {},
        {"condition": ["self", "forces"], "noise_scale": "running"},
        {"null_condition": "mask_token"},
        {"corrupt_ratio": 0.5, "all_atoms": True},
        {"embed_tags": [0], "denoise_tags": [2], "std_reg": 0},
    ],
    ids=["scd", "with forces", "mask token", "some atoms", "subsets"],
)
@torch.no_grad()
def test_errors_are_those_of_a_loop_over_structures(block, supervised):
    """Each structure by itself, told an embedding that was made of its partner by itself."""
    model = toy(block, supervised)
    task, condition = model.denoising_tasks["scd"], model.denoising["scd"].condition
    alone = [clusters((n,), first=i) for i, n in enumerate(SIZES)]
    whole = clusters(SIZES)
    keys = keys_of(whole)

    def embedding(i: int) -> torch.Tensor:
        plan, _ = plan_of(model, alone[i])
        run = next(run for run in plan.passes if run.embed)
        atoms = slice(None) if run.subset is None else run.subset.atoms
        view = model.view_of(alone[i], run)
        standing = condition.bind_nothing(view.batch, 1)
        with model.adapter.in_pass(standing, ()):
            scalars = model.backbone(view)["node_embedding"]
        assert len(scalars) == len(alone[i].pos[atoms])
        return condition.embed(scalars, view.batch, 1)

    has = [bool(task.embedded_structures(structures_of(batch))[0]) for batch in alone]
    order = sorted((i for i in range(len(SIZES)) if has[i] and SIZES[i] > 1), key=lambda i: keys[i])
    before = {i: order[k - 1] for k, i in enumerate(order)}
    expected: dict[str, dict[int, float]] = {told: {} for told in TOLD}
    absolute, zero = dict.fromkeys(TOLD, 0.0), 0.0
    components = 0
    for i, batch in enumerate(alone):
        plan, corruption = plan_of(model, batch)
        if not corruption.mask.any():
            continue
        scale = task.objective(1.0).scale or float(model.denoising["scd"].running_scale.scale)
        moved = corruption.mask.nonzero()[:, 0].tolist()
        components += 3 * len(moved)
        zero += float(corruption.noise.abs().sum())
        for told in TOLD:
            if told == "none" or not has[i]:
                changed = with_conditioned(plan, None)
            else:
                source = i if told == "right" else before[i]
                changed = Plan("scd", (*plan.passes[:-1], replace(plan.passes[-1], given=embedding(source))))
            noise = model(copy.deepcopy(batch), changed)[NOISE] * scale
            wrong = [(noise - corruption.noise)[a].double() for a in moved]
            if has[i]:
                expected[told][i] = sum(float(w.square().sum()) for w in wrong) / (3 * len(moved)) / SIGMA**2
            absolute[told] += sum(float(w.abs().sum()) for w in wrong)

    judge = judged(model, [whole])
    report = judge.report()
    assert report.structures == len(expected["right"]) >= 4
    for told in TOLD:
        values = list(expected[told].values())
        assert getattr(report.mse, told) == pytest.approx(np.mean(values), rel=1e-4)
        assert getattr(report.mae, told) == pytest.approx(absolute[told] / components, rel=1e-4)
        for i, value in expected[told].items():
            assert judge.scores[keys[i]].mse[told] == pytest.approx(value, rel=1e-3)
    assert report.mae.zero == pytest.approx(zero / components, rel=1e-5)
    for gain, told in ((report.gain, "other"), (report.gain_over_none, "none")):
        assert gain.value == pytest.approx(1 - np.mean([*expected["right"].values()]) / getattr(report.mse, told), 1e-3)
    tokens = block.get("null_condition") == "mask_token"
    assert not tokens or report.mse.none != report.mse.right


# --- where the answer is known ------------------------------------------------------------------------------------


class Telling(ToyModel):
    """Its noise head reads the condition and nothing else: it predicts a share of the noise of whom it is told."""

    share = 0.75

    def __init__(self, count: int, size: int) -> None:
        super().__init__({"scd": {"std": SIGMA, "all_atoms": True}}, supervised=False)
        self.whole = clusters((size,) * count)
        corruption = self.denoising_tasks["scd"].corrupt(structures_of(self.whole), seed=0, step=VALIDATION)
        self.noise = corruption.noise.view(count, size, 3)
        self.told: torch.Tensor | None = None

    def view_of(self, data, run):
        view = super().view_of(data, run)
        view.numbers, self.told = torch.tensor(data.sid), None
        return view

    def vectors(self, head, view, embedding):
        if self.told is None:
            return torch.zeros_like(view.pos)
        return self.share * self.noise[self.told.long()].reshape(-1, 3) / SIGMA


@pytest.fixture
def telling(monkeypatch):
    """A model whose embedding of a structure is its number."""
    model = Telling(count=12, size=4)

    def embed(self, scalars, batch, size):
        return model.current[:, None].float()

    def bind(self, embedding, conditioned, batch):
        assert conditioned.all()
        model.told = embedding[:, 0]

    monkeypatch.setattr(SelfCondition, "embed", embed)
    monkeypatch.setattr(SelfCondition, "bind", bind)
    monkeypatch.setattr(ConditionJudge, "conditions", lambda self: torch.stack(list(self._told.values())))
    host_view = model.view_of

    def view_of(data, run):
        model.current = torch.tensor(data.sid)
        return host_view(data, run)

    model.view_of = view_of
    return model


@pytest.mark.parametrize("batches", [[12], [1] * 12, [5, 7]])
def test_a_head_that_reads_the_condition_gains_what_it_is_told(telling, batches):
    """Of 3/4 of its noise told, 1/16 of the square is left; told another's, 1 of its own and 9/16 of the other's."""
    noise = telling.noise.double() / SIGMA
    square = noise.square().mean(dim=(1, 2))
    keys = keys_of(telling.whole)
    order = sorted(range(12), key=lambda i: keys[i])
    before = {i: order[k - 1] for k, i in enumerate(order)}
    other = [(0.75 * noise[before[i]] - noise[i]).square().mean() for i in range(12)]
    report = judged(telling, parts(telling.whole, batches)).report()
    assert report.mse.zero == pytest.approx(float(square.mean()), rel=1e-6)
    assert report.mse.none == pytest.approx(float(square.mean()), rel=1e-6)
    assert report.mse.right == pytest.approx(float(square.mean()) / 16, rel=1e-5)
    assert report.mse.other == pytest.approx(float(sum(other)) / 12, rel=1e-5)
    assert report.gain_over_none.value == pytest.approx(15 / 16, rel=1e-6)
    assert report.gain_over_none.error == pytest.approx(0, abs=1e-6)  # the same share of every structure
    assert report.gain.value == pytest.approx(1 - float(square.mean()) / 16 / report.mse.other, rel=1e-5)
    assert report.explained == report.gain_over_none
    assert report.mae.right == pytest.approx(report.mae.zero / 4, rel=1e-5)
    assert report.mae.zero == pytest.approx(float(telling.noise.abs().mean()), rel=1e-6)
    assert report.dimensions == pytest.approx(1)
    assert 0 < report.spread <= 1
    assert "explains 93.8 ± 0.0 %" in report.sentence(supervised=False)


def test_a_model_that_is_deaf_to_the_condition_gains_nothing():
    model = models({"scd": {"std": SIGMA}}, supervised=False)[1]  # its modulation starts as the identity
    report = judged(model, [clusters(SIZES)]).report()
    assert report.gain == report.gain_over_none == Gain(0.0, 0.0, report.structures)
    assert report.mse.right == report.mse.other == report.mse.none
    assert "twice the cost" in report.sentence(supervised=False)
    assert "twice the cost" not in report.sentence(supervised=True)


def test_what_one_rank_has_judged_in_part_hides_nothing_that_another_has_judged(monkeypatch):
    model = models({"scd": {"std": SIGMA}}, supervised=False)[1]
    whole = judged(model, [clusters(SIZES)])
    expected = whole.report()
    part = ConditionJudge(model, model.denoising_tasks["scd"], model)
    part.first(clusters(SIZES))
    for scores in ([part.scores, whole.scores], [whole.scores, part.scores]):
        monkeypatch.setattr(condition_judge, "gathered", lambda _, scores=scores: scores)
        assert whole.report() == expected


# --- batches, partners --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [[1] * 7, [3, 4], [6, 1]])
def test_the_result_does_not_depend_on_batches(batches):
    model = toy()
    whole = clusters(SIZES)
    expected, found = judged(model, [whole]).report(), judged(model, parts(whole, batches)[::-1]).report()
    assert found.structures == expected.structures == 6
    assert found.mse.right != found.mse.other
    for told in (*TOLD, "zero"):
        assert getattr(found.mse, told) == pytest.approx(getattr(expected.mse, told), rel=1e-5)
        assert getattr(found.mae, told) == pytest.approx(getattr(expected.mae, told), rel=1e-5)
    assert found.dimensions == pytest.approx(expected.dimensions, rel=1e-4)
    assert found.spread == pytest.approx(expected.spread, rel=1e-4)


def test_a_structure_that_comes_twice_counts_once():
    model = toy()
    whole = clusters(SIZES)
    once, twice = judged(model, [whole]).report(), judged(model, [whole, clusters((5, 6))]).report()
    assert twice.structures == once.structures
    assert twice.mse.right == pytest.approx(once.mse.right, rel=1e-6)
    assert twice.gain.error == pytest.approx(once.gain.error, rel=1e-4)


def test_a_structure_that_one_sweep_alone_came_to_does_not_count():
    model = toy()
    batches = parts(clusters(SIZES), [3, 2, 2])
    judge = ConditionJudge(model, model.denoising_tasks["scd"], model)
    with torch.no_grad():
        for batch in batches[:2]:
            judge.first(copy.deepcopy(batch))
        judge.pair()
        for batch in batches[1:]:
            judge.second(copy.deepcopy(batch))
    report = judge.report()
    assert report.structures == 2
    found = [judge.scores[key] for key in keys_of(batches[1])]
    for told in TOLD:
        assert getattr(report.mse, told) == pytest.approx(sum(score.mse[told] for score in found) / 2)


def test_what_the_caller_calls_a_structure_is_its_name():
    batch = clusters((4, 4))
    assert [name for _, name in keys_of(batch, lambda batch: ["a", "b"])] == ["a", "b"]
    assert [what for what, _ in keys_of(batch, lambda batch: ["a", "b"])] == [what for what, _ in keys_of(batch)]


def test_nobody_is_its_own_partner_nor_a_copys():
    keys = [("b", "1"), ("a", "2"), ("b", "0"), ("c", "3")]
    assert partners(keys) == {"a": ("c", "3"), "b": ("a", "2"), "c": ("b", "0")}
    assert partners(reversed(keys)) == partners(keys)
    assert partners([("a", "0"), ("a", "1")]) == {}
    assert partners([]) == {}


@pytest.mark.parametrize("copies", [1, 3])
def test_without_another_structure_nothing_is_measured(copies):
    one = clusters((5,))
    batches = [copy.copy(one) for _ in range(copies)]
    for i, batch in enumerate(batches):
        batch.sid = [i]
    assert judged(toy(), batches).report() is None


def test_a_key_is_of_elements_positions_and_cell():
    batch = clusters((4, 4))
    batch.cell = torch.eye(3).repeat(2, 1, 1)
    (what, name), (other, _) = keys_of(batch)
    assert (what != other, name) == (True, "0/0")
    for key in ("atomic_numbers", "pos", "cell"):
        changed = copy.copy(batch)
        setattr(changed, key, getattr(batch, key).clone())
        getattr(changed, key)[0] += 1
        assert keys_of(changed)[0][0] != what, key
        assert keys_of(changed)[1][0] == other, key


def test_a_task_without_an_embedding_cannot_be_judged():
    model = models({"scd": {"condition": []}}, supervised=False)[1]
    with pytest.raises(ConfigError, match="told no embedding"):
        ConditionJudge(model, model.denoising_tasks["scd"], model)


def test_validation_judges_in_pre_training_and_where_it_is_asked_to():
    def judges(supervised: bool, **settings: Any) -> bool:
        return models({"scd": settings}, supervised)[1].denoising_tasks["scd"].judges_condition

    assert judges(False)
    assert not judges(False, judge_condition=False)
    assert not judges(False, condition=[])
    assert not judges(True)
    assert judges(True, judge_condition=True)
    assert not models({"noisy_nodes": {}}, False)[1].denoising_tasks["noisy_nodes"].judges_condition
    with pytest.raises(ConfigError, match="judge_condition"):
        judges(True, condition=[], judge_condition=True)


# --- statistics ---------------------------------------------------------------------------------------------------


def test_structure_errors_by_hand():
    batch = torch.tensor([0, 0, 1, 2, 2])
    noise = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 0], [3, 0, 0], [0, 0, 0]])
    mask = torch.tensor([True, True, False, True, False])
    corruption = SimpleNamespace(noise=noise, mask=mask, sigma=torch.tensor([1.0, 0.0, 2.0]), batch=batch)
    predicted = torch.tensor([[1.0, 0, 0], [0, 0, 0], [9, 9, 9], [1, 1, 0], [9, 9, 9]])
    errors = structure_errors(predicted, corruption, 0.5)
    assert errors.components.tolist() == [6, 0, 3]
    assert errors.absolute.tolist() == [2.5, 0, 3]
    assert errors.mse.tolist() == pytest.approx([(0.25 + 4) / 6, 0, (6.25 + 0.25) / 3 / 4])


def test_the_error_of_a_gain_is_that_of_leaving_one_out():
    generator = torch.Generator().manual_seed(0)
    others = 1 + 0.3 * torch.rand(400, generator=generator, dtype=torch.float64)
    errors = 0.6 * others + 0.05 * torch.randn(400, generator=generator, dtype=torch.float64)
    gain = Gain.of(errors, others)
    without = [(errors.sum() - a) / (others.sum() - b) for a, b in zip(errors, others, strict=True)]
    jackknife = math.sqrt(399 / 400 * float(sum((r - sum(without) / 400) ** 2 for r in without)))
    assert gain.value == pytest.approx(1 - float(errors.sum() / others.sum()))
    assert gain.error == pytest.approx(jackknife, rel=1e-3)
    exact = Gain.of(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]))
    assert (exact.value, exact.error) == (0.0, pytest.approx(0.5))
    with pytest.raises(ValueError, match="two structures"):
        Gain.of(torch.ones(1), torch.ones(1))


def test_participation_ratio_counts_dimensions():
    line = torch.linspace(-1, 1, 9)[:, None] * torch.tensor([[1.0, 2.0, 3.0]])
    cube = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    assert participation_ratio(line) == pytest.approx(1)
    assert participation_ratio(cube) == pytest.approx(3)
    assert participation_ratio(torch.ones(4, 3)) == 0


def test_relative_spread_is_that_of_the_samples_against_their_size():
    samples = torch.tensor([[3.0, 1.0], [3.0, -1.0]])  # standard deviations 0 and 1, mean squares 9 and 1
    assert relative_spread(samples) == pytest.approx(math.sqrt(1 / 10))
    assert relative_spread(5 * samples) == pytest.approx(relative_spread(samples))
    assert relative_spread(samples - samples.mean(dim=0)) == pytest.approx(1)
    assert relative_spread(torch.ones(4, 3)) == relative_spread(torch.zeros(4, 3)) == 0


UNSURE = "Whether the condition explains anything cannot be told from 999 structures: its gain"


@pytest.mark.parametrize(
    ("gain", "over_none", "begins", "plain"),
    [
        ((0.5, 0.1), (0.2, 0.05), "The condition explains 20.0 ± 5.0 % of the noise error that is left without", False),
        ((0.2, 0.01), (0.5, 0.1), "The condition explains 20.0 ± 1.0 % of", False),
        ((0.5, 0.1), (0.01, 0.01), "The model relies on the condition", True),
        ((0.5, 0.1), (-0.2, 0.05), "The model relies on the condition", True),
        ((0.2, 0.01), (0.0009, 0.0001), "The model relies on the condition", True),
        ((0.024, 0.0083), (0.5, 0.1), "The condition explains little, if anything: the error is 2.4 ± 0.8 %", False),
        ((0.01, 0.01), (0.5, 0.1), "The condition carried nothing", True),
        ((0.0009, 0.0001), (0.5, 0.1), "The condition carried nothing", True),
        ((-0.0004, 0.01), (0.5, 0.1), "The condition carried nothing: another structure's embedding serves", True),
        ((0.1, 0.05), (-0.2, 0.05), "The model predicts the noise no better with the condition than without it", True),
        (
            (0.2, 0.1),
            (0.5, 0.1),
            f"{UNSURE} over another structure's is 20.0 ± 10.0 %, where chance may make 30.1",
            False,
        ),
        ((0.5, 0.1), (0.1, 0.05), f"{UNSURE} over none is 10.0 ± 5.0 %, where chance may make 15.0 %", False),
    ],
)
def test_the_sentence_claims_no_more_than_three_standard_errors_and_the_smaller_gain(gain, over_none, begins, plain):
    sentence = report_of(gain, over_none).sentence(supervised=False)
    assert sentence.startswith(begins)
    assert ("plain denoising at twice the cost; see docs/pretraining.md." in sentence) == plain
    assert "-0.0 " not in sentence


def test_the_sentence_says_where_no_pass_without_the_condition_was_trained():
    sentence = report_of((0.5, 0.1), (0.2, 0.05), trained_without=False).sentence(supervised=False)
    assert sentence.startswith(
        "The condition explains 20.0 ± 5.0 % of the noise error that is left without it, or less"
    )
    assert sentence.endswith("Compare with a run of condition: [].")


def report_of(gain: tuple[float, float], over_none: tuple[float, float], **said: bool) -> ConditionReport:
    errors = Errors(0.1, 0.2, 0.3, 0.4)
    return ConditionReport(999, errors, errors, Gain(*gain, 999), Gain(*over_none, 999), 2.0, 0.5, **said)


def test_of_few_structures_more_standard_errors_are_asked_for():
    many, few = Gain(0.12, 0.015, 999), Gain(0.12, 0.015, 4)
    assert many.counts
    assert not few.counts
    assert Gain(0.0, 0.015, 999).excluded
    assert not Gain(0.0, 0.015, 4).excluded


@pytest.mark.parametrize("drop", [0.0, 0.2])
def test_the_report_says_whether_a_pass_without_the_condition_was_trained(drop):
    report = judged(toy({"condition_drop": drop}), [clusters(SIZES)]).report()
    assert report.trained_without == (drop > 0)


@pytest.mark.parametrize("structures", [2, 4, 10])
def test_chance_gives_a_gain_that_counts_once_in_700_times_however_few_structures_there_are(structures):
    """As three standard errors of many normal values do on one side: 0.135 %."""
    generator = torch.Generator().manual_seed(0)
    drawn = 1e-2 * torch.randn(40_000, structures, generator=generator, dtype=torch.float64)
    means, errors = -drawn.mean(dim=1), drawn.std(dim=1) / structures**0.5
    margin = Gain(0.0, 1.0, structures).margin
    assert (means > margin * errors).double().mean() == pytest.approx(0.00135, abs=0.0006)
