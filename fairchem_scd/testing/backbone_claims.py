"""What must hold for a backbone with an adapter, as tests: of this package's own backbones, and of anybody's.

In a test module of your own, with the smallest model that is still one of yours:

    from fairchem_scd.testing import BackboneClaims

    class TestMine(BackboneClaims):
        backbone = {"model": "my_backbone", "hidden_channels": 8, "otf_graph": True, ...}
        heads = {"energy": {"module": "my_energy_head"}, "forces": {"module": "my_force_head"}}

pytest then runs every claim on it, on strained and rattled metal slabs of some ten atoms with adsorbates. A claim that
cannot be made is left out by itself: forces are told to backbones with vector features alone.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from fairchem.core.common.utils import setup_imports
from fairchem.core.models.base import HydraModel
from torch import Tensor

import fairchem_scd.fairchem1.plugin  # noqa: F401  (registers everything with the host)
from fairchem_scd.denoising.conditions import ConditionHead
from fairchem_scd.denoising.plan import NOISE, Plan
from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1 import checkpoint
from fairchem_scd.fairchem1.hydra import DenoisingHydra
from fairchem_scd.testing.support import (
    BOTH,
    SCD,
    collate,
    crystal,
    gradients,
    make_trainer,
    on_ranks,
    plan_of,
    rotation,
    run,
    self_supervised,
    slabs,
    stirred,
    training_config,
    with_conditioned,
)


@functools.cache
def _rows() -> list[Any]:
    return slabs(8)


@functools.lru_cache(maxsize=16)
def _built(arguments: str, block: str | None) -> HydraModel:
    """A model from the same random state as any other. Some take long to build."""
    torch.manual_seed(0)
    if block is None:
        return HydraModel(**json.loads(arguments))
    return DenoisingHydra(denoising=json.loads(block), **json.loads(arguments))


class BackboneClaims:
    """Claims about one backbone, a test each. Subclass it under a name that begins with Test.

    Class attributes:
        backbone: its config, `model` included. Its number of neighbours should not cut: which of several at equal
            distances are cut depends on the batch.
        heads: config of an energy and a force head, by name; together they give `energy` and `forces`.
        symmetry: relative error of symmetries, where the plain model's own is not larger.
    """

    backbone: ClassVar[Mapping[str, Any]]
    heads: ClassVar[Mapping[str, Any]]
    symmetry: ClassVar[float] = 1e-4

    # --- to be replaced where a model asks for it -----------------------------------------------------------------

    def rows(self) -> list[Any]:
        """Structures with labels: eight slabs, of which the third last has an adsorbate of one atom."""
        return _rows()

    def without_chance(self) -> AbstractContextManager[Any]:
        """While entered, the model draws nothing at random in eval mode. For those that do, such as edge frames."""
        return nullcontext()

    # --- models ---------------------------------------------------------------------------------------------------

    @pytest.fixture(autouse=True)
    def _no_chance(self) -> Iterator[None]:
        setup_imports()  # the host's whole registry, as at the start of any mode
        with self.without_chance():
            yield

    def arguments(self) -> dict[str, Any]:
        """Arguments of HydraModel."""
        return {
            "backbone": copy.deepcopy(dict(self.backbone)),
            "heads": copy.deepcopy(dict(self.heads)),
            "pass_through_head_outputs": True,
        }

    def plain(self) -> HydraModel:
        """The host's model."""
        return copy.deepcopy(_built(json.dumps(self.arguments()), None)).train()

    def ours(self, block: Mapping[str, Any]) -> DenoisingHydra:
        """This package's model with the same weights."""
        return copy.deepcopy(_built(json.dumps(self.arguments()), json.dumps(block))).train()

    def conditions_on_forces(self) -> bool:
        """Whether the backbone has vector features."""
        try:
            return bool(self.ours(SCD).adapter.encoding_spec)
        except ConfigError:
            return False

    def batch(self, count: int = 3) -> Any:
        return collate(self.rows()[:count])

    # --- no condition, no trace -----------------------------------------------------------------------------------

    def test_construction_leaves_the_hosts_weights_and_names(self) -> None:
        state = self.ours(BOTH).state_dict()
        plain = self.plain().state_dict()
        assert [key for key in state if not key.startswith("denoising.")] == list(plain)
        assert all(torch.equal(state[key], value) for key, value in plain.items())

    @pytest.mark.parametrize("training", [True, False])
    def test_without_a_plan_it_is_the_host_bit_for_bit(self, training: bool) -> None:
        plain, model, batch = self.plain().train(training), stirred(self.ours(BOTH)).train(training), self.batch()
        if training or not model.adapter.conservative:
            expected, expected_gradients = gradients(plain, batch)
            out, found = gradients(model, batch)
        else:  # the host keeps nothing that could be differentiated again
            expected, expected_gradients = run(plain, batch), {}
            out, found = run(model, batch), {}
        assert set(out) == set(expected)
        for key, value in expected.items():
            assert torch.equal(out[key], value), key
        for key, value in expected_gradients.items():
            assert (value is None and found[key] is None) or torch.equal(found[key], value), key

    @pytest.mark.parametrize("trained", [False, True])
    def test_a_condition_that_is_not_told_leaves_no_trace(self, trained: bool) -> None:
        plain, model, batch = self.plain(), self.ours(SCD), self.batch()
        if trained:
            stirred(model)
        plan, _ = plan_of(batch, SCD)
        first, last = plan.passes
        alone = run(model, batch, Plan("scd", (replace(first, embed=False), replace(last, conditioned=None))))
        dropped = run(model, batch, with_conditioned(plan, False))
        assert torch.equal(dropped[NOISE], alone[NOISE])
        # The outputs of the pass that could have been told something are the host's, on the corrupted structure.
        silent = replace(last, outputs=True, conditioned=torch.zeros_like(last.conditioned))
        out = run(model, batch, Plan("scd", (first, silent)))
        corrupted = copy.deepcopy(batch)
        corrupted.pos = last.pos
        for key, value in run(plain, corrupted).items():
            # A derivative by positions sums in another order what flows back through features that could be modulated.
            slack = 1e-5 * float(value.abs().max()) if model.adapter.conservative and key == "forces" else 0.0
            torch.testing.assert_close(out[key], value, rtol=0, atol=slack, msg=key)
        # Those of the clean pass are, whatever follows it.
        for key, value in run(plain, batch).items():
            assert torch.equal(run(model, batch, plan)[key], value), key

    def test_a_condition_changes_nothing_at_initialisation_and_later_it_does(self) -> None:
        model, batch = self.ours(SCD), self.batch()
        plan, _ = plan_of(batch, SCD)
        assert torch.equal(run(model, batch, plan)[NOISE], run(model, batch, with_conditioned(plan, False))[NOISE])
        stirred(model)
        heard, deaf = run(model, batch, plan)[NOISE], run(model, batch, with_conditioned(plan, False))[NOISE]
        assert (heard - deaf).abs().max() > 1e-3 * deaf.abs().max()

    def test_a_pass_takes_all_it_brought_with_it(self) -> None:
        """Of either kind of condition, also where it fails."""
        for block in (SCD, *[{"dens": {"prob": 1.0}}] * self.conditions_on_forces()):
            model, batch = self.ours(block), self.batch(1)
            plan, _ = plan_of(batch, block)
            run(model, batch)  # hosts keep things of their own
            modules, attributes = [name for name, _ in model.named_modules()], set(vars(model.backbone))
            switches = {k: v for k, v in vars(model.backbone).items() if isinstance(v, bool)}
            broken = copy.deepcopy(batch)
            broken.atomic_numbers = broken.atomic_numbers + 1000
            with pytest.raises((AssertionError, IndexError, RuntimeError)):
                model(broken, plan)
            run(model, batch, plan)[NOISE].sum().backward()
            assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
            assert [name for name, _ in model.named_modules()] == modules
            assert set(vars(model.backbone)) == attributes
            assert {k: v for k, v in vars(model.backbone).items() if isinstance(v, bool)} == switches

    # --- gradients ------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("supervised", [True, False])
    def test_everything_that_trains_has_a_gradient_and_not_zero_where_used(self, supervised: bool) -> None:
        block = {**BOTH, "dens": {"prob": 0}} if supervised and self.conditions_on_forces() else BOTH
        model, batch = stirred(self.ours(block)), self.batch()
        # Some host parameters have no influence by construction, such as the l = 0 bias of a vector head.
        _, plain = gradients(self.plain(), batch)
        idle = {name for name, gradient in plain.items() if gradient is None or not gradient.any()}
        silent = self._without_influence_on_vectors(model, batch)
        readout = {id(p) for module in model.adapter.readout() for p in module.parameters()}
        for task in block:
            plans = (plan_of(batch, block, supervised, task=task, step=step)[0] for step in range(1, 100))
            plan = next(p for p in plans if task != "scd" or len(set(p.passes[-1].conditioned.tolist())) == 2)
            _, found = gradients(model, batch, plan)
            unused = idle if supervised or task == "scd" else silent
            for name, p in model.named_parameters():
                if not p.requires_grad:
                    continue
                assert found[name] is not None, name
                of_heads = name.startswith("output_heads.") or id(p) in readout
                of_others = name.startswith("denoising.") and not name.startswith(f"denoising.{task}.")
                if of_others or (of_heads and not supervised):
                    assert not found[name].any(), name
                elif name not in unused and name.removeprefix(f"denoising.{task}.") not in silent:
                    assert found[name].any(), name

    @staticmethod
    def _without_influence_on_vectors(model: DenoisingHydra, batch: Any) -> set[str]:
        """Names of parameters of the backbone, and of `noise_head`, that the latter's prediction does not depend on."""
        head, data = model.adapter.vector_head(), copy.deepcopy(batch)
        model.zero_grad()
        with model.adapter.in_pass(None, [head]), model.adapter.skip_energy_readout():
            (vectors,) = head(data, model.backbone(data)).values()
        vectors.square().sum().backward()
        parts = {"backbone": model.backbone, "noise_head": head}
        parameters = {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}
        return {name for name, p in parameters.items() if p.grad is None or not p.grad.any()}

    def test_a_denoising_pass_adds_its_gradient_to_the_hosts_own(self) -> None:
        """First and second derivatives: that of a conservative model's forces is in the host's."""
        plain, model, batch = self.plain(), stirred(self.ours(SCD)), self.batch()
        plan, _ = plan_of(batch, SCD)
        _, expected = gradients(plain, batch)
        _, noise = gradients(model, batch, Plan("scd", tuple(replace(p, outputs=False) for p in plan.passes)))
        noise = {name: copy.deepcopy(gradient) for name, gradient in noise.items()}
        out, found = gradients(model, batch, plan)
        assert out[NOISE].any()
        for name, value in expected.items():
            if value is None:
                continue
            total = value + noise[name]
            torch.testing.assert_close(found[name], total, rtol=1e-4, atol=1e-5 * float(total.abs().max()) + 1e-12)

    def test_the_gradient_goes_through_the_embedding_and_can_be_cut(self) -> None:
        """Against the chain rule by hand: through the passes given c, plus through c."""
        model, batch = stirred(self.ours(SCD)).eval(), self.batch(2)
        weights = {n: p for n, p in model.backbone.named_parameters() if p.requires_grad}
        probe = torch.randn(len(batch.pos), 3, generator=torch.Generator().manual_seed(0))

        def slopes(value: Tensor, **arguments: Any) -> list[Tensor]:
            found = torch.autograd.grad(value, weights.values(), allow_unused=True, retain_graph=True, **arguments)
            return [torch.zeros_like(p) if g is None else g for g, p in zip(found, weights.values(), strict=True)]

        through, cut = (
            slopes((run(model, batch, plan_of(batch, {"scd": settings}, False)[0])[NOISE] * probe).sum())
            for settings in ({"std_reg": 0}, {"std_reg": 0, "stop_gradient_condition": True})
        )
        torch.manual_seed(7)
        made = model.embed(copy.deepcopy(batch))
        modulation = made.detach().requires_grad_()
        with mock.patch.object(ConditionHead, "forward", return_value=modulation):
            value = (run(model, batch, plan_of(batch, {"scd": {"std_reg": 0}}, False)[0])[NOISE] * probe).sum()
        (by_embedding,) = torch.autograd.grad(value, modulation)
        assert by_embedding.any()
        for name, whole, direct, rest in zip(
            weights, through, cut, slopes(made, grad_outputs=by_embedding), strict=True
        ):
            slack = 1e-4 * float(whole.abs().max()) + 1e-10
            torch.testing.assert_close(whole, direct + rest, rtol=1e-3, atol=slack, msg=lambda m, n=name: f"{n}: {m}")

    # --- symmetry -------------------------------------------------------------------------------------------------

    def test_the_noise_turns_with_the_structure_under_any_condition(self) -> None:
        model, batch, turn = stirred(self.ours(SCD)).eval(), self.batch(2), rotation()
        plan, _ = plan_of(batch, SCD)
        turned = copy.deepcopy(batch)
        turned.pos, turned.cell = batch.pos @ turn, batch.cell @ turn
        moved = Plan("scd", tuple(replace(p, pos=p.pos @ turn) for p in plan.passes))
        condition = 3 * torch.randn(2, model.adapter.scalar_channels, generator=torch.Generator().manual_seed(1))
        with mock.patch.object(ConditionHead, "forward", return_value=condition), torch.no_grad():
            plain, plain_turned = run(model, batch), run(model, turned)
            out, out_turned = run(model, batch, plan)[NOISE], run(model, turned, moved)[NOISE]
        slack = self._error(plain["forces"] @ turn, plain_turned["forces"])
        assert self._error(out @ turn, out_turned) <= max(3 * slack, self.symmetry)
        assert self._error(out, out_turned) > 0.1

    def test_the_embedding_does_not_see_rotation_translation_order_or_choice_of_cell(self) -> None:
        model, turn, row = self.ours({"scd": {"pool": "mean"}}).eval(), rotation(), crystal()
        turned, moved, permuted = copy.deepcopy(row), copy.deepcopy(row), copy.deepcopy(row)
        turned.pos, turned.cell = row.pos @ turn, row.cell @ turn
        moved.pos = row.pos + torch.tensor([0.3, -1.0, 2.0])
        for key in ("pos", "atomic_numbers", "fixed", "tags"):
            permuted[key] = row[key][torch.tensor([2, 0, 3, 1])]
        others = {"turned": turned, "moved": moved, "permuted": permuted, "a larger cell": crystal((1, 2, 2))}
        with torch.no_grad():
            expected = model.embed(collate([row]))
            slack = self._error(model(collate([row]))["energy"], model(collate([turned]))["energy"])
            for what, other in others.items():
                error = self._error(expected, model.embed(collate([other])))
                assert error <= max(10 * slack, self.symmetry), (what, error, slack)
            assert self._error(expected, model.embed(self.batch(1))) > 1e-2

    def test_structures_of_a_batch_do_not_see_each_other(self) -> None:
        rows = self.rows()
        pair = [row for row in rows if int((row.tags == 2).sum()) == 2][:2]
        batches = [collate(pair), *(collate([row]) for row in pair), collate([pair[0], rows[-1]])]
        for block in ({"scd": {}}, {"noisy_nodes": {}}, *[{"dens": {"prob": 1.0}}] * self.conditions_on_forces()):
            model = stirred(self.ours(block)).eval()
            with torch.no_grad():
                together, *alone, mixed = (run(model, batch, plan_of(batch, block)[0]) for batch in batches)
            assert together[NOISE].any()
            for key, value in together.items():
                slack = {"atol": 1e-4 * float(value.abs().max()), "rtol": 1e-4}
                torch.testing.assert_close(value, torch.cat([out[key] for out in alone]), **slack)
                torch.testing.assert_close(mixed[key][: len(alone[0][key])], alone[0][key], **slack)

    # --- forces, where they can be told ---------------------------------------------------------------------------

    def test_forces_are_heard_and_turn_or_are_refused(self) -> None:
        block = {"dens": {"prob": 1.0}}
        if not self.conditions_on_forces():
            with pytest.raises(ConfigError, match="vector features"):
                self.ours(block)
            return
        model, batch, turn = self.ours(block).eval(), self.batch(2), rotation()
        with torch.no_grad():
            model.denoising["dens"]["encoding"].force_weight.uniform_(-1, 1)
        plan, _ = plan_of(batch, block, step=1)
        (only,) = plan.passes
        forces, mask, sigma = only.encoding
        turned = copy.deepcopy(batch)
        turned.pos, turned.cell = batch.pos @ turn, batch.cell @ turn
        moved = replace(only, pos=only.pos @ turn, encoding=(forces @ turn, mask, sigma))
        silent = replace(only, encoding=(forces, torch.zeros_like(mask), torch.zeros_like(sigma)))
        plain, plain_turned = run(model, batch), run(model, turned)
        out, out_turned = run(model, batch, plan), run(model, turned, Plan("dens", (moved,)))
        nothing, deaf = (run(model, batch, Plan("dens", (p,))) for p in (silent, replace(only, encoding=None)))
        slack = max(3 * self._error(plain["forces"] @ turn, plain_turned["forces"]), self.symmetry)
        assert self._error(out[NOISE] @ turn, out_turned[NOISE]) <= slack
        assert self._error(out[NOISE], deaf[NOISE]) > 1e-2
        # An atom without a force leaves no trace.
        assert all(torch.equal(nothing[key], deaf[key]) for key in deaf)

    # --- training -------------------------------------------------------------------------------------------------

    @pytest.fixture(scope="session")
    def sample(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Folder in which sample data is kept."""
        return tmp_path_factory.mktemp("claims")

    def config(self, folder: Path, block: Mapping[str, Any]) -> dict[str, Any]:
        """A training config, with sample data in a folder."""
        return training_config(folder, self.arguments(), block)

    def test_it_trains_and_its_export_is_plain_fairchem(self, sample: Path, tmp_path: Path) -> None:
        trainer = make_trainer(self.config(sample, SCD), tmp_path)
        before = copy.deepcopy(trainer._unwrapped_model.state_dict())
        trainer.train(disable_eval_tqdm=True)
        model = trainer._unwrapped_model.eval()
        moved = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        assert moved >= {"backbone", "denoising"}
        assert torch.isfinite(torch.stack([p.abs().max() for p in model.parameters()])).all()
        stored = checkpoint.read(Path(trainer.config["cmd"]["checkpoint_dir"]) / "checkpoint.pt")
        exported = checkpoint.export(stored, weights="raw")
        config = exported["config"]["model"]
        assert config.pop("name") == "hydra"
        plain = HydraModel(**config).eval()
        plain.load_state_dict({key.removeprefix("module."): value for key, value in exported["state_dict"].items()})
        batch = self.batch(2)
        out = run(model, batch)
        for key, value in run(plain, batch).items():
            assert torch.equal(out[key], value), key

    @pytest.mark.parametrize("supervised", [True, False])
    def test_two_ranks_do_as_one(self, supervised: bool, sample: Path, tmp_path: Path) -> None:
        """Loss, gradients, noise and running scale of a step, on ranks with different numbers of atoms."""
        rows = slabs(4, seed=2)
        block = {"scd": {"noise_scale": "running"}} if supervised or not self.conditions_on_forces() else {}
        block = block or {"scd": {"noise_scale": "running", "condition": ["self", "forces"]}}
        config = self.config(sample, block)
        config = config if supervised else self_supervised(config)
        config["trainer"] = "fairchem_scd.DenoisingTrainer"
        config["optim"].update(scheduler="Null", scheduler_params={})

        def step(chosen: list[int], identifier: str) -> dict[str, Any]:
            trainer = make_trainer(config, tmp_path / identifier, identifier=identifier)
            stirred(trainer._unwrapped_model, 0.3)
            trainer.model.train()
            trainer.step = 3
            batch = collate([rows[i] for i in chosen])
            loss = trainer._compute_loss(trainer._forward(batch), batch)
            loss.backward()
            found = {n: p.grad for n, p in trainer._unwrapped_model.named_parameters() if p.requires_grad}
            return {"loss": loss.detach(), "gradients": found, "scale": float(trainer._step.objective.scale)}

        alone = step([0, 1, 2, 3], "alone")
        split = [[0, 2, 3], [1]]
        results = on_ranks(2, tmp_path / "ranks", lambda rank: step(split[rank], f"rank{rank}"))
        assert results[0]["scale"] == results[1]["scale"]
        assert abs(results[0]["scale"] / alone["scale"] - 1) < 1e-6
        # Each rank's loss is its own share times the number of ranks; DDP averages.
        both = (results[0]["loss"] + results[1]["loss"]) / 2
        torch.testing.assert_close(both, alone["loss"], rtol=1e-5, atol=1e-5)
        for key, gradient in alone["gradients"].items():
            scale = max(float(gradient.abs().max()), 1e-3)
            for result in results:
                error = float((result["gradients"][key] - gradient).abs().max()) / scale
                assert error < 1e-3, (key, error)

    @staticmethod
    def _error(expected: Tensor, found: Tensor) -> float:
        return float((found - expected).abs().max() / expected.abs().max())
