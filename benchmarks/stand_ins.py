"""What the stand-ins for torch-scatter and torch-sparse cost: a training step with them against one with the real ones.

The host's plain trainer takes the same step, on the same batch of sample slabs, with each of the two in turns, in a
random order each round. A ratio is taken within a round, and the table gives the median over the rounds with a 95%
interval. `real, again` is a second step a round with the real ones: how far its ratio is from 1 is the error of the
method. "wanted" is the most that a step may cost.

    python -m benchmarks.stand_ins

The real packages are the installed ones. Where the stand-ins are installed they are built first, once, which takes uv,
a C++ compiler and some ten minutes.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import logging
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from fairchem.core.common.utils import setup_imports

from benchmarks.command_line import parser_of
from benchmarks.common import BACKBONES, PLAIN, hydra, make_trainer, training, use_threads
from benchmarks.step_cost import Variant, measure, median_interval

ROOT = Path(__file__).parent.parent
HERE = ROOT / "hosts" / "fairchem1"
BUILT = ROOT / "real-extensions"
REAL = ("torch-scatter==2.1.2", "torch-sparse==0.6.18")
WANTED = dict.fromkeys(BACKBONES, 1.10) | dict.fromkeys(("equiformer_v2", "escn", "esen", "esen_conservative"), 1.02)
_PACKAGES = ("torch_scatter", "torch_sparse")


@dataclass(frozen=True)
class Extensions:
    """Both packages, real or stand-ins, and what the host imports of them."""

    torch_scatter: ModuleType
    torch_sparse: ModuleType

    def host_names(self) -> dict[str, Any]:
        """By the names under which the host's modules have them."""
        scatter = self.torch_scatter
        found = {name: getattr(scatter, name) for name in ("scatter", "segment_coo", "segment_csr")}
        return found | {"broadcast": scatter.utils.broadcast, "SparseTensor": self.torch_sparse.SparseTensor}


def installed() -> Extensions:
    """What the host runs with in this process."""
    return Extensions(*(importlib.import_module(name) for name in _PACKAGES))


@functools.cache
def stand_ins() -> Extensions:
    """The stand-ins of this repository, installed or not."""
    if _are_stand_ins(installed()):
        return installed()
    return _load(HERE / "torch-scatter", HERE / "torch-sparse")


@functools.cache  # torch compiles their classes, which it does once
def real(folder: Path = BUILT) -> Extensions:
    """The real packages: the installed ones, or those in `folder`, built there if they are not there yet."""
    if not _are_stand_ins(installed()):
        return installed()
    if not (folder / "torch_sparse").is_dir():
        build(folder)
    return _load(folder)


def build(folder: Path) -> None:
    """Build the real packages into a folder, against the PyTorch of this process.

    Raises:
        subprocess.CalledProcessError: uv or the compiler failed; what they said was printed.
    """
    with tempfile.TemporaryDirectory() as scratch:

        def uv(*arguments: str) -> None:
            # Not in a clone, whose settings would give the stand-ins.
            subprocess.run(["uv", *arguments], check=True, cwd=scratch)

        uv("venv", "--quiet", "--python", sys.executable, "venv")
        pip = ("pip", "install", "--quiet", "--python", "venv")
        torch_version = torch.__version__.partition("+")[0]
        uv(*pip, "setuptools", "wheel", "numpy<2", f"torch=={torch_version}")
        uv(*pip, "--no-build-isolation", "--no-deps", "--target", str(folder.resolve()), *REAL)


def _are_stand_ins(extensions: Extensions) -> bool:
    return extensions.torch_scatter.__version__.endswith("+standin")


def _load(*folders: Path) -> Extensions:
    """Import both packages from these folders beside those that the process already has."""
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in _PACKAGES}
    paths = [str(folder.resolve()) for folder in folders]
    sys.path[:0] = paths
    try:
        return installed()
    finally:
        del sys.path[: len(paths)]
        for name in [name for name in sys.modules if name.partition(".")[0] in _PACKAGES]:
            del sys.modules[name]
        sys.modules.update(ours)


def host_places() -> list[tuple[ModuleType, str]]:
    """Modules of the host, and the name of something of either package in them."""
    setup_imports()
    names = installed().host_names()
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("fairchem.core.")]
    return [(module, name) for module in modules for name in names if vars(module).get(name) is names[name]]


def put(places: list[tuple[ModuleType, str]], names: dict[str, Any]) -> None:
    """Let the host call these from here on."""
    for module, name in places:
        setattr(module, name, names[name])


