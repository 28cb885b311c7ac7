"""`fairchem-scd add`: the task is added, and nothing else of the config changes."""

from __future__ import annotations

import copy
import difflib
import textwrap
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairchem_scd.commands.add.yaml_edit import map_items, set_value
from tests.support.command_line import fairchem_scd
from tests.support.configs import CONFIGS, host_config

PLAIN = CONFIGS / "examples" / "plain_oc20.yml"
EPOCHS, STEPS = "fairchem_scd.EquiformerV2DenoisingTrainer", "fairchem_scd.DenoisingTrainer"
MLIP = "fairchem_scd.MLIPDenoisingTrainer"

# The keys that an S2EF config cannot do without, in the fewest words.
SMALL = """\
trainer: forces  # the old name
dataset: {train: {src: data/train, format: lmdb}}
outputs: {energy: {level: system}, forces: {level: atom}}
loss_functions: [{energy: {fn: mae}}, {forces: {fn: l2mae}}]
model: {name: equiformer_v2, otf_graph: true, use_pbc: true}
optim: {batch_size: 4, lr_initial: 1e-4}
"""


def add(*arguments, ok=True):
    """Run the command; its result, or the error it ends in."""
    result = fairchem_scd("add", *arguments, code=None)
    if ok:
        assert result.exit_code == 0, result.output
        return result
    assert result.exit_code != 0, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    error = result.output[result.output.index("Error: ") :]
    assert error.count("\n") == 1, f"not one line: {error}"
    return error


def with_task(config, trainer, **tasks):
    """A merged config with a trainer and tasks."""
    config = copy.deepcopy(config)
    config["trainer"] = trainer
    task = config.get("task") or {}
    config["task"] = {**task, "denoising": {**(task.get("denoising") or {}), **tasks}}
    return config


def changed_lines(before, after):
    """Lines removed from a text, and lines put in."""
    lines = list(difflib.ndiff(before.splitlines(), after.splitlines()))
    return [line[2:] for line in lines if line[0] == "-"], [line[2:] for line in lines if line[0] == "+"]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["dens", "scd", "noisy_nodes"])
def test_the_plain_example_gets_the_trainer_and_the_task_and_keeps_every_other_line(task, tmp_path):
    out = tmp_path / "with_task.yml"
    result = add(task, PLAIN, out)
    assert host_config(out) == with_task(host_config(PLAIN), EPOCHS, **{task: {}})
    removed, put = changed_lines(PLAIN.read_text(), out.read_text())
    assert removed == ["trainer: equiformerv2_forces"]
    assert put == [f"trainer: {EPOCHS}", "", "task:", "  denoising:", f"    {task}: {{}}"]
    assert f"+    {task}: {{}}" in result.output
    assert "-trainer: equiformerv2_forces" in result.output
    assert f"fairchem --mode train --config-yml {out}" in result.output


def test_settings_are_written_as_numbers_and_lists(tmp_path):
    out = tmp_path / "out.yml"
    pairs = ("std=1e-1", "prob=0.25", "corrupt_ratio=null", "train_outputs=[energy]", "exclude_md=false")
    result = add("dens", PLAIN, out, *(word for pair in pairs for word in ("--set", pair)))
    block = {"std": 0.1, "prob": 0.25, "corrupt_ratio": None, "train_outputs": ["energy"], "exclude_md": False}
    assert host_config(out)["task"]["denoising"] == {"dens": block}
    assert "Share of the steps: dens 0.25, ordinary 0.75" in result.output


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("ocp", STEPS),
        ("forces", STEPS),
        ("energy", STEPS),
        (None, STEPS),
        ("equiformerv2_forces", EPOCHS),
        ("equiformerv2_dens", EPOCHS),
        ("mlip_trainer", MLIP),
        ("mlip_dens_trainer", MLIP),
        ("mlip_denoising", MLIP),
        ("denoising", STEPS),
        (STEPS, STEPS),
        (EPOCHS, EPOCHS),
        ("fairchem_scd.trainers.DenoisingTrainer", "fairchem_scd.trainers.DenoisingTrainer"),
    ],
)
def test_each_trainer_gives_way_to_its_twin(theirs, ours, tmp_path):
    rest = SMALL.partition("\n")[2]
    config = write(tmp_path / "config.yml", (f"trainer: {theirs} # ours\n" if theirs else "") + rest)
    add("scd", config, tmp_path / "out.yml")
    assert host_config(tmp_path / "out.yml") == with_task(host_config(config), ours, scd={})


