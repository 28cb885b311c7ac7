"""How many components of the noise SCD's condition explains, against the number of atoms.

The noise of a structure of N atoms, without its mean, has 3N − 3 components. To first order a model that is told K
independent invariants of the clean structure can subtract K of them: a share K / (3N − 3).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import torch

from benchmarks.evidence.condition_tables import but_form, model_of, pretraining_of, told_of
from benchmarks.evidence.figures import legend_below
from benchmarks.evidence.tables import Record, spread, table
from fairchem_scd.commands import pictures as style
from fairchem_scd.denoising.condition_report import Gain

_FORMS = {"embedding": "SCD as shipped", "standardised": "standardised", "difference": "difference form"}
"""The forms of the condition that are compared, and the titles of their panels."""

_SMALLEST_GROUP = 12
"""So many structures at least have their share of noise taken together …"""

_ALIKE = 1.5
"""… and the largest has at most so many times the atoms of the smallest."""


@dataclass(frozen=True)
class Group:
    """Held-out structures of like size, denoised by one model with a condition and by one without.

    Attributes:
        data: name of the data.
        model: backbone and channels.
        told: form of the condition.
        steps: of both models' training.
        seed: of both models.
        atoms: numbers of atoms [B].
        right: noise errors [B] told the right embedding.
        plain: noise errors [B] of plain denoising of equally many steps.
    """

    data: str
    model: str
    told: str
    steps: int
    seed: int
    atoms: np.ndarray
    right: np.ndarray
    plain: np.ndarray

    @property
    def share(self) -> Gain:
        """The share of plain denoising's noise error that the condition explains."""
        return Gain.of(torch.from_numpy(self.right), torch.from_numpy(self.plain))

    @property
    def freedom(self) -> float:
        """Mean number of components of the noise, 3N − 3."""
        return float(3 * self.atoms.mean() - 3)

    @property
    def sizes(self) -> str:
        """The numbers of atoms, in words."""
        low, high = self.atoms.min(), self.atoms.max()
        return str(low) if low == high else f"{low} to {high}"


def groups(ladder: Sequence[Record], before: Sequence[Record]) -> list[Group]:
    """Groups of like size, of all models that have plain denoising of as many steps beside them.

    Args:
        ladder: lines of `benchmarks.evidence.condition`.
        before: lines of the pre-trainings of `benchmarks.evidence.learning`.
    """
    plain = {but_form(r): r for r in ladder if r["run"]["form"] == "plain"}
    plain |= {repr(pretraining_of(r)): r for r in before if told_of(r) == "plain"}
    found = []
    for record in [*ladder, *before]:
        in_ladder = "form" in record["run"]
        told = record["run"]["form"] if in_ladder else told_of(record)
        beside = plain.get(but_form(record) if in_ladder else repr(pretraining_of(record)))
        if told not in _FORMS or beside is None:
            continue
        how = record["run"] if in_ladder else record["run"]["pretraining"]
        errors = record["scores"]["structures"]
        atoms, right = np.array(errors["atoms"]), np.array(errors["right"])
        without = np.array(beside["scores"]["structures"]["none"])
        data = record["run"]["data"]
        found += [
            Group(data, model_of(record), told, how["length"]["steps"], how["seed"], atoms[i], right[i], without[i])
            for i in _of_like_size(atoms)
        ]
    return found


def _of_like_size(atoms: np.ndarray) -> list[np.ndarray]:
    """Row numbers of structures of like size. Groups that stay too small are left out."""
    left, found = np.unique(atoms), []
    while len(left):
        inside = (atoms == left[0]).sum()
        last = left[0]
        for size in left[1:]:
            if inside >= _SMALLEST_GROUP or size > _ALIKE * left[0]:
                break
            inside, last = inside + (atoms == size).sum(), size
        if inside >= _SMALLEST_GROUP:
            found.append(np.flatnonzero((atoms >= left[0]) & (atoms <= last)))
        left = left[left > last]
    return found


