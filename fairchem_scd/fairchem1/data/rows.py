"""Checks of rows and batches of data. What cannot be trained on ends in an error that names the structure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from ase.data import chemical_symbols

from fairchem_scd.denoising.structures import names, structures_of
from fairchem_scd.denoising.tasks import DenoisingTask
from fairchem_scd.errors import ConfigError, DataError
from fairchem_scd.fairchem1.backbones import adapter_for


def check_sample(split: str, tasks: Mapping[str, DenoisingTask], rows: Sequence[Any]) -> None:
    """Check that the tasks can train on a sample of the data.

    Args:
        split: its key under `dataset`.
        tasks: by name.
        rows: of a dataset.

    Raises:
        ConfigError: a row does not say which atoms are fixed, or no atom may move anywhere in the sample.
    """
    for row in rows if tasks else ():
        if getattr(row, "fixed", None) is None:
            raise ConfigError(
                f"{_name(row)} does not say which atoms are fixed ('fixed'); "
                f"ASE databases need dataset.{split}.a2g_args.r_fixed: true (the host's default)"
            )
    for task in tasks.values():
        task.check_sample([structures_of(row) for row in rows], f"sampled from dataset.{split}")


def check_periodicity(split: str, rows: Sequence[Any]) -> None:
    """Check that a sample of the data is periodic in the same directions; the host reads only a batch's first `pbc`.

    Args:
        split: its key under `dataset`.
        rows: of a dataset.

    Raises:
        ConfigError: it is not.
    """
    found = {tuple(torch.as_tensor(row.pbc).view(-1).bool().tolist()): row for row in rows if "pbc" in row}
    if len(found) > 1:
        said = "; ".join(f"{_name(row)} {list(pbc)}" for pbc, row in found.items())
        raise ConfigError(
            f"dataset.{split}: structures are not periodic in the same directions ({said}), and the host makes the "
            "graphs of a batch by the pbc of its first; keep them in data sets of their own, or set "
            "model.backbone.use_pbc_single: true"
        )


def labels_needed(tasks: Mapping[str, DenoisingTask], outputs: Collection[str]) -> dict[str, str]:
    """For each label that outputs or tasks use, what asks for it. No other label is looked at."""
    needed = {label: f"task.denoising.{task.name}" for task in tasks.values() for label in task.labels}
    return {**{name: f"outputs.{name}" for name in outputs}, **needed}


def check_batch(
    batch: Any, labels: Collection[str], max_num_elements: int | None, elements_key: str | None = "max_num_elements"
) -> None:
    """Check a batch or row on the CPU.

    Args:
        batch: collated, or one row.
        labels: names of those that are used.
        max_num_elements: one more than the highest atomic number that the model knows, if it has a table of them.
        elements_key: the backbone's argument for that, if it has one.

    Raises:
        DataError: an element beyond the model's table, or positions or labels that are not finite.
    """
    advice = f"raise model.backbone.{elements_key}" if elements_key else "this backbone's cannot be made longer"
    check_elements(batch, max_num_elements, advice)
    for key in ("pos", "cell", *sorted(labels)):
        values = getattr(batch, key, None)
        values = torch.as_tensor(values) if values is not None else None
        if values is None or bool(values.isfinite().all()):
            continue
        natoms, size = len(batch.pos), batch.natoms.numel() if isinstance(batch.natoms, torch.Tensor) else 1
        per_atom = values.dim() > 0 and len(values) == natoms and key != "cell" and natoms != size
        rows = values.reshape(natoms if per_atom else size, -1)
        row = int((~rows.isfinite().all(dim=-1)).nonzero()[0])
        name = _name(batch, row) if per_atom else name_of(batch, row)
        what = f"{key} of an atom is" if per_atom else f"{key} is"
        raise DataError(f"{name}: {what} not finite: {rows[row].tolist()}")


def check_elements(batch: Any, max_num_elements: int | None, advice: str) -> None:
    """Check the elements of a batch or row.

    Args:
        batch: collated, or one row.
        max_num_elements: one more than the highest atomic number that the model knows, if it has a table of them.
        advice: ends the message.

    Raises:
        DataError: names an element beyond the model's table.
    """
    elements = batch.atomic_numbers
    if max_num_elements is not None and int(elements.max()) >= max_num_elements:
        atom = int(elements.argmax())
        raise DataError(
            f"{_name(batch, atom)}: element {_element(int(elements[atom]))} is beyond the model's table, which ends at "
            f"{_element(max_num_elements - 1)}; {advice}"
        )


def _element(number: int) -> str:
    return f"{number} ({chemical_symbols[number]})" if number < len(chemical_symbols) else str(number)


@contextmanager
def neighbours_needed(
    backbone: Any, batches: Callable[[], Iterable[tuple[list[str], Any]]], sizes: str
) -> Iterator[None]:
    """While entered, an error of a host backbone that got a batch without any edge says so. Otherwise it costs nothing.

    Args:
        backbone: of the model that runs.
        batches: what it got, collated, each with its structures' names; asked for only after an error.
        sizes: what sets the number of structures in a batch.

    Raises:
        DataError: names the structures of a batch in which no atom has a neighbour.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # each backbone has its own
        for names, batch in batches():
            without, lone = _without_edges(backbone, batch), adapter_for(backbone).runs_lone_structures
            if len(without) == len(names) or (without and not lone):
                named = ", ".join(names[i] for i in without[:4]) + (" …" if len(without) > 4 else "")
                what = f"no batch without any neighbours (here of {len(names)})" if lone else "no structure without any"
                advice = "leave such structures out" + (f", or raise {sizes}" if lone else "")
                raise DataError(
                    f"{named}: no atom has a neighbour within the model's cutoff, and the host runs {what}; {advice}"
                ) from error
        raise


def _without_edges(backbone: Any, batch: Any) -> list[int]:
    """The structures of a batch that have no edge."""
    try:
        graph = backbone.generate_graph(batch)
        edges = graph["edge_index"] if isinstance(graph, dict) else graph.edge_index  # eSEN's is a dict
        return sorted(set(range(len(batch.natoms))) - set(batch.batch[edges[1]].tolist()))
    except Exception:  # it is the first error that matters
        return []


def names_of(batch: Any) -> list[str]:
    """What messages call each structure of a batch."""
    return [name_of(batch, i) for i in range(len(batch.natoms))]


def _name(row: Any, atom: int = 0) -> str:
    """The structure that an atom of a batch or row belongs to."""
    index = getattr(row, "batch", None)
    return name_of(row, int(index[atom]) if index is not None else 0)


def name_of(row: Any, structure: int = 0) -> str:
    """What messages call a structure of a batch, or a row."""
    found = names(row)
    number = f", row {int(row.row_number[structure])}" if "row_number" in row and "batch" in row else ""
    return f"structure sid/fid {found[structure]}{number}" if found else "a structure without sid"
