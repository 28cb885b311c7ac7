"""`fairchem-scd plot`."""

from __future__ import annotations

import click


@click.command("plot")
@click.argument("run_dir", type=click.Path())
@click.argument("out", type=click.Path())
@click.option(
    "--run",
    metavar="NAME",
    help="The name of the run's log folder (2.x: job.timestamp_id), where RUN_DIR holds several runs.",
)
@click.option(
    "--column",
    type=click.Choice(["single", "double"]),
    default="double",
    show_default=True,
    help="As wide as one column of a journal (3.5 inches) or two (7 inches).",
)
@click.option("--force", is_flag=True, help="Overwrite OUT.")
def command(run_dir: str, out: str, run: str | None, column: str, force: bool) -> None:
    """Draw a training run from its log, as a picture OUT (.png, .pdf or .svg).

    On fairchem 1.x the log is TensorBoard's. RUN_DIR is what fairchem was given as --run-dir (else the directory it ran
    in), or any folder with the log below it. On fairchem 2.x the log is of Weights & Biases, sent or not, and RUN_DIR
    is job.run_dir, or any folder with the log below it; or RUN_DIR is a text file with the run's console output.

    Panels: the loss and its terms, the mean absolute errors of forces (eV/Å) and energy (eV), and of the denoised
    positions (Å), and what SCD's condition gains (percent of the noise's mean square error). What a run has not logged
    is left out. A resumed run is one curve.

    Training curves show what fairchem logs, the mean since it last printed. Where there are many points they are faint,
    and a running median is drawn over them. Validation has markers. "Denoising" marks errors and losses on structures
    that DeNS or noisy nodes corrupted.

    \b
    Example:
      fairchem-scd plot my_run curves.pdf --column single
    """
    from fairchem_scd.commands import pictures

    pictures.check_picture(out, force=force)
    import numpy as np

    from fairchem_scd.commands.plot import training_run
    from fairchem_scd.commands.plot.host_log import host_log

    log = host_log()
    name, files = log.find_run(run_dir, run)
    curves = log.read_curves(files, training_run.ENDINGS)
    figure = training_run.draw(curves, width=pictures.DOUBLE if column == "double" else pictures.SINGLE)
    pictures.save(figure, out, force=force)
    last = max(int(curve.steps[-1]) for curve in curves.values())
    click.echo(f"{out}: {name}, {last} steps, {len(figure.axes)} panels")
    loss = curves.get("train/loss")
    if loss is not None and not np.isfinite(loss.values).all():
        first = int(loss.steps[~np.isfinite(loss.values)][0])
        click.echo(f"The loss is not a number at step {first}, which leaves gaps in its curve", err=True)