def components_table(found: Sequence[Group]) -> str:
    """Shares of the noise that the condition explains, and how many components they make; means over seeds."""
    rows = []
    keys = sorted({(g.told, g.model, g.freedom, g.data, g.sizes, len(g.atoms), g.steps) for g in found})
    for told, model, freedom, data, sizes, count, steps in keys:
        same = [g for g in found if (g.told, g.model, g.data, g.sizes, g.steps) == (told, model, data, sizes, steps)]
        share = statistics.mean(g.share.value for g in same)
        error = statistics.mean(g.share.error for g in same)
        rows.append(
            [
                *(told, model, data, sizes, str(count), str(steps), str(len(same))),
                f"{100 * share:.1f} ± {100 * error:.1f}",
                f"{share * freedom:.1f} ± {error * freedom:.1f}",
                spread([g.share.value * freedom for g in same]),
            ]
        )
    heads = [
        "told",
        "model",
        "data",
        "atoms",
        "structures",
        "steps",
        "seeds",
        "explained, % of plain denoising's noise error",
    ]
    return table([*heads, "components", "components by seed"], rows)


def draw_components(found: Sequence[Group], path: Path) -> None:
    """Shares of the noise that the condition explains, against the number of atoms; mean over seeds.

    Of each model and data set the longest runs. EquiformerV2 has hollow marks, a little to the right of PaiNN's.
    """
    found = [g for g in found if g.steps == max(h.steps for h in found if _kind(h) == _kind(g))]
    forms = [form for form in _FORMS if any(g.told == form for g in found)]
    kinds = sorted({(g.data, g.model) for g in found})
    hues = dict(zip(sorted({g.data for g in found}), cycle(style.COLORS), strict=False))
    shapes = dict(zip(hues, cycle(style.MARKERS), strict=False))
    figure = style.new_figure(style.DOUBLE, 3.4)
    panels = figure.subplots(1, len(forms), sharey=True, squeeze=False)[0]
    for axes, form in zip(panels, forms, strict=True):
        for data, model in kinds:
            same = [g for g in found if (g.told, g.data, g.model) == (form, data, model)]
            sizes = sorted({float(g.atoms.mean()) for g in same})
            shares = [[100 * g.share.value for g in same if g.atoms.mean() == size] for size in sizes]
            errors = [[100 * g.share.error for g in same if g.atoms.mean() == size] for size in sizes]
            painn = model.startswith("painn")
            axes.errorbar(
                sizes if painn else [1.08 * size for size in sizes],
                [np.mean(of) for of in shares],
                yerr=[np.mean(of) for of in errors],
                capsize=2,
                linestyle="none",
                color=hues[data],
                marker=shapes[data],
                markerfacecolor=hues[data] if painn else "white",
                label=data.replace("_", " ") + ("" if painn else ", EquiformerV2"),
            )
        low, high = (of(float(g.atoms.mean()) for g in found) for of in (min, max))
        atoms = np.geomspace(low, high, 100)
        for number, components in enumerate((1, 4, 16)):
            share = 100 * np.minimum(1, components / (3 * atoms - 3))
            label = f"{components} component" + ("s" if components > 1 else "")
            axes.plot(atoms, share, color=style.OTHER, linestyle=style.LINES[number], zorder=0, label=label)
        axes.axhline(0, color=style.OTHER, linewidth=0.8, zorder=0)
        axes.set(xscale="log", ylim=(-2, 130), xlabel="atoms", title=_FORMS[form])
        axes.set_yscale("symlog", linthresh=1)
        shown = (-2, -1, 0, 1, 2, 5, 10, 20, 50, 100)
        axes.set_yticks(shown, [str(share) for share in shown])
        ticks = [n for n in (2, 4, 8, 16, 32, 64, 128) if low <= n <= high]
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.minorticks_off()
    panels[0].set_ylabel("noise explained, %")
    legend_below(figure, ncols=4)
    style.save(figure, path, force=True)


def _kind(group: Group) -> tuple[str, str, str]:
    return group.told, group.model, group.data
