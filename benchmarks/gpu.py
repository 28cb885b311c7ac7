"""Step time and peak memory of full-size models on one GPU: plain, the host's own DeNS, DeNS, SCD and pre-training.

The models are those of configs/dens_oc20_2m_12epochs.yml (EquiformerV2, 12 blocks, degrees to 6, 128 channels),
configs/dens_escn_oc20_2m.yml and configs/dens_esen_oc20.yml; the structures are slabs of 80 atoms. What is measured is
cost alone, so energies and forces are random numbers. All variants of a group take turns in one run, and a ratio is
taken within a round, as in benchmarks/step_cost.py; memory is the most that a step of the variant holds.

    python -m benchmarks.gpu                       # all of it, in under 8 minutes; a markdown table
    python -m benchmarks.gpu --out costs.md --minutes 8
    python -m benchmarks.gpu --quick               # tiny models, on the CPU where there is no GPU: does it run?

Groups are measured in the order of the table. One that would begin after --minutes is left out, and the table says so.
It runs with newer versions of PyTorch, NumPy and SciPy than the package pins; what was patched for that is printed.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import newer_versions  # first: the host does not import with newer versions

PATCHED = newer_versions.patch()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from ase.build import fcc111  # noqa: E402
from ase.constraints import FixAtoms  # noqa: E402
from fairchem.core.common.utils import load_config  # noqa: E402
from fairchem.core.datasets import data_list_collater  # noqa: E402
from fairchem.core.preprocessing import AtomsToGraphs  # noqa: E402

from benchmarks import step_cost  # noqa: E402
from benchmarks.command_line import parser_of  # noqa: E402
from benchmarks.common import DENOISING, PLAIN, make_trainer, training  # noqa: E402

ROOT = Path(__file__).parents[1]
CONFIGS = {
    "EquiformerV2": "configs/dens_oc20_2m_12epochs.yml",
    "eSCN": "configs/dens_escn_oc20_2m.yml",
    "eSEN": "configs/dens_esen_oc20.yml",
}
_METALS = ("Cu", "Ag", "Au", "Ni", "Pd", "Pt", "Rh", "Ir")


@dataclass(frozen=True)
class Group:
    """Variants that are measured side by side.

    Attributes:
        model: a key of `CONFIGS`.
        structures: how many, of 80 atoms each.
        amp: the host's mixed precision.
        extras: the host's own DeNS and the variants that save memory too.
    """

    model: str
    structures: int
    amp: bool
    extras: bool = False

    def __str__(self) -> str:
        return f"{self.model}, {self.structures} structures, {'AMP' if self.amp else 'float32'}"


GROUPS = (
    Group("EquiformerV2", 4, amp=True, extras=True),
    Group("EquiformerV2", 4, amp=False, extras=True),
    Group("EquiformerV2", 8, amp=True),
    Group("EquiformerV2", 16, amp=True),
    Group("eSCN", 6, amp=False),
    Group("eSEN", 4, amp=False),
    Group("EquiformerV2", 8, amp=False),
    Group("EquiformerV2", 16, amp=False),
    Group("eSCN", 6, amp=True),
    Group("eSEN", 16, amp=False),
)


def main(arguments: list[str] | None = None) -> list[str]:
    """Measure and print; returns the lines of the report."""
    options = _parse(arguments)
    warnings.simplefilter("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.monotonic()
    lines = [_where(device), *(f"Patched: {what}" for what in PATCHED), ""]
    lines += [
        "| model, structures of 80 atoms | step | ms | time ratio | 95% interval | peak memory, GB | memory ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    print(*lines, sep="\n", flush=True)
    for group in GROUPS[:2] if options.quick else GROUPS:
        if time.monotonic() - start > 60 * options.minutes:
            rows = [f"| {group} | left out: {options.minutes:g} minutes were over | | | | | |"]
        else:
            rows = list(_rows(group, measure(group, device, options)))
        print(*rows, sep="\n", flush=True)
        lines += rows
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")
    return lines


# --- the variants -----------------------------------------------------------------------------------------------------


def variants_of(group: Group, folder: Path, device: str, quick: bool) -> Iterator[step_cost.Variant]:
    """The kinds of step of a group, the plain one first; each has a trainer of its own."""
    model = _model(group.model, quick)
    optim = training(epochs=100, batch_size=group.structures, lr=1e-6, ema=0.999)
    dataset = {
        "train": {
            "format": "emt_slabs",  # for the trainers to begin with; the measured batches are others
            "src": str(folder / "slabs"),
            "num_structures": 16,
            "key_mapping": {"y": "energy", "force": "forces"},
            "transforms": {
                "normalizer": {"energy": {"mean": 0.0, "stdev": 1.0}, "forces": {"mean": 0.0, "stdev": 1.0}}
            },
        }
    }

    def trainer(name: str, model: dict[str, Any] = model, **more: Any) -> Any:
        amp = group.amp and device == "cuda"
        return make_trainer(name, model, dataset, more.pop("optim", optim), seed=0, device=device, amp=amp, **more)

    def denoising(name: str, block: dict[str, Any], model: dict[str, Any] = model, **more: Any) -> step_cost.Variant:
        made = trainer(DENOISING, model, denoising=block, **more)
        return step_cost.Variant(name, made, select=step_cost.next_step(made, drawn=True))

    recomputed = {**model, "backbone": {**model["backbone"], "activation_checkpoint": True}}
    yield step_cost.Variant("plain", trainer(PLAIN))
    yield denoising("DeNS, denoising step", {"dens": {"prob": 0.5}})
    yield denoising("SCD beside energy and forces", {"scd": {"prob": 1.0}})
    yield denoising("SCD, pre-training", {"scd": {"prob": 1.0}}, supervised=False)
    if group.model == "EquiformerV2" and group.extras:
        yield denoising("SCD, recompute_clean_pass", {"scd": {"prob": 1.0, "recompute_clean_pass": True}})
        yield denoising("SCD, activation_checkpoint", {"scd": {"prob": 1.0}}, recomputed)
        yield step_cost.Variant("plain, activation_checkpoint", trainer(PLAIN, recomputed))
        own_model, own_optim = step_cost.host_dens(model, optim)
        own = trainer("equiformerv2_dens", own_model, optim=own_optim)
        yield step_cost.Variant("host's own DeNS, denoising step", own, prepare=step_cost.host_corruption)


def _model(name: str, quick: bool) -> dict[str, Any]:
    """The `model:` block of a config, as it is; or a tiny one of the same class."""
    config, _, _ = load_config(str(ROOT / CONFIGS[name]))
    model = copy.deepcopy(config["model"])
    model.pop("legacy_weight_decay", None)  # an argument of this package's model, not of the plain one
    backbone = model["backbone"]
    backbone["activation_checkpoint"] = False
    if quick:
        degrees = {"lmax": 1, "mmax": 1} if "lmax" in backbone else {"lmax_list": [1], "mmax_list": [1]}
        backbone.update(num_layers=1, sphere_channels=16, **degrees)
    return model


def slabs_of_80(count: int) -> Any:
    """A batch of slabs of 80 atoms, rattled, their two lowest layers fixed; with random labels."""
    rng = np.random.default_rng(0)
    converter = AtomsToGraphs(r_energy=False, r_forces=False, r_edges=False, r_pbc=True)
    rows = []
    for number in range(count):
        slab = fcc111(_METALS[number % len(_METALS)], size=(4, 4, 5), vacuum=8.0, periodic=True)
        layers = slab.get_tags()  # 1 is the top layer
        slab.set_tags(np.where(layers == 1, 2, np.where(layers == 2, 1, 0)))
        slab.set_constraint(FixAtoms(np.flatnonzero(layers >= 4)))
        slab.positions[layers < 4] += 0.05 * rng.standard_normal((int((layers < 4).sum()), 3))
        row = converter.convert(slab)
        row.sid, row.fid, row.natoms = number, 0, len(slab)
        row.energy = float(rng.standard_normal())
        row.forces = torch.from_numpy(rng.standard_normal((len(slab), 3)).astype(np.float32))
        rows.append(row)
    return data_list_collater(rows, otf_graph=True)


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(group: Group, device: str, options: argparse.Namespace) -> list[step_cost.Variant]:
    """Time and memory of each variant of a group; one that does not fit on the device has none."""
    batch = slabs_of_80(1 if options.quick else group.structures)
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        for variant in variants_of(group, Path(folder), device, options.quick):
            measured.append(variant)
            if not _fits(variant, batch):
                variant.trainer = None
        fitting = [variant for variant in measured if variant.trainer is not None]
        step_cost.measure(fitting, batch, rounds=options.rounds, warmup=1, clock="wall", seed=0)
    for variant in fitting:
        variant.trainer = None
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return measured


def _fits(variant: step_cost.Variant, batch: Any) -> bool:
    """Whether a step fits on the device; notes its memory."""
    try:
        for _ in range(2):  # in the first, kernels are chosen and memory is laid out
            variant.memory = step_cost.memory_of(variant, batch)
    except torch.cuda.OutOfMemoryError:
        return False
    return True


def _rows(group: Group, variants: list[step_cost.Variant]) -> Iterator[str]:
    plain = variants[0]
    for variant in variants:
        if not variant.seconds:
            yield f"| {group} | {variant.name} | out of memory | | | | |"
            continue
        ratio = interval = held = ""
        if plain.seconds:
            ratios = [mine / base for mine, base in zip(variant.seconds, plain.seconds, strict=True)]
            ratio = f"{statistics.median(ratios):.3f}"
            interval = "{:.3f} – {:.3f}".format(*step_cost.median_interval(ratios)) if variant is not plain else ""
            held = f"{variant.memory / plain.memory:.3f}"
        milliseconds = 1000 * statistics.median(variant.seconds)
        yield (
            f"| {group} | {variant.name} | {milliseconds:.1f} | {ratio} | {interval} | {variant.memory / 1e9:.2f} | "
            f"{held} |"
        )


def _where(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU (no GPU is visible)"
    return f"{name}; torch {torch.__version__}, numpy {np.__version__}; wall time, medians of paired rounds."


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of("benchmarks.gpu", __doc__)
    parser.add_argument("--minutes", type=float, default=7.0, help="begin no group after this many (default: 7)")
    parser.add_argument("--rounds", type=int, default=10, help="measured rounds (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="file to write the table to")
    parser.add_argument("--quick", action="store_true", help="tiny models, two groups, two rounds")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds = 2
    return options


if __name__ == "__main__":
    main()