@contextmanager
def host_with(names: dict[str, Any]) -> Iterator[None]:
    """While entered, the host calls these in place of what it imported."""
    places = host_places()
    put(places, names)
    try:
        yield
    finally:
        put(places, installed().host_names())


def main(arguments: list[str] | None = None) -> list[str]:
    """Measure and print; returns the printed lines."""
    options = _parse(arguments)
    use_threads(options.threads)
    logging.getLogger().setLevel(logging.ERROR)
    both = {"real": real(options.real).host_names(), "stand-ins": stand_ins().host_names()}
    lines = [
        f"CPU, {torch.get_num_threads()} threads; torch {torch.__version__}; {options.layers} blocks, "
        f"{options.channels} channels, lmax {options.lmax}, at most {options.neighbors} neighbours; "
        f"{options.rounds} rounds, {options.clock} time.",
        "",
        "| backbone | batch | real, ms | real, again | stand-ins | 95% interval | wanted |",
        "|---|---|---|---|---|---|---|",
    ]
    print(*lines, sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for backbone in options.backbones:
            lines.append(_row(backbone, folder, both, options))
            print(lines[-1], flush=True)
    return lines


def _row(backbone: str, folder: str, both: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    model = hydra(
        backbone,
        layers=options.layers,
        channels=options.channels,
        lmax=options.lmax,
        radius=options.radius,
        neighbors=options.neighbors,
    )
    slabs = {"format": "emt_slabs", "src": f"{folder}/slabs", "num_structures": 4 * options.structures}
    slabs["key_mapping"] = {"y": "energy", "force": "forces"}
    optim = training(epochs=100, batch_size=options.structures, lr=1e-5, ema=0.999)
    trainer = make_trainer(PLAIN, model, {"train": slabs}, optim, seed=options.seed)
    places = host_places()

    def variant(name: str, which: str) -> Variant:
        select: Callable[[], None] = lambda: put(places, both[which])  # noqa: E731
        return Variant(name, trainer, select=select)

    base, again, ours = variant("real", "real"), variant("real, again", "real"), variant("stand-ins", "stand-ins")
    batch = next(iter(trainer.train_loader))
    try:
        measure([base, again, ours], batch, options.rounds, options.warmup, options.clock, options.seed)
    finally:
        put(places, installed().host_names())
    ratios = [mine / theirs for mine, theirs in zip(ours.seconds, base.seconds, strict=True)]
    repeat = statistics.median(mine / theirs for mine, theirs in zip(again.seconds, base.seconds, strict=True))
    ratio, (low, high) = statistics.median(ratios), median_interval(ratios)
    doubt = ", but the interval spans it" if low <= WANTED[backbone] <= high else ""
    return (
        f"| {backbone} | {int(batch.natoms.sum())} atoms | {1000 * statistics.median(base.seconds):.1f} | {repeat:.3f} "
        f"| {ratio:.3f} | {low:.3f} – {high:.3f} | ≤ {WANTED[backbone]:.2f}: "
        f"{'yes' if ratio <= WANTED[backbone] else 'no'}{doubt} |"
    )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of("benchmarks.stand_ins", __doc__)
    add = parser.add_argument
    add(
        "--real",
        type=Path,
        default=BUILT,
        metavar="FOLDER",
        help="of the real packages, where the stand-ins are installed (default: real-extensions, in the clone)",
    )
    add("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES), help="default: all")
    add("--layers", type=int, default=4, metavar="N", help="blocks of the backbone (default: %(default)s)")
    add("--channels", type=int, default=32, help="channels (default: %(default)s)")
    add("--lmax", type=int, default=3, help="highest degree (default: %(default)s)")
    add("--radius", type=float, default=8.0, help="cutoff in Å (default: %(default)s)")
    add("--neighbors", type=int, default=20, help="most neighbours of an atom (default: %(default)s)")
    add("--structures", type=int, default=4, help="slabs of 13 or 14 atoms in the batch (default: %(default)s)")
    add("--rounds", type=int, default=60, help="measured rounds (default: %(default)s)")
    add("--warmup", type=int, default=5, help="rounds before those (default: %(default)s)")
    add(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="wall time, or CPU time of all threads: steadier on a busy machine (default: wall)",
    )
    add("--threads", type=int, metavar="N", help="CPU threads (default: OMP_NUM_THREADS, else all cores)")
    add("--seed", type=int, default=0, help="of the models and of the order (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
