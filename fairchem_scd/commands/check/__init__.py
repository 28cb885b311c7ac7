"""`fairchem-scd check`."""

from __future__ import annotations

import logging

import click


@click.command("check", context_settings={"ignore_unknown_options": True})
@click.argument("config", type=click.Path())
@click.argument("fairchem_options", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--repeats", default=5, show_default=True, type=click.IntRange(1), help="How many steps of each kind are timed."
)
@click.option(
    "--seconds",
    default=120.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Begin no further steps after this time.",
)
def command(config: str, fairchem_options: tuple[str, ...], repeats: int, seconds: float) -> None:
    """Try CONFIG out before its job waits in a queue.

    Reads the config as fairchem does and checks the settings, the device, the logger and the data; builds the model;
    takes a few steps of each kind. Says what will happen: which atoms move and how far, what the noise weighs beside
    the forces, which share of the force labels trains, what a step costs compared with an ordinary one, memory,
    parameters. Ends with a list of problems and exit code 1, or with exit code 0.

    FAIRCHEM_OPTIONS are those that fairchem will be given. On fairchem 1.x, with `fairchem --mode train --config-yml
    CONFIG`, they are --cpu, --amp, --submit, --checkpoint FILE, or overrides such as --optim.batch_size=2. On fairchem
    2.x, with `fairchem -c CONFIG`, they are overrides such as job.seed=1. Check on a machine like the one that the job
    will get: on a login node without a GPU, nothing that needs a GPU can be tried.

    \b
    Example:
      fairchem-scd check configs/quickstart.yml --cpu
      fairchem-scd check configs/fairchem2/quickstart.yml
    """
    click.echo("Loading fairchem", err=True)
    from fairchem_scd.commands.check.report import Report
    from fairchem_scd.host import installed_major

    if installed_major() == 2:
        from fairchem_scd.commands.fairchem2.preflight import preflight
    else:
        import fairchem_scd.fairchem1.plugin  # noqa: F401  (registers everything with the host)
        from fairchem_scd.commands.check.preflight import preflight

    report = Report(click.echo)
    logging.disable(logging.INFO)  # the host prints the whole config
    try:
        preflight(config, fairchem_options, report, repeats=repeats, seconds=seconds)
    finally:
        logging.disable(logging.NOTSET)
    if not report.close():
        raise SystemExit(1)