RELEASED = {
    "runs/s2ef/my run.yml": """\
        # Our run of May, with the larger cutoff.
        # Run from the repository's root.

        includes:
        - configs/base.yml   # as everybody's, found from the root
        - "../model.yml"
        - ./optim/adam.yml

        # ---- what differs ----
        optim:
            lr_initial: 4e-4       # a word to YAML 1.1, and it has to stay one
            eval_every:   0o17
            note: yes
        task:
                strict_load:   off   # wide indentation
        dataset:
            val: { src: data/val,
                   sample_n: 30_000 }
        """,
    "configs/base.yml": """\
        # base
        includes: [nested/data.yml]
        trainer: equiformerv2_forces
        outputs: {energy: {level: system}, forces: {level: atom}}
        loss_functions: [{energy: {fn: mae}}, {forces: {fn: l2mae}}]
        """,
    "configs/nested/data.yml": "dataset: {train: {src: data/train, format: lmdb}}\n",
    "runs/model.yml": "model: {name: equiformer_v2, otf_graph: true, use_pbc: true}\n",
    "runs/s2ef/optim/adam.yml": "optim: {batch_size: 4, optimizer: AdamW}\n",
}


@pytest.fixture
def released(tmp_path, monkeypatch):
    """A config with includes in several folders, one of them named from the working directory, which is this one."""
    for name, text in RELEASED.items():
        write(tmp_path / name, text)
    (tmp_path / "new" / "place").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return Path("runs/s2ef/my run.yml")


def test_includes_name_the_same_files_from_another_folder(released, tmp_path, monkeypatch):
    before = host_config(released)
    out = Path("new/place/scd.yml")
    add("scd", released, out)
    assert host_config(out) == with_task(before, EPOCHS, scd={})
    removed, put = changed_lines(released.read_text(), out.read_text())
    assert removed == [
        "- configs/base.yml   # as everybody's, found from the root",
        '- "../model.yml"',
        "- ./optim/adam.yml",
    ]
    assert put == [
        "- ../../configs/base.yml   # as everybody's, found from the root",
        '- "../../runs/model.yml"',
        "- ../../runs/s2ef/optim/adam.yml",
        "",
        f"trainer: {EPOCHS}",
        "        denoising:",
        "          scd: {}",
    ]
    # And from another working directory, where what the original says of the root is not found.
    monkeypatch.chdir(tmp_path / "new")
    assert host_config(Path("place/scd.yml")) == host_config(tmp_path / out)


def test_beside_the_original_includes_stay_as_they_are_written(released):
    before = host_config(released)
    out = released.with_name("scd.yml")
    add("scd", released, out)
    assert host_config(out) == with_task(before, EPOCHS, scd={})
    assert changed_lines(released.read_text(), out.read_text())[0] == []


def test_an_include_keeps_its_file_where_the_working_directory_has_another_of_that_name(tmp_path, monkeypatch):
    write(tmp_path / "a" / "base.yml", SMALL)
    config = write(tmp_path / "a" / "b" / "config.yml", "includes: [../base.yml]\n")
    write(tmp_path / "base.yml", SMALL.replace("data/train", "other"))
    monkeypatch.chdir(tmp_path)
    before = host_config(config)
    add("dens", config, "a/out.yml")
    assert host_config(Path("a/out.yml")) == with_task(before, STEPS, dens={})


def test_absolute_includes_stay(tmp_path):
    base = write(tmp_path / "base.yml", SMALL)
    config = write(tmp_path / "config.yml", f"includes:\n- {base}\n")
    (tmp_path / "elsewhere").mkdir()
    add("dens", config, tmp_path / "elsewhere" / "out.yml")
    assert f"- {base}\n" in (tmp_path / "elsewhere" / "out.yml").read_text()


