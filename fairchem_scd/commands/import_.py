"""`fairchem-scd import`."""

from __future__ import annotations

import click


@click.command("import", short_help="Make DeNS checkpoints of other codes this package's, or plain.")
@click.argument("checkpoint", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--plain", is_flag=True, help="Make it fairchem's own model, which does not need this package.")
@click.option("--force", is_flag=True, help="Overwrite OUT.")
def command(checkpoint: str, out: str, plain: bool, force: bool) -> None:
    """Read a DeNS checkpoint of another code, CHECKPOINT, and write it as one of this package, OUT.

    On fairchem 2.x there is nothing to import. CHECKPOINT may be of the DeNS authors (models equiformer_v2_dens and
    escn_dens) or of fairchem's own DeNS trainers (backbones equiformer_v2_dens_backbone and esen_backbone_dens).

    OUT predicts what CHECKPOINT does. Kept are the weights, noise head and force encoding included, their moving
    average, the normalisers and element references, and the DeNS settings. A run that starts from OUT counts its steps
    from zero, with a fresh optimiser.

    \b
    Example:
      fairchem-scd import eq2_dens_epochs_12_2M.pt imported.pt
      fairchem --mode train --config-yml configs/dens_oc20_2m_12epochs.yml --checkpoint imported.pt
    """
    from fairchem_scd.commands.files import check_output, whole_file
    from fairchem_scd.host import installed_major

    if installed_major() == 2:
        from fairchem_scd.commands.fairchem2 import not_needed

        not_needed.import_()
    check_output(out, force=force)
    click.echo(f"Reading {checkpoint}", err=True)
    import torch

    from fairchem_scd.fairchem1.checkpoint import from_dens, read

    imported = from_dens(read(checkpoint), plain=plain)
    with whole_file(out, force=force) as part:
        torch.save(imported, part)
    model = imported["config"]["model"]
    kind = "fairchem's own hydra" if plain else "a DeNS checkpoint of this package"
    click.echo(f"{out}: {kind}, backbone {model['backbone']['model']}, heads {', '.join(model['heads'])}")
    click.echo(
        f"Use it with ASE: OCPCalculator(checkpoint_path='{out}'). Train it on: "
        f"fairchem --mode train --config-yml YOUR.yml --checkpoint {out}"
    )
