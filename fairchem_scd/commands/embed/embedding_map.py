"""A map of structures in two dimensions. Structures with similar embeddings lie close together."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import numpy as np
from ase.formula import Formula
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fairchem_scd.commands import pictures
from fairchem_scd.commands.embed.table import Embeddings
from fairchem_scd.errors import ConfigError

Color = Literal["energy", "natoms", "adsorbate", "composition"]
Method = Literal["pca", "umap"]

LEAST = 3
"""The fewest structures that make a map."""

_STEPS = [1, 2, 5, 10]
"""Allowed distances between ticks, times a power of ten."""

_AREA = 22.0
"""Area of a large point, pt²."""

_MANY = 3000
"""With more points than these, a vector picture holds them as one image, which keeps the file small."""


def check_method(method: Method) -> None:
    """Raise ConfigError where the library that a map needs is not installed."""
    if method == "umap":
        try:
            import umap  # noqa: F401
        except ImportError as error:  # also raised where it does not work with the other packages
            raise ConfigError(
                f"--method umap needs UMAP ({error}): pip install 'fairchem-scd[umap]'; pca needs nothing"
            ) from error


def draw(embeddings: Embeddings, *, color: Color | None = None, method: Method = "pca") -> Figure:
    """Draw a map of B structures, of their features or, where there are none, of their c.

    Args:
        embeddings: of the structures.
        color: "energy", eV per atom; "natoms"; "adsorbate", the formula of the atoms with tag 2; "composition", the
            reduced formula, or the elements alone where there are too many formulas; where tags mark an adsorbate,
            without its atoms. None: energy where the data has it, else composition.
        method: "pca", principal components of the centred embeddings; "umap".

    Raises:
        ConfigError: fewer than `LEAST` structures, no data to colour by, or UMAP is not installed.
    """
    check_method(method)
    if len(embeddings) < LEAST:
        raise ConfigError(f"--plot: a map needs {LEAST} structures at least (got {len(embeddings)})")
    color = color or ("energy" if embeddings.energy is not None else "composition")
    values, title = _values(embeddings, color)
    points, axis_labels = _umap(embeddings) if method == "umap" else _pca(embeddings)

    figure = pictures.new_figure(pictures.SINGLE, 2.6)
    axes = figure.subplots()
    axes.set(xlabel=axis_labels[0], ylabel=axis_labels[1])
    if method == "umap":  # its units mean nothing
        axes.set(xticks=[], yticks=[])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    if values.dtype.kind in "if":
        _numbers(figure, axes, points, values, title)
    else:
        _categories(figure, axes, points, values, title)
    return figure


def pca(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Principal components.

    Args:
        features: [B, C].

    Returns:
        [B, 2] coordinates along the first two, and [2] the share of the variance that each explains.
    """
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    u, s = (np.pad(a[..., :2], [(0, 0)] * (a.ndim - 1) + [(0, max(0, 2 - a.shape[-1]))]) for a in (u, s))
    u = u * np.where(
        u.sum(axis=0, keepdims=True) < 0, -1.0, 1.0
    )  # the sign of an axis has no meaning: this makes it the same at every call
    total = float((centred**2).sum())
    return u * s, s**2 / total if total > 0 else np.zeros(2)


def _pca(embeddings: Embeddings) -> tuple[np.ndarray, list[str]]:
    points, shares = pca(_embedded(embeddings))
    return points, [f"PC {i + 1} ({100 * share:.3g}% of variance)" for i, share in enumerate(shares)]


def _umap(embeddings: Embeddings) -> tuple[np.ndarray, list[str]]:
    from umap import UMAP

    neighbours = min(15, len(embeddings) - 1)
    mapping = UMAP(n_neighbors=neighbours, random_state=0, n_jobs=1, init="pca")
    return mapping.fit_transform(_embedded(embeddings)), ["UMAP 1", "UMAP 2"]


def _embedded(embeddings: Embeddings) -> np.ndarray:
    return embeddings.features if embeddings.features is not None else embeddings.condition