SHAPES = {
    "null": "task:\n",
    "null with a comment": "task: # none yet\n",
    "null by name": "task: ~\nslurm: {}\n",
    "block": "task:\n    # what kind\n    strict_load: true\n",
    "flow": "task: {strict_load: true}\n",
    "empty flow": "task: { }\n",
    "flow of lines": "task: {\n  strict_load: true, # so\n  tag: a,\n}\n",
    "alias": "anchored: &t {strict_load: true}\ntask: *t\nafter: 1\n",
    "anchor": "task: &t\n  strict_load: true\n",
    "empty denoising": "task:\n  denoising:\n  strict_load: true\n",
    "null denoising": "task: {denoising: null, a: [1, 2]}\n",
    "another task": "task:\n  denoising:\n    scd: {prob: 0.25} # a quarter\n",
    "another task off": "task:\n  denoising: {scd: null}\n",
    "own task off": "task:\n  denoising: {dens: null}\n",
    "aliased denoising": "x: &d {scd: {prob: 0.25}}\ntask: {denoising: *d}\n",
    "quoted": "'task': {'strict_load': \"on\"}\n",
}


@pytest.mark.parametrize("line_end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_task_block_of_any_shape_takes_the_task(shape, line_end, tmp_path):
    text = (SMALL + "# the task\n" + SHAPES[shape].rstrip("\n")).replace("\n", line_end)
    config = tmp_path / "config.yml"
    config.write_bytes(text.encode())
    add("dens", config, tmp_path / "out.yml")
    assert host_config(tmp_path / "out.yml") == with_task(host_config(config), STEPS, dens={})
    written = (tmp_path / "out.yml").read_bytes().decode()
    assert written.count("\n") == written.count(line_end)
    for line in text.split(line_end):
        assert line.partition("#")[2] in written


def test_a_json_config_is_one_too(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(yaml.safe_dump(yaml.safe_load(SMALL), default_flow_style=True, default_style='"', width=10**6))
    before = host_config(config)
    add("scd", config, tmp_path / "out.yml")
    assert host_config(tmp_path / "out.yml") == with_task(before, STEPS, scd={})


def test_without_outputs_it_is_pretraining(tmp_path):
    text = SMALL.replace("{energy: {level: system}, forces: {level: atom}}", "{}")
    text = text.replace("[{energy: {fn: mae}}, {forces: {fn: l2mae}}]", "[]")
    config = write(tmp_path / "config.yml", text)
    result = add("scd", config, tmp_path / "out.yml", "--set", "std_reg=0.005")
    assert "Share of the steps: scd 1, pre-training" in result.output
    assert "no 'forces'" in add("dens", config, tmp_path / "dens.yml", "--set", "prob=1", ok=False)
    assert "must sum to 1" in add("scd", config, tmp_path / "half.yml", "--set", "prob=0.5", ok=False)


def test_the_config_itself_is_overwritten_on_demand_alone(tmp_path):
    config = write(tmp_path / "config.yml", SMALL)
    before = host_config(config)
    assert "--force" in add("dens", config, config, ok=False)
    assert config.read_text() == SMALL
    add("dens", config, config, "--force")
    assert host_config(config) == with_task(before, STEPS, dens={})


def test_a_dry_run_shows_the_difference_and_writes_nothing(tmp_path):
    config = write(tmp_path / "config.yml", SMALL)
    result = add("dens", config, tmp_path / "out.yml", "--dry-run")
    assert "+    dens: {}" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["config.yml"]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not a config"),
        ("# nothing\n", "not a config"),
        ("- a\n- b\n", "not a config"),
        ("just words\n", "not a config"),
        ("trainer: ocp\nmodel: [a\noptim: {}\n", "not YAML, line 3"),
        ("trainer: ocp\n\tmodel: a\n", "not YAML, line 2"),
        ("trainer: ocp\noptim: {a: 1}\noptim: {b: 2}\n", "Duplicate Key: 'optim'"),
        ("trainer: ocp\n--- \noptim: {}\n", "not YAML, line 2"),
        ("a: {{template}}\n", "unhashable"),
        ("trainer: \x00ocp\n", "config.yml"),
        ("includes: base.yml\n", "expected a list of files"),
        ("includes: [base.yml]\n", "there is no base.yml"),
        ("includes: [config.yml]\n", "includes itself"),
        ("includes: [.]\n", "is a folder"),
        (SMALL.replace("forces  #", "base  #"), "'base' has no counterpart with denoising"),
        (SMALL.replace("forces  #", "[a, b]  #"), "has no counterpart with denoising"),
        (SMALL.replace("forces  #", "nowhere.Trainer  #"), "'nowhere.Trainer' has no counterpart with denoising"),
        (SMALL + "task: {denoising: {dens: {}}}\n", "task.denoising.dens is there already"),
        (SMALL + "task: {denoising: {scd: {prob: 1}}}\n", "must sum to at most 1"),
        (SMALL + "task: {denoising: {dense: {}}}\n", "did you mean 'dens'"),
        (SMALL + "task: {denoisng: {}}\n", "did you mean 'denoising'"),
        (SMALL + "task: {denoising: dens}\n", "expected a block"),
        (SMALL + "task: dens\n", "task: expected a block"),
        (SMALL.replace("optim: {", "optim: {use_denoising_pos: true, "), "sets up DeNS already"),
        (
            SMALL.replace("optim: {", "optim: {use_denoising_pos: true, ").replace("forces  #", "mlip_dens_trainer  #"),
            f"sets up DeNS already, and fairchem-scd reads it as it is: name the trainer {MLIP}",
        ),
        (SMALL.replace("equiformer_v2", "scn"), "'scn' cannot be trained with denoising"),
        (SMALL.replace("equiformer_v2", "gemnet_oc"), "gemnet_oc_backbone has no vector features"),
        (SMALL.replace("model:", "models:"), "model: missing"),
        (SMALL.replace("outputs:", "output:"), "outputs empty or absent"),
        (SMALL.replace(", {forces: {fn: l2mae}}", ""), "loss_functions: no 'forces'"),
        (SMALL + "task: &t {a: 1}\nslurm: *t\n", "would change slurm.denoising"),
    ],
)
def test_what_cannot_be_added_to_is_one_clear_error(text, said, tmp_path):
    config = tmp_path / "config.yml"
    config.write_text(text)
    error = add("dens", config, tmp_path / "out.yml", ok=False)
    assert said in error
    assert [path.name for path in tmp_path.iterdir()] == ["config.yml"]


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (["stdd=0.1"], "task.denoising.dens.stdd: unknown key; did you mean 'std'?"),
        (["std=-1"], "task.denoising.dens.std"),
        (["std=yes"], "expected a number"),
        (["std=much"], "task.denoising.dens.std"),
        (["std=nan"], "task.denoising.dens.std"),
        (["std"], "KEY=VALUE"),
        (["=1"], "KEY=VALUE"),
        (["std=[1"], "not YAML"),
        (["std=0.1", "std=0.2"], "given twice"),
        (["num_steps=3"], "missing: std_low, std_high"),
    ],
)
def test_settings_are_checked_as_in_training(pairs, said, tmp_path):
    words = [word for pair in pairs for word in ("--set", pair)]
    result = fairchem_scd("add", "dens", PLAIN, tmp_path / "out.yml", *words, code=None)
    assert result.exit_code != 0
    assert said in result.output
    assert not list(tmp_path.iterdir())


