"""What a training step costs on fairchem 2.x: the host's plain step, and this package's, with eSCN-MD.

Each kind of step is a real unit of the same config on the same batch of the package's sample slabs, in the host's own
`train_step`: corruption, forward, loss, backward, clipping, optimiser, average of weights. The kinds take turns, in a
random order each round, so that whatever else the machine does hits all alike; a ratio is taken within a round, and the
table gives the median over the rounds with a 95% interval (order statistics). `plain, again` is a second plain step a
round: how far its ratio is from 1 is the error of the method. "wanted" is the most that a step may cost.

    python -m benchmarks.fairchem2.step_cost
    python -m benchmarks.fairchem2.step_cost --kinds conservative --experts 8 --layers 4 --channels 128
"""

from __future__ import annotations

import argparse
import copy
import logging
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from fairchem.core.units.mlip_unit.mlip_unit import MLIPTrainEvalUnit
from torchtnt.framework.state import EntryPoint, PhaseState, State

from benchmarks.command_line import parser_of
from benchmarks.fairchem2.units import unit_of
from benchmarks.intervals import median_interval
from fairchem_scd.sample_data import emt_slabs

KINDS = ("direct", "conservative")
# Most that the design allows, against the plain step: by row, then by kind of model.
REACH = {
    "DeNS, ordinary step": dict.fromkeys(KINDS, 1.01),
    "DeNS, mean at p = 0.5": dict.fromkeys(KINDS, 1.05),
    "SCD, beside labels": {"direct": 2.05, "conservative": 1.5},
}


@dataclass
class Variant:
    """One kind of step.

    Attributes:
        unit: of the host or ours; several variants may share one.
        drawn: whether its steps have the denoising task; None: there is none.
        seconds: one entry a round.
    """

    name: str
    unit: MLIPTrainEvalUnit
    drawn: bool | None = None
    seconds: list[float] = field(default_factory=list)

    def step(self, state: State, batch: AtomicData) -> None:
        """Move on to the next step of this kind, and take it."""
        progress = self.unit.train_progress
        progress.increment_step()
        while self.drawn is not None and (self.unit.draw_task(progress.num_steps_completed) is not None) != self.drawn:
            progress.increment_step()
        self.unit.train_step(state, batch)


def main(arguments: list[str] | None = None) -> list[str]:
    """Measure and print; returns the printed lines."""
    options = _parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    logging.getLogger().setLevel(logging.ERROR)
    warnings.simplefilter("ignore", UserWarning)
    lines = [_where(options), *_HEAD]
    print(*lines, sep="\n", flush=True)
    with _one_rank():
        batch = _batch(options.structures, options.seed)
        for kind in options.kinds:
            for experts in options.experts:
                variants = list(_variants(kind, experts, options))
                measure(variants, batch, options)
                rows = _rows(kind, experts, int(batch.natoms.sum()), variants)
                print(*rows, sep="\n", flush=True)
                lines += rows
    return lines


def measure(variants: list[Variant], batch: AtomicData, options: argparse.Namespace) -> None:
    """Time all variants, a step of each a round."""
    now = time.process_time if options.clock == "cpu" else time.perf_counter
    phase = PhaseState(dataloader=[batch] * 1000, max_epochs=1)
    state = State(entry_point=EntryPoint.TRAIN, train_state=phase)
    for unit in {id(variant.unit): variant.unit for variant in variants}.values():
        unit.on_train_start(state)
    order = random.Random(options.seed)
    for number in range(options.warmup + options.rounds):
        for variant in order.sample(variants, len(variants)):
            fresh = copy.deepcopy(batch)
            _wait()
            start = now()
            variant.step(state, fresh)
            _wait()
            if number >= options.warmup:
                variant.seconds.append(now() - start)


def _variants(kind: str, experts: int, options: argparse.Namespace) -> Iterator[Variant]:
    unit = partial(unit_of, kind, experts, options)
    plain = unit(None)
    yield Variant("plain", plain)
    yield Variant("plain, again", plain)
    dens = unit({"dens": {"prob": 0.5, "std": 0.1, "corrupt_ratio": 0.5}})
    yield Variant("DeNS, ordinary step", dens, drawn=False)
    yield Variant("DeNS, denoising step", dens, drawn=True)
    yield Variant("SCD, beside labels", unit({"scd": {}}), drawn=True)
    yield Variant("SCD, pre-training", unit({"scd": {}}, supervised=False), drawn=True)


