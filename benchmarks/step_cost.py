"""What a training step costs: the host's plain step, this package's DeNS and SCD steps, and the host's own DeNS.

Every variant is a real trainer of the same config on the same batch of the package's sample slabs. A step is what the
trainers' loop does with a batch: corruption, forward, loss, metrics, backward, clipping, optimiser, average of weights.
The variants take turns, in a random order each round, so that whatever else the machine does hits all alike; a ratio is
taken within a round, and the table gives the median over the rounds with a 95% interval (order statistics).
`plain, again` is a second plain step a round: how far its ratio is from 1 is the error of the method.

Memory is the most that one step holds: the tensors the trainer keeps (weights, gradients, optimiser, average) and the
growth over the step, which on a CPU is the sum of the allocator's records and on a GPU max_memory_allocated.

    python -m benchmarks.step_cost
    python -m benchmarks.step_cost --tasks scd --backbones equiformer_v2 --layers 12
    python -m benchmarks.step_cost --device cuda --amp --channels 128 --lmax 6 --structures 8
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.command_line import parser_of
from benchmarks.common import BACKBONES, DENOISING, PLAIN, SCALAR_BACKBONES, hydra, make_trainer, training, use_threads
from benchmarks.intervals import median_interval

DENS = {"std": 0.1, "corrupt_ratio": 0.5, "coefficient": 10.0}
TASKS = ("dens", "scd", "noisy_nodes")
_CHECKPOINTED = "SCD, auxiliary, activation_checkpoint"
_RECOMPUTED = "SCD, auxiliary, recompute_clean_pass"
# Most that the design allows, against the plain step: by row, then by number of EquiformerV2 blocks.
REACH = {
    "DeNS, mean at p = 0.5": {12: 1.05, 4: 1.10},
    "DeNS, ordinary step": {12: 1.01, 4: 1.01},
    "SCD, auxiliary": {12: 2.10},
    _RECOMPUTED: {12: 2.45},
    "SCD, pre-training": {12: 2.00},
}
REACH_MEMORY = {_CHECKPOINTED: {12: 1.00}, _RECOMPUTED: {12: 1.05}}


@dataclass
class Variant:
    """One kind of step.

    Attributes:
        trainer: a host trainer or ours; several variants may share one.
        prepare: called with the batch before the step, inside the measured time; returns the batch.
        select: called before the step, outside the measured time.
        seconds: one entry a round.
    """

    name: str
    trainer: Any
    prepare: Callable[[Any], Any] = lambda batch: batch
    select: Callable[[], None] = lambda: None
    seconds: list[float] = field(default_factory=list)
    memory: float = math.nan


def main(arguments: list[str] | None = None) -> list[str]:
    """Measure and print; returns the printed lines."""
    options = _parse(arguments)
    use_threads(options.threads)
    logging.getLogger().setLevel(logging.ERROR)
    lines = [_where(options), *_HEAD]
    print(*lines, sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for backbone in options.backbones:
            for layers in options.layers:
                variants, batch, about = _build(backbone, layers, folder, options)
                measure(variants, batch, options.rounds, options.warmup, options.clock, options.seed)
                if options.memory:
                    note_memory(variants, batch, settle=not options.quick)
                rows = _rows(backbone, layers, about, variants)
                print(*rows, sep="\n", flush=True)
                lines += rows
    return lines


# --- the variants -------------------------------------------------------------------------------------------------


def _build(backbone: str, layers: int, folder: str, options: argparse.Namespace) -> tuple[list[Variant], Any, str]:
    """The variants of one backbone, the batch, and a word on it."""
    model = hydra(
        backbone,
        layers=layers,
        channels=options.channels,
        lmax=options.lmax,
        radius=options.radius,
        neighbors=options.neighbors,
    )
    dataset = {
        "train": {
            "format": "emt_slabs",
            "src": f"{folder}/slabs",
            "num_structures": 4 * options.structures,
            "key_mapping": {"y": "energy", "force": "forces"},
            "transforms": {
                "normalizer": {"energy": {"mean": 5.5, "stdev": 2.5}, "forces": {"mean": 0.0, "stdev": 1.5}}
            },
        }
    }
    optim = training(epochs=100, batch_size=options.structures, lr=1e-5, ema=0.999)

    def trainer(name: str, model: dict[str, Any] = model, optim: dict[str, Any] = optim, **more: Any) -> Any:
        return make_trainer(
            name, model, dataset, optim, seed=options.seed, device=options.device, amp=options.amp, **more
        )

    plain = trainer(PLAIN)
    variants = [Variant("plain", plain), Variant("plain, again", plain)]
    if "dens" in options.tasks and backbone not in SCALAR_BACKBONES:
        variants += _dens(backbone, model, optim, trainer)
    if "scd" in options.tasks:
        variants += _scd(backbone, model, trainer)
    if "noisy_nodes" in options.tasks:
        noisy = trainer(DENOISING, denoising={"noisy_nodes": {}})
        variants.append(Variant("noisy nodes", noisy, select=next_step(noisy, drawn=True)))
    batch = next(iter(plain.train_loader))
    with torch.no_grad():
        graph = plain.model.backbone.generate_graph(batch.clone().to(plain.device))
    edges = graph["edge_index"] if isinstance(graph, dict) else graph.edge_index
    about = f"{int(batch.natoms.sum())} atoms, {edges.shape[1]} edges"
    return variants, batch, about


def _dens(
    backbone: str, model: dict[str, Any], optim: dict[str, Any], trainer: Callable[..., Any]
) -> Iterator[Variant]:
    denoising = trainer(DENOISING, denoising={"dens": {"prob": 0.5, **DENS}})
    yield Variant("DeNS, ordinary step", denoising, select=next_step(denoising, drawn=False))
    yield Variant("DeNS, denoising step", denoising, select=next_step(denoising, drawn=True))
    if backbone == "equiformer_v2":
        own = trainer("equiformerv2_dens", *host_dens(model, optim))
        yield Variant("host's own DeNS, ordinary step", own)
        yield Variant("host's own DeNS, denoising step", own, prepare=host_corruption)


def host_dens(model: dict[str, Any], optim: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `model:` and `optim:` blocks of the host's own DeNS, for those of a plain EquiformerV2."""
    own_model = {
        **model,
        "backbone": {**model["backbone"], "model": "equiformer_v2_dens_backbone"},
        "heads": {"energy": {"module": "eqV2_DeNS_scalar_head"}, "forces": {"module": "eqV2_DeNS_vector_head"}},
    }
    own_optim = {
        **optim,
        "use_denoising_pos": True,
        "denoising_pos_params": {
            "prob": 0.5,
            "fixed_noise_std": True,
            "std": DENS["std"],
            "corrupt_ratio": DENS["corrupt_ratio"],
        },
        "denoising_pos_coefficient": DENS["coefficient"],
    }
    return own_model, own_optim


