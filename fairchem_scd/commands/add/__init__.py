"""`fairchem-scd add`."""

from __future__ import annotations

from typing import Any

import click

from fairchem_scd.denoising.task_registry import task_names


@click.command("add")
@click.argument("task", type=click.Choice(task_names()))
@click.argument("config", type=click.Path())
@click.argument("out", type=click.Path())
@click.option(
    "--set",
    "pairs",
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting of the task, such as std=0.15 or prob=0.25; may be given again and again. Without it every setting "
    "has its default.",
)
@click.option("--dry-run", is_flag=True, help="Show the difference and write nothing.")
@click.option("--force", is_flag=True, help="Overwrite OUT.")
def command(task: str, config: str, out: str, pairs: tuple[str, ...], dry_run: bool, force: bool) -> None:
    """Add a denoising TASK to the fairchem config CONFIG, as a new file OUT.

    CONFIG is of the fairchem that is installed, 1.x or 2.x.

    \b
    dens          tells the model the forces of a structure that it corrupts (needs forces)
    scd           tells it its own embedding of the structure instead (needs no labels)
    noisy_nodes   denoising without a condition, in every step
    Others are of installed packages (docs/adding-a-task.md).

    In a config of fairchem 1.x the trainer is replaced by the same trainer with denoising, and the task's settings are
    added under task.denoising. In one of fairchem 2.x runner.train_eval_unit._target_ is replaced, and the settings are
    added under runner.train_eval_unit.denoising. Everything else stays as it is, comments included; only the names of
    files that a 1.x config includes are adapted to OUT's folder. Paths of data and checkpoints stay too, because for
    fairchem they begin in the directory where it is run.

    What is written has been checked as training would: model, outputs, losses and settings. The difference from CONFIG
    is shown.

    \b
    Example:
      fairchem-scd add dens my_config.yml my_config_dens.yml --set std=0.15 --set prob=0.25
    """
    from fairchem_scd.commands.files import check_output, whole_file

    settings = _settings(pairs)
    check_output(out, force=force or dry_run)
    from fairchem_scd.host import installed_major

    if installed_major() == 2:
        from fairchem_scd.commands.fairchem2.add_task import add_task

        train = "fairchem -c"
    else:
        from fairchem_scd.commands.add.add_task import add_task

        train = "fairchem --mode train --config-yml"
    added = add_task(config, out, task, settings)
    _show_difference(added.before, added.after, config, out)
    shares = ", ".join(f"{name} {share:.3g}" for name, share in added.shares.items() if share)
    ordinary = 1 - sum(added.shares.values())
    rest = "pre-training" if added.pretraining else f"ordinary {ordinary:.3g}" if ordinary > 1e-9 else ""
    click.echo(f"Share of the steps: {', '.join(filter(None, [shares, rest]))}", err=True)
    if dry_run:
        click.echo("Nothing was written (--dry-run)", err=True)
        return
    with whole_file(out, force=force) as part:
        part.write_text(added.after, encoding="utf-8", newline="")
    click.echo(f"Train it, with the options you use now: {train} {out}", err=True)


def _settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    """The settings given by --set. Values are read as YAML."""
    import yaml

    settings = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not key or not equals:
            raise click.BadParameter(f"{pair}: expected KEY=VALUE, such as std=0.15", param_hint="--set")
        if key in settings:
            raise click.BadParameter(f"{key} is given twice", param_hint="--set")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise click.BadParameter(f"{pair}: the value is not YAML", param_hint="--set") from None
        try:
            # To YAML, 1e-4 is text.
            settings[key] = float(value) if isinstance(value, str) else value
        except ValueError:
            settings[key] = value
    return settings


def _show_difference(before: str, after: str, config: str, out: str) -> None:
    import difflib

    colours = {"+": "green", "-": "red", "@": "cyan"}
    for line in difflib.unified_diff(before.splitlines(), after.splitlines(), config, out, lineterm=""):
        click.echo(click.style(line, fg=colours.get(line[:1]), bold=line.startswith(("+++", "---"))))