def test_a_task_that_would_never_run_is_refused(tmp_path):
    config = write(tmp_path / "config.yml", SMALL + "task: {denoising: {dens: {prob: 1}}}\n")
    assert "would never run" in add("scd", config, tmp_path / "out.yml", ok=False)


def test_broken_and_conflicting_includes_are_named(tmp_path):
    config = write(tmp_path / "config.yml", "includes: [sub/base.yml]\n")
    base = write(tmp_path / "sub" / "base.yml", "includes: [gone.yml]\n")
    out = tmp_path / "out.yml"
    assert f"{base}: includes: there is no gone.yml" in add("dens", config, out, ok=False)
    write(base, "")
    assert f"{base}: not a config" in add("dens", config, out, ok=False)
    write(base, "includes: [../config.yml]\n")
    assert "includes itself" in add("dens", config, out, ok=False)
    write(base, SMALL)
    write(config, "includes: [sub/base.yml, sub/more.yml]\n")
    write(tmp_path / "sub" / "more.yml", "optim: {batch_size: 8}\n")
    assert "two files both set optim.batch_size" in add("dens", config, out, ok=False)
    assert not out.exists()


def test_an_included_file_is_not_overwritten(tmp_path):
    base = write(tmp_path / "base.yml", SMALL)
    config = write(tmp_path / "config.yml", "includes: [base.yml]\n")
    assert "includes it" in add("dens", config, base, "--force", ok=False)
    assert base.read_text() == SMALL


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("includes: [base.yml]\ntask: {denoising: {dens: null}}\n", "remove that line"),
        ("includes: [base.yml]\ntask: {denoising: null}\n", "task.denoising.scd too"),
        ("includes: [base.yml]\ntask:\n", "would change"),
    ],
)
def test_what_a_null_switched_off_does_not_come_back_unseen(text, said, tmp_path):
    write(tmp_path / "base.yml", SMALL + "task: {denoising: {dens: {std: 0.3}, scd: {}}}\n")
    config = write(tmp_path / "config.yml", text)
    assert said in add("dens", config, tmp_path / "out.yml", ok=False)