def _scd(backbone: str, model: dict[str, Any], trainer: Callable[..., Any]) -> Iterator[Variant]:
    def variant(name: str, model: dict[str, Any] = model, supervised: bool = True, **settings: Any) -> Variant:
        made = trainer(DENOISING, model, denoising={"scd": {"prob": 1.0, **settings}}, supervised=supervised)
        return Variant(name, made, select=next_step(made, drawn=True))

    yield variant("SCD, auxiliary")
    yield variant(_RECOMPUTED, recompute_clean_pass=True)
    yield variant("SCD, pre-training", supervised=False)
    yield variant("SCD, pre-training, stop_gradient_condition", supervised=False, stop_gradient_condition=True)
    if backbone == "equiformer_v2":
        checkpointed = {**model, "backbone": {**model["backbone"], "activation_checkpoint": True}}
        yield variant(_CHECKPOINTED, checkpointed)


def next_step(trainer: Any, drawn: bool) -> Callable[[], None]:
    """Move the trainer to its next step whose draw is, or is not, a denoising task."""

    def move() -> None:
        trainer.step += 1
        while (trainer.draw_task(trainer.step) is not None) != drawn:
            trainer.step += 1

    return move


def host_corruption(batch: Any) -> Any:
    # The host's loop does this before the forward, with the settings of DENS.
    from fairchem.core.models.equiformer_v2.trainers.dens_trainer import add_gaussian_noise_to_position

    return add_gaussian_noise_to_position(batch, std=DENS["std"], corrupt_ratio=DENS["corrupt_ratio"])