def _values(embeddings: Embeddings, color: Color) -> tuple[np.ndarray, str]:
    """[B] the values that the colours show, numbers or names of categories; and their title."""
    if color == "energy":
        if embeddings.energy is None:
            raise ConfigError(
                "--color energy: the data has no energies; LMDBs name them by dataset.train.key_mapping (y: energy), "
                "ASE databases read them with dataset.train.a2g_args.r_energy: true"
            )
        return embeddings.energy / embeddings.natoms, "energy (eV/atom)"
    if color == "natoms":
        return embeddings.natoms, "number of atoms"
    if color == "adsorbate":
        if embeddings.adsorbate is None:
            raise ConfigError("--color adsorbate: no atom of the data has tag 2, which marks adsorbates")
        names = [format(Formula(name), "periodic") if name else "none" for name in embeddings.adsorbate]
        return np.array(names), "adsorbate"
    formulas = [Formula(formula) for formula in embeddings.formula]
    of = ""
    if embeddings.adsorbate is not None:
        formulas = [_without(f, Formula(a)) for f, a in zip(formulas, embeddings.adsorbate, strict=True)]
        of = "\nof slab"
    reduced = [format(formula.reduce()[0], "metal") for formula in formulas]
    if len(set(reduced)) <= len(pictures.COLORS):
        return np.array(reduced), f"composition{of}"
    return np.array(["–".join(formula.convert("metal").count()) for formula in formulas]), f"elements{of}"


def _without(formula: Formula, part: Formula) -> Formula:
    counts = formula.count()
    for element, count in part.count().items():
        counts[element] -= count
    return Formula.from_dict({element: count for element, count in counts.items() if count})


def _look(count: int) -> dict[str, Any]:
    """How points are drawn: large where there are few, and small where they would hide each other."""
    area = float(np.clip(_AREA * np.sqrt(100 / count), 3, _AREA))  # pt²
    return {"s": area, "linewidths": area / 80, "edgecolors": "white", "rasterized": count > _MANY}


def _numbers(figure: Figure, axes: Axes, points: np.ndarray, values: np.ndarray, title: str) -> None:
    order = np.random.default_rng(0).permutation(len(values))  # so that the data's last part does not hide the others
    points, values = points[order], values[order]
    known = np.isfinite(values)
    low, high = float(values[known].min()), float(values[known].max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    look = _look(len(points))
    if not known.all():
        axes.scatter(*points[~known].T, c=pictures.OTHER, label="unknown", **look)
        figure.legend(loc="outside upper right", handletextpad=0.2)
    drawn = axes.scatter(*points[known].T, c=values[known], cmap=pictures.SEQUENTIAL, vmin=low, vmax=high, **look)
    bar = figure.colorbar(drawn, ax=axes, label=title, pad=0.02, aspect=25)
    bar.outline.set_linewidth(0.6)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS, integer=values.dtype.kind == "i"))
    bar.ax.yaxis.get_major_formatter().set_useOffset(False)
    bar.solids.set_rasterized(True)


def _categories(figure: Figure, axes: Axes, points: np.ndarray, values: np.ndarray, title: str) -> None:
    counts = Counter(values.tolist())
    # The most common have a colour and a marker each; among equals by name.
    common = sorted(counts, key=lambda name: (-counts[name], name))[: len(pictures.COLORS)]
    look = _look(len(points))
    rest = ~np.isin(values, common)
    handles = []
    if rest.any():  # below all others
        handles.append(
            axes.scatter(*points[rest].T, c=pictures.OTHER, marker=pictures.MARKERS[-1], label="other", **look)
        )
    for name, color, marker in zip(common, pictures.COLORS, pictures.MARKERS, strict=False):
        chosen = values == name
        handles.append(axes.scatter(*points[chosen].T, c=color, marker=marker, label=_letters(name), **look))
    if rest.any():
        handles = [*handles[1:], handles[0]]
    scale = np.sqrt(_AREA / look["s"])  # symbols in the legend have the same size in all maps
    figure.legend(
        handles=handles, title=title, loc="outside right upper", markerscale=scale, handletextpad=0.2, borderpad=0
    )


def _letters(name: str) -> str:
    """A formula with its numbers as subscripts."""
    return "".join(f"$_{{{c}}}$" if c.isdigit() else c for c in name)