def test_places_that_cannot_be_written_to_are_said_first(tmp_path):
    assert "there is no folder" in add("dens", PLAIN, tmp_path / "no" / "out.yml", ok=False)
    assert "is a folder" in add("dens", PLAIN, tmp_path, ok=False)
    assert "No such file" in add("dens", tmp_path / "no.yml", tmp_path / "out.yml", ok=False)
    assert "is a folder" in add("dens", tmp_path, tmp_path / "out.yml", ok=False)


# --- the text editor by itself ---------------------------------------------------------------------------------------

KEYS = st.sampled_from(["a", "b", "task", "denoising", "x y", "on"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    document=st.dictionaries(KEYS, VALUES, min_size=1, max_size=4),
    style=st.sampled_from([None, True, False]),
    indent=st.integers(2, 6),
    value=st.dictionaries(KEYS, st.floats(0, 1) | st.text(max_size=4), max_size=2),
)
def test_setting_a_value_in_any_document_sets_that_value_alone(document, style, indent, value):
    text = yaml.safe_dump(document, default_flow_style=style, indent=indent, allow_unicode=True)
    inner = document.get("task", {})
    if inner is not None and not isinstance(inner, dict):
        with pytest.raises(ValueError, match="task is not a mapping"):
            set_value(text, ("task", "denoising"), value)
        return
    # Not the document: what PyYAML writes is not always what it reads, as of next-line characters.
    expected = {**yaml.safe_load(text), "task": {**(inner or {}), "denoising": value}}
    try:
        new = set_value(text, ("task", "denoising"), value, after=("a",))
    except ValueError as error:
        assert "several lines" in str(error) and "denoising" in inner  # noqa: PT017, PT018
    else:
        assert yaml.safe_load(new) == expected


def test_a_new_key_leaves_comments_with_the_keys_they_are_of():
    text = "# of the file\n\n# of a\na: 1\n\n# of b\nb:\n  - 2 # two\n# end\n"
    assert set_value(text, ("new",), 0) == "# of the file\n\nnew: 0\n\n" + text.removeprefix("# of the file\n\n")
    assert set_value(text, ("new",), 0, after=("a",)) == text.replace("a: 1\n", "a: 1\n\nnew: 0\n")
    assert set_value(text, ("new",), 0, after=("b",)) == text.replace("two\n", "two\nnew: 0\n")
    assert set_value("# file\na: 1\nb: 2\n", ("new",), 0) == "# file\nnew: 0\n\na: 1\nb: 2\n"


def test_items_keep_their_quotes():
    text = "includes: ['a', \"b\", c] # three\n"
    assert map_items(text, "includes", str.upper) == "includes: ['A', \"B\", C] # three\n"
    assert map_items("a: 1\n", "includes", str.upper) == "a: 1\n"
