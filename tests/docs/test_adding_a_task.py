"""docs/adding-a-task.md, followed word by word: its task, the claims about it, its config and its entry point."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from click.testing import CliRunner

from fairchem_scd.commands.add import command as add
from fairchem_scd.denoising import task_registry
from fairchem_scd.denoising.plan import Objective, Pass
from fairchem_scd.denoising.tasks import DenoisingTask, TaskModules, build_tasks, task_names
from fairchem_scd.errors import ConfigError
from fairchem_scd.testing import TaskClaims

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adding-a-task.md").read_text()
TASK, TESTS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(CONFIG,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
(ENTRY_POINT,) = re.findall(r'^(\w+) = "(.*?)"$', re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)[0], re.MULTILINE)
NAME = ENTRY_POINT[0]


def module(name: str, text: str) -> ModuleType:
    made = ModuleType(name)
    sys.modules[name] = made
    exec(compile(text, f"{name}.py", "exec"), vars(made))
    return made


TestAdsorbateNoise = module("test_adsorbate_noise", TESTS).TestAdsorbateNoise


@pytest.fixture(autouse=True)
def installed(monkeypatch, tmp_path):
    """As after the package of the page was installed: its entry point is there, its module not imported."""
    monkeypatch.setattr(task_registry, "_TASKS", dict(task_registry._TASKS))
    (tmp_path / f"{NAME}.py").write_text(TASK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    found = [EntryPoint(*ENTRY_POINT, task_registry.ENTRY_POINTS)]
    monkeypatch.setattr(task_registry, "entry_points", lambda group: found)
    yield found
    sys.modules.pop(NAME, None)


def test_the_pages_claims_are_all_claims():
    assert issubclass(TestAdsorbateNoise, TaskClaims)
    assert list(TestAdsorbateNoise.block) == [NAME] == list(yaml.safe_load(CONFIG)["task"]["denoising"])


def test_a_task_is_short():
    assert len(TASK.splitlines()) < 60


def test_the_config_of_the_page_turns_it_on_and_a_config_without_it_does_not_import_it():
    assert NAME in task_names()
    build_tasks({"dens": {}})
    assert NAME not in sys.modules
    tasks, _ = build_tasks(yaml.safe_load(CONFIG)["task"]["denoising"])
    assert list(tasks) == [NAME]
    assert tasks[NAME].settings.prob == 0.5
    assert type(tasks[NAME]) is sys.modules[NAME].AdsorbateNoise


def test_the_command_of_the_page_adds_it(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    # Its choices are made when the command's module is imported, which happens when it is called.
    monkeypatch.setattr(add.params[0].type, "choices", task_names())
    out = tmp_path / "new.yml"
    result = CliRunner().invoke(add, [NAME, "configs/quickstart.yml", str(out)])
    assert result.exit_code == 0, result.output
    assert NAME in yaml.safe_load(out.read_text())["task"]["denoising"]


@pytest.mark.parametrize(
    ("value", "name", "message"),
    [
        ("adsorbate_noise:NoSuchTask", NAME, "cannot be imported: .*NoSuchTask"),
        ("no_such_module:Task", NAME, "cannot be imported: No module named"),
        ("adsorbate_noise:AdsorbateNoiseSettings", NAME, "is not a subclass of fairchem_scd.DenoisingTask"),
        ("adsorbate_noise:AdsorbateNoise", "other_name", "calls itself 'adsorbate_noise'"),
    ],
)
def test_an_entry_point_that_is_wrong_is_named(value, name, message, installed):
    installed[:] = [EntryPoint(name, value, task_registry.ENTRY_POINTS)]
    with pytest.raises(ConfigError, match=rf"task\.denoising\.{name}: the installed task .*{message}"):
        build_tasks({name: {}})
    build_tasks({"dens": {}})


def test_a_task_of_a_package_cannot_take_the_name_of_one_of_ours(installed):
    installed[:] = [EntryPoint("dens", "adsorbate_noise:AdsorbateNoise", task_registry.ENTRY_POINTS)]
    assert type(build_tasks({"dens": {}})[0]["dens"]).__name__ == "Dens"


def test_listing_tasks_imports_neither_torch_nor_a_host():
    code = (
        "import sys, fairchem_scd.commands.add as add; print(add.command.params[0].type.choices);"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'fairchem', 'torch_geometric')])"
    )
    choices, imported = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).splitlines()
    assert all(name in choices for name in task_registry.own_task_classes())
    assert imported == "[]"


def test_the_page_names_every_member_of_a_task_and_only_members_there_are():
    text = PAGE.split("## The task")[1].split("## In a config")[0]
    members = {name for name in vars(DenoisingTask) if not name.startswith("_")}
    assert members <= set(re.findall(r"\b\w+\b", text)), "a member that the page leaves out"
    arguments = {**inspect.signature(TaskModules).parameters, **Pass.__annotations__, **Objective.__annotations__}
    used = set(re.findall(r"`?(\w+)=", text)) - {"seed", "step", "sigmas", "description"}
    assert used <= set(arguments), used - set(arguments)
