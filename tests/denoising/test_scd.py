"""SCD on plain structures: which passes a step has, which structures are told their embedding, what is trained."""

from __future__ import annotations

import logging

import pytest
import torch

from fairchem_scd.denoising.plan import VALIDATION, Plan
from fairchem_scd.denoising.structures import structures_of
from fairchem_scd.denoising.tasks import build_tasks
from fairchem_scd.errors import ConfigError
from tests.denoising.support import clusters


def task_of(supervised=True, **settings):
    return build_tasks({"scd": settings}, supervised)[0]["scd"]


def plan_of(batch, supervised=True, *, seed=0, step=VALIDATION, **settings):
    """The plan of a step, and its corruption."""
    task, structures = task_of(supervised, **settings), structures_of(batch)
    corruption = task.corrupt(structures, seed=seed, step=step)
    return Plan("scd", task.passes(structures, corruption, seed=seed, step=step)), corruption


# --- the passes -------------------------------------------------------------------------------------------------------


def kinds(supervised, **settings):
    """What each pass of a step does."""
    plan, _ = plan_of(clusters(), supervised, **settings)
    flags = ("outputs", "embed", "noise")
    return [tuple(flag for flag in flags if getattr(p, flag)) for p in plan.passes]


def test_beside_labels_the_clean_pass_serves_both_and_a_pass_over_a_subset_does_not():
    assert kinds(True) == [("outputs", "embed"), ("noise",)]
    assert kinds(False) == [("embed",), ("noise",)]
    assert kinds(True, condition=[]) == [("outputs",), ("noise",)]
    assert kinds(False, condition=[]) == [("noise",)]
    assert kinds(True, embed_tags=[0]) == [("outputs",), ("embed",), ("noise",)]
    assert kinds(False, embed_tags=[0], denoise_tags=[2]) == [("embed",), ("noise",)]


def test_drops_are_drawn_for_each_structure_and_never_in_validation():
    batch = clusters((5, 6, 4, 7))
    shares = [plan_of(batch, step=step)[0].passes[-1].conditioned.float().mean() for step in range(1, 301)]
    assert 0.75 < float(torch.stack(shares).mean()) < 0.85  # 1200 draws at 0.8: five standard deviations are 0.058
    assert plan_of(batch, step=VALIDATION)[0].passes[-1].conditioned.all()
    alone = [
        bool(plan_of(clusters((n,), first=i), step=5)[0].passes[-1].conditioned) for i, n in enumerate((5, 6, 4, 7))
    ]
    assert alone == plan_of(batch, step=5)[0].passes[-1].conditioned.tolist()


def test_what_others_need_to_know_of_a_choice_of_atoms_it_says_itself():
    assert task_of().subset_settings == ()
    assert not task_of(denoise_tags=[2]).embeds_subset
    both = task_of(embed_tags=[0, 1], denoise_tags=[2])
    assert both.subset_settings == ("embed_tags", "denoise_tags")
    assert both.embeds_subset
    assert both.labels == {"tags"}


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"condition": ["selff"]}, "task.denoising.scd.condition"),
        ({"embed_tags": []}, "task.denoising.scd.embed_tags"),
        ({"condition": ["forces"], "embed_tags": [2]}, "embed_tags: of the embedding.* does not name 'self'"),
        (
            {"condition": [], "std_reg": 0.1, "condition_drop": 0.5},
            "std_reg, condition_drop: of the embedding.* does not name 'self'",
        ),
        ({"null_condition": "mask_token", "gate_bound": 0.5}, "gate_bound belongs to null_condition: identity"),
        ({"noise_scale": "std", "num_steps": 3, "std_low": 0.01, "std_high": 0.1}, "needs one σ"),
        ({"std": 0.1, "num_steps": 3, "std_low": 0.01, "std_high": 0.1}, "exclude each other"),
        ({"gate_bound": 2}, "task.denoising.scd.gate_bound"),
    ],
)
def test_settings_that_do_not_agree_end_in_one_error(settings, message):
    with pytest.raises(ConfigError, match=message):
        build_tasks({"scd": settings})


def test_settings_that_never_had_an_effect_are_read_over_with_the_reason(caplog):
    with caplog.at_level(logging.WARNING):
        old = build_tasks({"scd": {"pool": "mean", "clamp": 1000, "std": 0.1}, "dens": {"prob": 0.5}})[0]
    assert old["scd"].settings == build_tasks({"scd": {"std": 0.1}, "dens": {"prob": 0.5}})[0]["scd"].settings
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "task.denoising.scd.pool has no effect: sum and mean are the same behind the LayerNorm" in messages[0]
    assert "task.denoising.scd.clamp has no effect: the condition comes from a LayerNorm" in messages[1]
    # Each belongs to one task: elsewhere it is a key that nobody knows.
    with pytest.raises(ConfigError, match=r"task\.denoising\.dens\.pool: unknown key"):
        build_tasks({"dens": {"pool": "mean"}})


def test_defaults_are_the_papers_and_what_it_does_not_give_depends_on_other_losses():
    settings = build_tasks({"scd": {}})[0]["scd"].settings
    assert (settings.std, settings.condition_drop) == (0.04, 0.2)
    assert settings.loss == "mse"
    beside, alone = task_of().objective(0), task_of(supervised=False).objective(0)
    assert (beside.coefficient, alone.coefficient, beside.scale, alone.scale) == (10, 1, 0.04, 0.04)
    assert task_of(coefficient=3).objective(0).coefficient == 3


def test_noise_on_the_clean_view_is_the_papers_in_pre_training_and_none_beside_labels():
    batch = clusters((40, 50, 60))
    clean = {supervised: plan_of(batch, supervised)[0].passes[0].pos for supervised in (True, False)}
    assert torch.equal(clean[True], batch.pos)
    moved = (clean[False] - batch.pos)[batch.fixed == 0]
    assert 0.004 < float(moved.std()) < 0.006
    assert torch.equal(clean[False][batch.fixed == 1], batch.pos[batch.fixed == 1])
    with pytest.raises(ConfigError, match="std_reg"):
        task_of(std_reg=0.005).check({"energy"}, {"energy"})