# --- measuring ----------------------------------------------------------------------------------------------------


def measure(variants: list[Variant], batch: Any, rounds: int, warmup: int, clock: str, seed: int) -> None:
    """Time all variants, a step of each a round."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    order = random.Random(seed)
    for number in range(warmup + rounds):
        for variant in order.sample(variants, len(variants)):
            seconds = _timed(variant, batch, now)
            if number >= warmup:
                variant.seconds.append(seconds)


def note_memory(variants: list[Variant], batch: Any, settle: bool = True) -> None:
    """Note the memory of a step of each variant.

    Args:
        settle: measure each trainer's first step twice. The CPU's record knows the sizes of those blocks alone that it
            saw allocated, so what earlier steps left behind blurs a first measurement by some percent.
    """
    known: list[Any] = []
    for variant in variants:
        if settle and not any(trainer is variant.trainer for trainer in known):
            known.append(variant.trainer)
            memory_of(variant, batch)
        variant.memory = memory_of(variant, batch)


def _timed(variant: Variant, batch: Any, now: Callable[[], float]) -> float:
    variant.select()
    fresh = _fresh(variant, batch)
    _wait(variant.trainer.device)
    start = now()
    step(variant.trainer, variant.prepare(fresh))
    _wait(variant.trainer.device)
    return now() - start


def step(trainer: Any, batch: Any) -> None:
    """What the host's training loop does with a batch, but for the schedule and the log."""
    trainer.model.train()
    with torch.autocast("cuda", enabled=trainer.scaler is not None):
        out = trainer._forward(batch)
        loss = trainer._compute_loss(out, batch)
    metrics = trainer._compute_metrics(out, batch, trainer.evaluator, {})
    trainer.evaluator.update("loss", loss.item(), metrics)
    trainer._backward(trainer.scaler.scale(loss) if trainer.scaler else loss)


def _fresh(variant: Variant, batch: Any) -> Any:
    copy = batch.clone()
    return copy.pin_memory() if variant.trainer.device.type == "cuda" else copy


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_of(variant: Variant, batch: Any) -> float:
    """Most bytes one step holds: what the trainer keeps between steps, and the growth over a step."""
    trainer = variant.trainer
    variant.select()
    fresh = _fresh(variant, batch)
    # The step itself makes the gradients.
    trainer.optimizer.zero_grad()
    kept = _bytes(_tensors(trainer))
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(trainer, variant.prepare(fresh))
        torch.cuda.synchronize()
        return kept + torch.cuda.max_memory_allocated() - before
    return kept + _recorded_peak(variant, fresh)


