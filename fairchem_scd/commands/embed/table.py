"""Embeddings of structures as numpy arrays, and the files that hold them."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from fairchem_scd.commands.files import check_output, whole_file
from fairchem_scd.errors import ConfigError

_PER_ATOM = ("atom_features", "atomic_numbers", "tags")


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of B structures with N atoms in total, in the data's order. What was not asked for is None.

    Attributes:
        sid: [B] the data's name of each structure, or its index in the data where that has no names.
        fid: [B] the frame of each structure, where the data has frames.
        natoms: [B].
        formula: [B] chemical formula, in Hill's order.
        adsorbate: [B] formula of the atoms with tag 2, where the data has any.
        energy: [B] eV, as the data gives it; NaN where a structure has none.
        features: [B, C] float32, the final l = 0 features, pooled over a structure's atoms.
        condition: [B, C] float32, the c that SCD makes of a structure; zero where it has no atom to embed.
        atom_features: [N, C] float32, the final l = 0 features.
        structure: [N] the row of each atom's structure.
        atomic_numbers: [N].
        tags: [N], where the data has them: 0 below the surface, 1 surface, 2 adsorbate.
        about: where they came from: checkpoint, weights, pooling.
    """

    sid: np.ndarray
    natoms: np.ndarray
    formula: np.ndarray
    fid: np.ndarray | None = None
    adsorbate: np.ndarray | None = None
    energy: np.ndarray | None = None
    features: np.ndarray | None = None
    condition: np.ndarray | None = None
    atom_features: np.ndarray | None = None
    structure: np.ndarray | None = None
    atomic_numbers: np.ndarray | None = None
    tags: np.ndarray | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.natoms)

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> Embeddings:
        """Embeddings of structures that are each described by a record.

        Args:
            records: values of a structure by the names of the attributes above. A value is None or absent where the
                structure has none. The array is then left out, but energies are NaN, and adsorbates "", there.
            about: see above.
        """
        columns = {name: [record.get(name) for record in records] for name in set().union(*records)}
        arrays: dict[str, np.ndarray] = {}
        for name, values in columns.items():
            missing = [value is None for value in values]
            if name == "energy" and not all(missing):
                arrays[name] = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
            elif name == "adsorbate" and any(values):
                arrays[name] = np.array([value or "" for value in values])
            elif name in ("energy", "adsorbate") or any(missing):
                continue
            elif name in _PER_ATOM:
                arrays[name] = np.concatenate(values)
            elif isinstance(values[0], np.ndarray):
                arrays[name] = np.stack(values)
            else:  # names: as numbers where all of them are numbers, else as text
                arrays[name] = np.array(values if all(isinstance(v, int) for v in values) else [str(v) for v in values])
        if "atom_features" in arrays:
            arrays["structure"] = np.repeat(np.arange(len(records)), arrays["natoms"])
        return cls(**arrays, about=about)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that are not None, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "about"}
        return {name: value for name, value in named.items() if value is not None}

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write them to a file, whole or not at all.

        `.npz`: each array under its name, and `about` as JSON. `.parquet`: a row for each structure, in which an
        embedding is a list of C numbers, and what belongs to atoms is a list with an entry for each atom.

        Raises:
            ConfigError: as `check_table`, or the disk is full.
        """
        path = check_table(path, force=force)
        with whole_file(path, force=force) as part:
            if path.suffix == ".npz":
                self._write_npz(part)
            else:
                self._write_parquet(part)

    def _write_npz(self, path: Path) -> None:
        # As numpy.savez does. That would leave the archive open where the disk is full.
        with zipfile.ZipFile(path, "w") as archive:
            for name, array in {**self.arrays(), "about": np.array(json.dumps(dict(self.about)))}.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)

    def _write_parquet(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        offsets = np.concatenate([[0], np.cumsum(self.natoms)]).astype(np.int32)
        columns = {}
        for name, array in self.arrays().items():
            if name == "structure":  # each row is a structure
                continue
            column = pa.array(array.reshape(-1))
            if array.ndim == 2:
                column = pa.FixedSizeListArray.from_arrays(column, array.shape[1])
            columns[name] = pa.ListArray.from_arrays(offsets, column) if name in _PER_ATOM else column
        table = pa.table(columns).replace_schema_metadata({"about": json.dumps(dict(self.about))})
        pq.write_table(table, path)


def check_table(path: str | Path, *, force: bool = False) -> Path:
    """Check that embeddings can be written to a file. Called before they are made.

    Raises:
        ConfigError: the ending is neither .npz nor .parquet, parquet cannot be written here, or as `check_output`.
    """
    path = Path(path)
    if path.suffix not in (".npz", ".parquet"):
        raise ConfigError(f"{path}: embeddings are written to a file whose name ends in .npz or .parquet")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:  # also raised where it does not work with the other packages
            raise ConfigError(
                f"{path}: parquet needs pyarrow ({error}): pip install 'fairchem-scd[parquet]'; .npz needs nothing"
            ) from error
    return check_output(path, force=force)
