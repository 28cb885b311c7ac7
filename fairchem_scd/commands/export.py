"""`fairchem-scd export`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("export")
@click.argument("checkpoint", type=click.Path())
@click.argument("out", type=click.Path())
@click.option(
    "--weights",
    type=click.Choice(["ema", "raw"]),
    help="The moving average of the weights, or the weights as the optimiser left them.  [default: the average, where "
    "the run kept one]",
)
@click.option("--backbone-only", is_flag=True, help="Leave the heads out. Fine-tuning needs no more.")
@click.option(
    "--training-state",
    is_flag=True,
    help="Keep optimiser, moving average and step, to go on training in plain fairchem.",
)
@click.option("--force", is_flag=True, help="Overwrite OUT.")
def command(
    checkpoint: str, out: str, weights: str | None, backbone_only: bool, training_state: bool, force: bool
) -> None:
    """Make CHECKPOINT plain: OUT loads in fairchem 1.x without this package. On fairchem 2.x it is plain already.

    OUT has the host's model, its keys and config, the normalisers and element references, one set of weights, and
    nothing of the denoising task. The weights are the moving average where the run kept one, as in validation. (Given
    an unexported checkpoint.pt, fairchem's OCPCalculator takes the raw weights; given best_checkpoint.pt, the average.)

    What a run with null_condition: mask_token has learned cannot be computed by the plain model, and is refused; so is
    a pre-trained model, which has no heads, without --backbone-only.

    \b
    Example:
      fairchem-scd export checkpoints/RUN/best_checkpoint.pt plain.pt
    """
    from fairchem_scd.commands.files import check_output, whole_file
    from fairchem_scd.host import installed_major

    if installed_major() == 2:
        from fairchem_scd.commands.fairchem2 import not_needed

        not_needed.export(checkpoint)
    if training_state and (weights or backbone_only):
        raise click.UsageError("--training-state keeps all weights and heads; leave --weights and --backbone-only out")
    if Path(out).exists() and Path(checkpoint).exists() and Path(out).samefile(checkpoint):
        raise click.UsageError("OUT is CHECKPOINT itself; name another file")
    check_output(out, force=force)
    click.echo(f"Reading {checkpoint}", err=True)
    import torch

    from fairchem_scd.fairchem1.checkpoint import export, how_to_use, read, to_plain

    source = read(checkpoint)
    if training_state and "optimizer" not in source:
        raise click.UsageError(f"--training-state: {checkpoint} has none; checkpoint.pt of the same run has it")
    plain = to_plain(source) if training_state else export(source, weights=weights, backbone_only=backbone_only)
    with whole_file(out, force=force) as part:
        torch.save(plain, part)
    model = plain["config"]["model"]
    heads = ", ".join(model["heads"]) or "none"
    click.echo(f"{out}: fairchem's own hydra, backbone {model['backbone']['model']}, heads {heads}")
    if backbone_only:
        click.echo(f"Fine-tune from it: model.finetune_config.starting_checkpoint: {out}")
    elif training_state:
        click.echo(f"Train it on: fairchem --mode train --config-yml YOUR.yml --checkpoint {out}")
    else:
        purpose, command_line = how_to_use(out, plain["config"].get("outputs") or ("energy",))
        click.echo(f"{purpose[0].upper()}{purpose[1:]}: {command_line}")