def _recorded_peak(variant: Variant, batch: Any) -> int:
    """Most bytes a step adds at any time, from the CPU allocator's records."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step(variant.trainer, variant.prepare(batch))
    records = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for record in sorted(records, key=lambda e: e.start_ns()):
        held += record.nbytes()
        peak = max(peak, held)
    return peak


def _tensors(trainer: Any) -> Iterable[Tensor]:
    model: nn.Module = trainer.model
    yield from model.parameters()
    yield from model.buffers()
    for state in trainer.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
    if trainer.ema:
        yield from trainer.ema.shadow_params


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


# --- the table ----------------------------------------------------------------------------------------------------

_HEAD = (
    "",
    "| backbone | blocks | batch | step | ms | time ratio | 95% interval | memory, MB | memory ratio | wanted |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


def _rows(backbone: str, layers: int, about: str, variants: list[Variant]) -> list[str]:
    by_name = {variant.name: variant for variant in variants}
    plain = by_name["plain"]
    times = {variant.name: variant.seconds for variant in variants}
    memory = {variant.name: variant.memory for variant in variants}
    for label in ("DeNS", "host's own DeNS"):
        kinds = [f"{label}, ordinary step", f"{label}, denoising step"]
        if all(kind in by_name for kind in kinds):
            mean = f"{label}, mean at p = 0.5"
            times[mean] = [sum(pair) / 2 for pair in zip(*(times[kind] for kind in kinds), strict=True)]
            memory[mean] = max(memory[kind] for kind in kinds)
    rows = []
    for name, seconds in times.items():
        ratios = [mine / base for mine, base in zip(seconds, plain.seconds, strict=True)]
        ratio = statistics.median(ratios)
        low, high = median_interval(ratios)
        held = memory[name] / plain.memory
        known = not math.isnan(held)
        reach = []
        if backbone == "equiformer_v2" and layers in REACH.get(name, {}):
            limit = REACH[name][layers]
            doubt = ", but the interval spans it" if low <= limit <= high else ""
            reach.append(f"time ≤ {limit:.2f}: {'yes' if ratio <= limit else 'no'}{doubt}")
        if known and backbone == "equiformer_v2" and layers in REACH_MEMORY.get(name, {}):
            limit = REACH_MEMORY[name][layers]
            reach.append(f"memory ≤ {limit:.2f}: {'yes' if held <= limit else 'no'}")
        interval = "" if name == "plain" else f"{low:.3f} – {high:.3f}"
        rows.append(
            f"| {backbone} | {layers} | {about} | {name} | {1000 * statistics.median(seconds):.1f} | {ratio:.3f} | "
            f"{interval} | {f'{memory[name] / 1e6:.1f} | {held:.3f}' if known else ' | '} | {'; '.join(reach)} |"
        )
    return rows


def _where(options: argparse.Namespace) -> str:
    if options.device == "cuda":
        device = f"{torch.cuda.get_device_name()}{', AMP' if options.amp else ''}"
    else:
        device = f"CPU, {torch.get_num_threads()} threads"
    return (
        f"{device}; torch {torch.__version__}; {options.channels} channels, lmax {options.lmax}, at most "
        f"{options.neighbors} neighbours; {options.rounds} rounds, {options.clock} time."
    )


# --- the command line ---------------------------------------------------------------------------------------------


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of("benchmarks.step_cost", __doc__)
    add = parser.add_argument
    add("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES[:2]), help="default: the first two")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS[:2]), help="default: the first two")
    add("--layers", nargs="+", type=int, default=[4, 12], metavar="N", help="blocks of the backbone (default: 4 12)")
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
        help="wall time, or CPU time of all threads: steadier on a busy machine, useless on a GPU (default: wall)",
    )
    add(
        "--no-memory",
        dest="memory",
        action="store_false",
        help="leave out memory, which on a CPU takes minutes to measure",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--amp", action="store_true", help="the host's mixed precision (cuda only)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: OMP_NUM_THREADS, else all cores)")
    add("--seed", type=int, default=0, help="of weights, batch, noise and order (default: %(default)s)")
    add(
        "--quick",
        action="store_true",
        help="a smoke test: 1 block, 8 channels, lmax 1, 3 rounds, small batch",
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.layers, options.channels, options.lmax = [1], 8, 1
        options.structures, options.rounds, options.warmup = 2, 3, 1
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if options.device == "cuda" and options.clock == "cpu":
        parser.error("--clock cpu does not see what a GPU does; use wall")
    if options.amp and options.device == "cpu":
        parser.error("--amp: the host's mixed precision exists on CUDA only")
    if min(options.rounds, options.structures, *options.layers) < 1 or options.warmup < 0:
        parser.error("--rounds, --structures and --layers must be at least 1, --warmup at least 0")
    return options


if __name__ == "__main__":
    main()
