"""`fairchem-scd compare`."""

from __future__ import annotations

import click


@click.command("compare")
@click.argument("runs", nargs=-1, required=True, metavar="NAME=RUN...")
@click.option(
    "--at",
    type=click.Choice(["best", "last"]),
    default="best",
    show_default=True,
    help="Which validation counts for a run: that with the lowest force error, or the last.",
)
@click.option("--picture", type=click.Path(), metavar="OUT", help="Draw the errors too (.png, .pdf or .svg).")
@click.option("--force", is_flag=True, help="Overwrite OUT.")
def command(runs: tuple[str, ...], at: str, picture: str | None, force: bool) -> None:
    """Say whether a task helped: compare the validation errors of runs with it and without it.

    Runs of one NAME are runs of one config with other seeds; of each NAME give three and more, with the same seeds in
    the same order. All others are compared with the NAME that is given first. RUN is a folder with the log of one run,
    as for `plot`: on fairchem 1.x logs/tensorboard/NAME, on 2.x a run's folder in job.run_dir, or a text file with its
    console output. A * in RUN, in quotes, stands for several, in the order of their names.

    By default the errors of a run are those of the validation with its lowest force error (without forces, the lowest
    energy). The interval of a change is that of a t-test of the errors' logarithms, with 95 % confidence. The nth run
    of one NAME is paired with the nth of the other; where the numbers of runs differ, it is Welch's test, without
    pairs. Train all runs equally long, and validate them on the same data and equally often. What a step costs is not
    in the comparison.

    \b
    Example:
      fairchem-scd compare 'plain=logs/tensorboard/plain*' 'dens=logs/tensorboard/dens*' --picture dens.png
    """
    from fairchem_scd.commands import pictures
    from fairchem_scd.commands.compare import comparison
    from fairchem_scd.commands.compare import runs as logged

    if picture is not None:
        pictures.check_picture(picture, force=force)
    found = comparison.compare(logged.read(logged.named(runs)), at)
    click.echo(comparison.text(found))
    if picture is not None:
        from fairchem_scd.commands.compare import comparison_picture

        pictures.save(comparison_picture.draw(found), picture, force=force)
        click.echo(f"\n{picture}: the errors against the training step")