def _batch(structures: int, seed: int) -> AtomicData:
    rows = []
    for atoms, sid, fid in emt_slabs(structures, seed):
        forces = atoms.get_forces(apply_constraint=False)
        energy = atoms.get_potential_energy()
        atoms.info.update(energy=energy, forces=forces)
        row = AtomicData.from_ase(atoms, task_name="emt", r_energy=True, r_forces=True, sid=f"{sid}-{fid}")
        row.dataset_name = "emt.train"
        rows.append(row)
    return atomicdata_list_to_batch(rows)


class _one_rank:
    """While entered, this process is the one rank of a run."""

    def __enter__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, init_method=f"file://{self.folder.name}/ranks", rank=0, world_size=1)

    def __exit__(self, *_: Any) -> None:
        dist.destroy_process_group()
        self.folder.cleanup()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- the table ----------------------------------------------------------------------------------------------------

_HEAD = (
    "",
    "| forces | experts | batch | step | ms | time ratio | 95% interval | wanted |",
    "|---|---|---|---|---|---|---|---|",
)


def _rows(kind: str, experts: int, atoms: int, variants: list[Variant]) -> list[str]:
    times = {variant.name: variant.seconds for variant in variants}
    pairs = zip(times["DeNS, ordinary step"], times["DeNS, denoising step"], strict=True)
    times["DeNS, mean at p = 0.5"] = [sum(pair) / 2 for pair in pairs]
    rows = []
    for name, seconds in times.items():
        ratios = [mine / base for mine, base in zip(seconds, times["plain"], strict=True)]
        ratio, (low, high) = statistics.median(ratios), median_interval(ratios)
        limit, wanted = REACH.get(name, {}).get(kind), ""
        if limit is not None:
            doubt = ", but the interval spans it" if low <= limit <= high else ""
            wanted = f"≤ {limit:.2f}: {'yes' if ratio <= limit else 'no'}{doubt}"
        interval = "" if name == "plain" else f"{low:.3f} – {high:.3f}"
        rows.append(
            f"| {kind} | {experts} | {atoms} atoms | {name} | {1000 * statistics.median(seconds):.1f} | {ratio:.3f} | "
            f"{interval} | {wanted} |"
        )
    return rows


def _where(options: argparse.Namespace) -> str:
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"{device}; torch {torch.__version__}; eSCN-MD, {options.layers} blocks, {options.channels} channels, lmax "
        f"{options.lmax}, at most {options.neighbors} neighbours within {options.radius} Å; {options.rounds} rounds, "
        f"{options.clock} time."
    )


# --- the command line ---------------------------------------------------------------------------------------------


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of("benchmarks.fairchem2.step_cost", __doc__)
    add: Callable[..., Any] = parser.add_argument
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of forces (default: both)")
    add("--experts", nargs="+", type=int, default=[0, 8], metavar="N", help="0: a dense model (default: 0 8)")
    add("--layers", type=int, default=4, metavar="N", help="blocks of the backbone (default: %(default)s)")
    add("--channels", type=int, default=32, help="channels (default: %(default)s)")
    add("--lmax", type=int, default=2, help="highest degree (default: %(default)s)")
    add("--radius", type=float, default=6.0, help="cutoff in Å (default: %(default)s)")
    add("--neighbors", type=int, default=30, help="most neighbours of an atom (default: %(default)s)")
    add("--structures", type=int, default=4, help="slabs of 13 or 14 atoms in the batch (default: %(default)s)")
    add("--rounds", type=int, default=40, help="measured rounds (default: %(default)s)")
    add("--warmup", type=int, default=3, help="rounds before those (default: %(default)s)")
    add(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="wall time, or CPU time of all threads: steadier on a busy machine, useless on a GPU (default: wall)",
    )
    add("--threads", type=int, metavar="N", help="CPU threads (default: OMP_NUM_THREADS, else all cores)")
    add("--seed", type=int, default=0, help="of weights, batch, noise and order (default: %(default)s)")
    add("--quick", action="store_true", help="a smoke test: 1 block, 8 channels, lmax 1, 2 rounds, 2 slabs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.layers, options.channels, options.lmax = 1, 8, 1
        options.structures, options.rounds, options.warmup = 2, 2, 1
    if min(options.rounds, options.structures, options.layers) < 1 or options.warmup < 0:
        parser.error("--rounds, --structures and --layers must be at least 1, --warmup at least 0")
    return options


if __name__ == "__main__":
    main()
