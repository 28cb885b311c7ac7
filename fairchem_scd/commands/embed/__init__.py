"""`fairchem-scd embed`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from fairchem_scd.commands.embed.table import Embeddings


@click.command("embed")
@click.argument("checkpoint", type=click.Path())
@click.argument("config", type=click.Path())
@click.argument("out", type=click.Path())
@click.option(
    "--split",
    type=click.Choice(["train", "val", "test"]),
    default="val",
    show_default=True,
    help="Which of CONFIG's datasets. On fairchem 1.x val and test inherit from train what they do not set, as in "
    "training; on 2.x there is no test, and val is the data of eval_dataloader.",
)
@click.option(
    "--kind",
    type=click.Choice(["auto", "features", "condition", "both"]),
    default="auto",
    show_default=True,
    help="The features, SCD's c, or both; auto: the features, and c where the checkpoint has one.",
)
@click.option(
    "--pool",
    type=click.Choice(["mean", "sum"]),
    default="mean",
    show_default=True,
    help="The features' mean over a structure's atoms does not grow with their number; the sum does.",
)
@click.option("--per-atom", is_flag=True, help="Write each atom's features too.")
@click.option("--limit", type=click.IntRange(1), help="Embed the first so many structures only.")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    help="Structures at a time.  [default: a 1.x CONFIG's eval_batch_size or batch_size, else 16]",
)
@click.option(
    "--weights",
    type=click.Choice(["ema", "raw"]),
    help="The moving average of the weights, or the weights as the optimiser left them.  [default: the average, where "
    "the run kept one]",
)
@click.option("--device", help="Where to run: cpu, cuda or cuda:1.  [default: a GPU, if there is one]")
@click.option("--cpu", "device", flag_value="cpu", help="The same as --device cpu.")
@click.option(
    "--judge",
    is_flag=True,
    help="Say what SCD's condition is worth on these structures, as validation does.",
)
@click.option("--plot", type=click.Path(), help="Draw a map of the embeddings too: a .png, .pdf or .svg.")
@click.option(
    "--color",
    type=click.Choice(["energy", "natoms", "adsorbate", "composition"]),
    help="What the map's colours show: energy per atom, number of atoms, the atoms with tag 2, or the elements.  "
    "[default: energy, where the data has it, else composition]",
)
@click.option(
    "--method",
    type=click.Choice(["pca", "umap"]),
    default="pca",
    show_default=True,
    help="How the map is made; umap: pip install 'fairchem-scd[umap]'.",
)
@click.option("--force", is_flag=True, help="Overwrite OUT, and the map.")
def command(checkpoint: str, config: str, out: str, plot: str | None, judge: bool, force: bool, **options: Any) -> None:
    """Write to OUT embeddings of the structures that CONFIG names, made by the model in CHECKPOINT.

    CHECKPOINT is of this package, pre-trained or trained with energy and forces, or of fairchem itself, on any backbone
    that this package trains. On fairchem 2.x it is the folder of a training checkpoint, or an inference_ckpt.pt, which
    is without SCD's c. CONFIG is a training config, of which only the data and the batch size are read. The data needs
    no labels. OUT ends in .npz or .parquet.

    For B structures with N atoms and a model with C channels, OUT holds

    \b
      sid, fid             [B]     the data's names, in the data's order
      natoms, formula      [B]
      energy               [B]     eV, as in the data, where it has any
      adsorbate            [B]     formula of the atoms with tag 2, if any
      features             [B, C]  final l = 0 features, mean over the atoms
      condition            [B, C]  SCD's c, where the checkpoint has one
    with --per-atom
      atom_features        [N, C]
      structure            [N]     the row of each atom's structure
      atomic_numbers, tags [N]

    A .parquet has a row for each structure, and in it lists of what belongs to its atoms.

    With --judge the noise of each structure is predicted three times: told the embedding of the structure itself, that
    of another one, and none. The answer is printed, and its numbers stand in OUT, in `about`, under "judged". They are
    described in docs/metrics.md. It takes about five times as long.

    \b
    Example:
      fairchem-scd embed checkpoints/RUN/best_checkpoint.pt configs/quickstart.yml val.npz --plot val.png
      python -c "import numpy as np; print(np.load('val.npz')['features'].shape)"
    """
    color, method = options.pop("color"), options.pop("method")
    _check_outputs(out, plot, color, method, force)
    embeddings, report = _embed(checkpoint, config, drawn=plot is not None, judged=judge, **options)
    embeddings.save(out, force=force)
    shapes = (f"{name} {list(array.shape)}" for name, array in embeddings.arrays().items())
    click.echo(f"{out}: {', '.join(shapes)}")
    if report:
        click.echo(report)
    if plot is not None:
        from fairchem_scd.commands import pictures
        from fairchem_scd.commands.embed import embedding_map

        with pictures.printed():
            pictures.save(embedding_map.draw(embeddings, color=color, method=method), plot, force=force)
        click.echo(f"{plot}: a map of them")


def _check_outputs(out: str, plot: str | None, color: str | None, method: str, force: bool) -> None:
    """Before anything is computed: both files can be written, and the map can be made."""
    from fairchem_scd.commands.embed.table import check_table

    check_table(out, force=force)
    if plot is None and (color or method != "pca"):
        raise click.UsageError("--color and --method are of the map: say where to draw it with --plot FILE")
    if plot is not None:
        from fairchem_scd.commands import pictures
        from fairchem_scd.commands.embed import embedding_map

        pictures.check_picture(plot, force=force)
        embedding_map.check_method(method)


def _embed(
    checkpoint: str,
    config: str,
    *,
    drawn: bool,
    judged: bool,
    split: str,
    limit: int | None,
    batch_size: int | None,
    **options: Any,
) -> tuple[Embeddings, str]:
    """Read checkpoint, config and data, and embed; `options` are those of `embed`. With what the judge says, or ""."""
    click.echo(f"Loading {checkpoint}", err=True)
    from fairchem_scd.errors import ConfigError
    from fairchem_scd.host import installed_major

    opened = _opened_2(checkpoint, config, split) if installed_major() == 2 else _opened_1(checkpoint, config, split)
    embed, source, dataset, default_size = opened
    size = len(dataset) if limit is None else min(limit, len(dataset))
    if drawn:
        from fairchem_scd.commands.embed.embedding_map import LEAST

        if size < LEAST:
            raise ConfigError(f"--plot: a map needs {LEAST} structures at least (got {size})")
    click.echo(f"Embedding {size} structures of split {split}", err=True)
    sizes = {"batch_size": batch_size or default_size, "limit": limit, "progress": True}
    about: dict[str, Any] = {"checkpoint": checkpoint, "config": config, "split": split}
    said = ""
    if judged:
        if installed_major() == 2:
            from fairchem_scd.commands.fairchem2.judgement import judge
        else:
            from fairchem_scd.commands.embed.judgement import judge
        where = {key: options[key] for key in ("weights", "device")}
        report, supervised = judge(source, dataset, **sizes, **where)
        about["judged"] = {"structures": report.structures, **report.metrics()}
        said = f"{report.sentence(supervised=supervised)}\n{report.numbers()}"
    return embed(source, dataset, about=about, **sizes, **options), said


def _opened_1(checkpoint: str, config: str, split: str) -> tuple[Callable[..., Embeddings], Any, Any, int]:
    """On fairchem 1.x: the function that embeds, checkpoint, data, and batch size unless another is asked for."""
    import fairchem_scd.fairchem1.plugin  # noqa: F401  (registers everything with the host)
    from fairchem_scd.commands.config_file import read_config
    from fairchem_scd.commands.embed.embeddings import embed
    from fairchem_scd.fairchem1.checkpoint import read
    from fairchem_scd.fairchem1.data.split import load_split

    source = read(checkpoint)
    settings = read_config(config)
    optim = settings.get("optim") or {}
    size = optim.get("eval_batch_size") or optim.get("batch_size") or 16
    return embed, source, load_split(settings, split), size


def _opened_2(checkpoint: str, config: str, split: str) -> tuple[Callable[..., Embeddings], Any, Any, int]:
    """The same on fairchem 2.x, whose batches have a number of atoms instead of a number of structures."""
    from fairchem_scd.commands.fairchem2.checkpoints import read
    from fairchem_scd.commands.fairchem2.embeddings import embed, load_split

    source = read(checkpoint)
    return embed, source, load_split(config, split), 16
