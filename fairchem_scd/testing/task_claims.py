"""What must hold for a denoising task, as tests: of this package's own tasks, and of anybody's.

In a test module of your own:

    from fairchem_scd.testing import TaskClaims

    class TestMine(TaskClaims):
        block = {"my_task": {}}

pytest then runs every claim on it, with a small PaiNN, on strained and rattled metal slabs with adsorbates. Claims
about pre-training are left out where the task refuses to train without outputs.

(Longer than 300 lines, since all claims are methods of the one class that a user subclasses.)
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from fairchem.core.common.utils import setup_imports
from fairchem.core.models.base import HydraModel
from torch import Tensor

import fairchem_scd.fairchem1.plugin  # noqa: F401  (registers everything with the host)
from fairchem_scd.denoising.plan import NOISE, VALIDATION
from fairchem_scd.denoising.settings_page import section
from fairchem_scd.denoising.structures import Structures, structures_of
from fairchem_scd.denoising.tasks import DenoisingTask, TaskDraw, build_tasks, task_names
from fairchem_scd.errors import ConfigError
from fairchem_scd.fairchem1 import checkpoint
from fairchem_scd.fairchem1.hydra import DenoisingHydra
from fairchem_scd.testing.support import (
    collate,
    gradients,
    make_trainer,
    on_ranks,
    plan_of,
    run,
    self_supervised,
    slabs,
    stirred,
    training_config,
)

_PAINN = {
    "backbone": {
        "model": "painn_backbone",
        "hidden_channels": 16,
        "num_layers": 2,
        "num_rbf": 16,
        "cutoff": 4.5,
        "max_neighbors": 300,
        "num_elements": 90,
        "use_pbc": True,
        "otf_graph": True,
        "regress_forces": True,
        "direct_forces": True,
    },
    "heads": {"energy": {"module": "painn_energy_head"}, "forces": {"module": "painn_force_head"}},
    "pass_through_head_outputs": True,
}


@functools.cache
def _rows() -> list[Any]:
    return slabs(8)


class TaskClaims:
    """Claims about one task, a test each. Subclass it under a name that begins with Test.

    Class attributes:
        block: a `task.denoising` block of that task alone.
    """

    block: ClassVar[Mapping[str, Any]]

    # --- to be replaced where a task asks for it ------------------------------------------------------------------

    def rows(self) -> list[Any]:
        """Structures with labels and tags: eight slabs, of which the third last has an adsorbate of one atom."""
        return _rows()

    # --- what the claims are about --------------------------------------------------------------------------------

    @pytest.fixture(autouse=True)
    def _host(self) -> None:
        setup_imports()  # the host's whole registry, as at the start of any mode

    @property
    def name(self) -> str:
        (name,) = self.block
        return name

    def task(self, supervised: bool = True) -> DenoisingTask:
        """The task, as a run's start or restart makes it. Skips where it does not train without outputs."""
        task = build_tasks(self.block, supervised)[0][self.name]
        if not supervised:
            try:
                task.check((), ())
            except ConfigError as error:
                pytest.skip(f"it does not pre-train: {error}")
        return task

    def structures(self, *numbers: int) -> Structures:
        """Some of the rows, or all, as tasks see them."""
        rows = self.rows()
        return structures_of(collate([rows[i] for i in numbers or range(len(rows))]))

    def models(self) -> tuple[HydraModel, DenoisingHydra]:
        """The host's model and one with the task beside another, of equal host weights, in training mode."""
        torch.manual_seed(0)
        plain = HydraModel(**copy.deepcopy(_PAINN))
        torch.manual_seed(0)
        other = "noisy_nodes" if self.name != "noisy_nodes" else "scd"
        ours = DenoisingHydra(denoising={**self.block, other: {"prob": 0}}, **copy.deepcopy(_PAINN))
        return plain.train(), stirred(ours).train()

    # --- settings -------------------------------------------------------------------------------------------------

    def test_it_is_found_under_its_name(self) -> None:
        assert self.name in task_names()
        assert type(self.task()).name == self.name

    def test_an_empty_block_is_complete(self) -> None:
        build_tasks({self.name: {}})

    def test_every_setting_has_a_line_in_the_table(self) -> None:
        settings = type(self.task()).Settings
        table = section(self.name, settings)
        for key, field in settings.model_fields.items():
            assert field.description, key
            assert f"| `{self.name}.{key}` |" in table

    def test_an_unknown_setting_is_named(self) -> None:
        with pytest.raises(ConfigError, match=rf"task\.denoising\.{self.name}\.no_such_setting: unknown key"):
            build_tasks({self.name: {"no_such_setting": 1}})

    # --- random numbers -------------------------------------------------------------------------------------------

    def test_every_rank_and_restart_draws_the_same_task_for_a_step(self) -> None:
        block = {self.name: {**self.block[self.name], "prob": 0.4}}
        draws = [TaskDraw(build_tasks(block)[0], seed=3) for _ in range(2)]
        forward = [task is not None for task in map(draws[0], range(100))]
        backward = [task is not None for task in map(draws[1], reversed(range(100)))]
        assert forward == backward[::-1]
        assert set(forward) == {True, False}

    @pytest.mark.parametrize("supervised", [True, False])
    def test_a_structures_step_does_not_depend_on_its_batch_or_on_what_ran_before(self, supervised: bool) -> None:
        """The same noise, positions and conditions in any batch, on any rank, in any process."""
        whole, last = self._step(supervised, *range(len(self.rows()))), len(self.rows()) - 1
        torch.rand(3)
        state = torch.get_rng_state()
        for chosen in ([0], [last, 1], [3, 2, 0]):
            found = self._step(supervised, *chosen)
            for i, row in enumerate(chosen):
                for key, value in found[i].items():
                    assert torch.equal(value, whole[row][key]), (key, row)
        assert torch.equal(torch.get_rng_state(), state), "it draws from a global random state"

    def _step(self, supervised: bool, *chosen: int) -> list[dict[str, Any]]:
        """What step 5 does to each of some rows."""
        task, structures = self.task(supervised), self.structures(*chosen)
        corruption = task.corrupt(structures, seed=1, step=5)
        found: list[dict[str, Any]] = [{} for _ in chosen]

        def note(key: str, value: Tensor) -> None:
            per_atom = len(value) == len(structures.pos)
            parts = value.split(structures.natoms.tolist()) if per_atom else value.split(1)
            for each, part in zip(found, parts, strict=True):
                each[key] = part

        for key in ("noise", "mask", "sigma"):
            note(key, getattr(corruption, key))
        for i, each in enumerate(task.passes(structures, corruption, seed=1, step=5)):
            note(f"positions of pass {i}", each.pos)
            if each.conditioned is not None:
                note(f"conditioned in pass {i}", each.conditioned)
        return found

    def test_seed_and_step_change_the_noise_and_atoms_that_are_not_corrupted_have_none(self) -> None:
        task, structures = self.task(), self.structures()
        drawn = [
            task.corrupt(structures, seed=seed, step=step) for seed, step in ((0, 1), (0, 2), (1, 1), (0, VALIDATION))
        ]
        for i, corruption in enumerate(drawn):
            assert corruption.mask.any()
            assert not corruption.noise[~corruption.mask].any()
            assert not (corruption.mask & ~task.movable(structures)).any()
            moved = torch.zeros(len(structures.natoms), dtype=torch.bool)
            moved[structures.batch[corruption.mask]] = True
            assert torch.equal(moved, corruption.corrupted)
            assert not any(torch.equal(corruption.noise, other.noise) for other in drawn[:i])

    # --- the plan -------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("supervised", [True, False])
    def test_a_plan_can_be_run(self, supervised: bool) -> None:
        """One pass predicts the noise; outputs come from whole structures; an embedding is made before it is used."""
        task, structures = self.task(supervised), self.structures()
        corruption = task.corrupt(structures, seed=0, step=1)
        passes = task.passes(structures, corruption, seed=0, step=1)
        assert sum(each.noise for each in passes) == 1
        assert any(each.outputs for each in passes) == supervised
        for i, each in enumerate(passes):
            assert each.pos.shape == structures.pos.shape
            assert not (each.outputs and each.subset is not None)
            assert each.conditioned is None or any(earlier.embed for earlier in passes[:i])
        objective = task.objective(0.5)
        assert objective.coefficient >= 0
        assert objective.scale is not None or self.models()[1].denoising[self.name].running_scale is not None
        assert supervised or objective.loss is not None, "without forces the noise needs a loss of its own"

    # --- the model ------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("training", [True, False])
    def test_without_a_plan_the_model_is_the_host_bit_for_bit(self, training: bool) -> None:
        plain, model = (each.train(training) for each in self.models())
        state = model.state_dict()
        assert [key for key in state if not key.startswith("denoising.")] == list(plain.state_dict())
        batch = collate(self.rows()[:3])
        expected, expected_gradients = gradients(plain, batch)
        out, found = gradients(model, batch)
        assert set(out) == set(expected)
        assert all(torch.equal(out[key], value) for key, value in expected.items())
        for key, value in expected_gradients.items():
            assert (value is None and found[key] is None) or torch.equal(found[key], value), key

    @pytest.mark.parametrize("supervised", [True, False])
    def test_every_parameter_has_a_gradient_in_its_step(self, supervised: bool) -> None:
        """What the task added has a gradient that is not zero; what another task added has a gradient of zero."""
        self.task(supervised)
        _, model = self.models()
        batch = collate(self.rows()[:4])
        used: dict[str, bool] = {}
        for step in (1, 2, 3):
            out, found = gradients(model, batch, plan_of(batch, self.block, supervised, step=step)[0])
            assert out[NOISE].shape == batch.pos.shape
            for key, p in model.named_parameters():
                assert not p.requires_grad or found[key] is not None, key
                if key.startswith("denoising."):
                    used[key] = used.get(key, False) or bool(found[key].any())
        assert {key.split(".")[1] for key, value in used.items() if value} == {self.name}
        own = f"denoising.{self.name}."
        unused = [key for key, value in used.items() if not value and key.startswith(own)]
        # A bias of the host's vector head may have no influence on vectors.
        assert not [key for key in unused if not key.startswith(f"{own}noise_head.")], unused

    # --- training -------------------------------------------------------------------------------------------------

    @pytest.fixture(scope="session")
    def sample(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Folder in which sample data is kept."""
        return tmp_path_factory.mktemp("task_claims")

    def config(self, folder: Path, supervised: bool = True) -> dict[str, Any]:
        """A training config in which every step is the task's, with sample data in a folder."""
        config = training_config(folder, _PAINN, {self.name: {**self.block[self.name], "prob": 1.0}})
        return config if supervised else self_supervised(config)

    def test_it_trains_and_its_export_is_plain_fairchem(self, sample: Path, tmp_path: Path) -> None:
        trainer = make_trainer(self.config(sample), tmp_path)
        before = copy.deepcopy(trainer._unwrapped_model.state_dict())
        trainer.train(disable_eval_tqdm=True)
        model = trainer._unwrapped_model.eval()
        moved = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        assert moved >= {"backbone", "denoising"}
        stored = checkpoint.read(Path(trainer.config["cmd"]["checkpoint_dir"]) / "checkpoint.pt")
        exported = checkpoint.export(stored, weights="raw")
        config = exported["config"]["model"]
        assert config.pop("name") == "hydra"
        plain = HydraModel(**config).eval()
        plain.load_state_dict({key.removeprefix("module."): value for key, value in exported["state_dict"].items()})
        batch = collate(self.rows()[:2])
        out = run(model, batch)
        assert all(torch.equal(out[key], value) for key, value in run(plain, batch).items())

    @pytest.mark.parametrize("supervised", [True, False])
    def test_validation_leaves_no_trace(self, supervised: bool, sample: Path, tmp_path: Path) -> None:
        """It gives the same each time and changes nothing in the model. Beside labels there is no denoising in it."""
        self.task(supervised)
        trainer = make_trainer(self.config(sample, supervised), tmp_path)
        before = copy.deepcopy(trainer._unwrapped_model.state_dict())
        metrics = [trainer.validate(disable_tqdm=True) for _ in range(2)]
        assert metrics[0] == metrics[1]
        assert supervised != any("denoising" in name for name in metrics[0])
        assert all(torch.equal(value, before[key]) for key, value in trainer._unwrapped_model.state_dict().items())

    @pytest.mark.parametrize("supervised", [True, False])
    def test_two_ranks_do_as_one(self, supervised: bool, sample: Path, tmp_path: Path) -> None:
        """Loss, gradients and noise of a step, on ranks with different numbers of structures."""
        self.task(supervised)
        rows = self.rows()
        config = self.config(sample, supervised)
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
            return {"loss": loss.detach(), "gradients": found}

        alone = step([0, 1, 2, 3], "alone")
        split = [[0, 2, 3], [1]]
        results = on_ranks(2, tmp_path / "ranks", lambda rank: step(split[rank], f"rank{rank}"))
        # Each rank's loss is its own share times the number of ranks; DDP averages.
        both = (results[0]["loss"] + results[1]["loss"]) / 2
        torch.testing.assert_close(both, alone["loss"], rtol=1e-5, atol=1e-5)
        for key, gradient in alone["gradients"].items():
            for result in results:
                error = float((result["gradients"][key] - gradient).abs().max())
                assert error < 1e-3 * max(float(gradient.abs().max()), 1e-3), (key, error)
