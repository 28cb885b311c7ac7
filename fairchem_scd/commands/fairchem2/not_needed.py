"""What `export` and `import` say on fairchem 2.x: there is nothing that they could do."""

from __future__ import annotations

from pathlib import Path

from fairchem_scd.errors import ConfigError


def export(checkpoint: str) -> None:
    """Say that the host's inference checkpoint is plain already.

    Raises:
        ConfigError: always, since no file is written; it names the file to use.
        FileNotFoundError: there is no such checkpoint.
    """
    path = Path(checkpoint)
    path.stat()
    plain = path / "inference_ckpt.pt" if path.is_dir() else path
    if not plain.is_file():
        raise ConfigError(
            f"{path}: holds no inference_ckpt.pt, which is plain as it is; the run had save_inference_ckpt: false"
        )
    raise ConfigError(
        f"on fairchem 2.x nothing has to be exported: {plain} is plain as the run wrote it, and loads without this "
        "package; copy it"
    )


def import_() -> None:
    """Say that there is nothing to import.

    Raises:
        ConfigError: always, since no file is written.
    """
    raise ConfigError(
        "on fairchem 2.x nothing has to be imported: this command reads checkpoints of DeNS codes for fairchem 1.x, "
        "whose models fairchem 2.x does not have; its own checkpoints are taken as they are, by "
        "initialize_finetuning_model"
    )
