"""What a training step sends between ranks, counted: the tables of docs/scaling.md.

Sizes: the models of published configs are built, and what DistributedDataParallel holds of them is summed. It
all-reduces a gradient of 4 bytes for every trainable parameter, also in mixed precision, and broadcasts every buffer of
the model before each forward.

Calls: two gloo ranks take a step of each kind with a small model, each fetching its batch as a run does, and every
collective call is noted. The kinds of calls do not depend on the size of the model, nor on the number of ranks.

    python -m benchmarks.communication
    python -m benchmarks.communication --configs dens_oc22 dens_escn_oc20_2m
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from fairchem.core.common.utils import load_config
from torch import Tensor, nn

from benchmarks.common import DENOISING, PLAIN, hydra, make_trainer, training, use_threads
from benchmarks.step_cost import step
from fairchem_scd.fairchem1.hydra import DenoisingHydra, freeze
from fairchem_scd.testing import on_ranks

CONFIGS = Path(__file__).parent.parent / "configs"
PUBLISHED = ("dens_oc20_2m_12epochs", "dens_oc20_all_md")
# Kinds of steps: the `task.denoising` block, None for the host's trainer, and whether energies and forces train.
STEPS: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "plain": (None, True),
    "DeNS, ordinary step": ({"dens": {"prob": 0.0}}, True),
    "DeNS, denoising step": ({"dens": {"prob": 1.0}}, True),
    "noisy nodes": ({"noisy_nodes": {}}, True),
    "SCD beside energy and forces": ({"scd": {}}, True),
    "SCD, pre-training": ({"scd": {}}, False),
    "SCD, pre-training, running scale": ({"scd": {"noise_scale": "running"}}, False),
}
_KINDS = COUNT, SCALE, SIZES, GRADIENTS, BUFFERS = "count", "scale", "sizes", "gradients", "buffers"
Calls = list[tuple[str, int]]
"""(what, bytes a rank puts in), in the order of a step."""


def main(arguments: list[str] | None = None) -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.communication",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--configs", nargs="+", default=PUBLISHED, metavar="NAME", help="in configs/, without .yml")
    options = parser.parse_args(arguments)
    use_threads(1)
    logging.getLogger().setLevel(logging.ERROR)
    columns = [column for name in options.configs for column in (name, "gradient, MB", "buffers, MB")]
    print("", _head(["", *columns]), sep="\n")
    print(*size_rows([sizes(name) for name in options.configs]), sep="\n")
    print("", _head(["step", *_KINDS]), sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        print(*call_rows(calls_of_steps(Path(folder))), sep="\n")


def _head(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |\n|{'---|' * len(cells)}"


# --- sizes --------------------------------------------------------------------------------------------------------


def sizes(name: str) -> dict[str, tuple[int, int]]:
    """(trainable parameters, bytes of buffers) of the model of a config: plain, and with each task."""
    model_block = dict(load_config(CONFIGS / f"{name}.yml")[0]["model"])
    model_block.pop("name")
    model = DenoisingHydra(**model_block, denoising={"dens": {}, "scd": {}})
    plain, tasks = [model.backbone, model.output_heads], model.denoising
    held = {
        "plain": _held(plain),
        "DeNS": _held([*plain, tasks["dens"]]),
        "SCD": _held([*plain, tasks["scd"]]),
        "DeNS and SCD in turns": _held([*plain, *tasks.values()]),
    }
    freeze(model)
    return {**held, "SCD, pre-training": _held([model.backbone, tasks["scd"]])}


def _held(modules: list[nn.Module]) -> tuple[int, int]:
    whole = nn.ModuleList(modules)  # counts once what modules share
    return sum(p.numel() for p in whole.parameters() if p.requires_grad), sum(map(_bytes, whole.buffers()))


def size_rows(models: list[dict[str, tuple[int, int]]]) -> list[str]:
    """Rows of a table, three columns a model."""
    rows = []
    for what in models[0]:
        held = [model[what] for model in models]
        cells = [f"{parameters:,} | {4e-6 * parameters:.1f} | {1e-6 * buffers:.2f}" for parameters, buffers in held]
        rows.append(f"| {what} | {' | '.join(cells)} |")
    return rows


# --- calls --------------------------------------------------------------------------------------------------------


def calls_of_steps(folder: Path) -> dict[str, Calls]:
    """The collective calls of a step of each kind, as the first of two ranks makes them.

    Args:
        folder: for sample data.

    Raises:
        AssertionError: the second rank makes others.
    """
    first, second = on_ranks(2, folder, lambda _: _calls_of_kinds(folder))
    assert first == second, "ranks that make different calls"
    return first


def call_rows(calls: Mapping[str, Calls]) -> list[str]:
    """Rows of a table: how often each kind of call is made; gradients once, however many buckets they take."""
    rows = []
    for name, made in calls.items():
        kinds = [kind for kind, _ in made if kind != GRADIENTS] + [GRADIENTS]
        rows.append(f"| {name} | {' | '.join(str(kinds.count(kind)) for kind in _KINDS)} |")
    return rows


def _calls_of_kinds(folder: Path) -> dict[str, Calls]:
    logging.getLogger().setLevel(logging.ERROR)
    return {name: _calls_of_step(folder, *kind) for name, kind in STEPS.items()}


def _calls_of_step(folder: Path, denoising: dict[str, Any] | None, supervised: bool) -> Calls:
    dataset = {
        "train": {
            "format": "emt_slabs",
            "src": str(folder / "slabs"),
            "num_structures": 16,
            "key_mapping": {"y": "energy", "force": "forces"},
        }
    }
    trainer = make_trainer(
        DENOISING if denoising else PLAIN,
        hydra("equiformer_v2", layers=2, channels=8, lmax=2, radius=4.0, neighbors=20),
        dataset,
        {**training(epochs=1, batch_size=4, lr=1e-5, ema=0.999), "load_balancing": "atoms"},
        seed=0,
        denoising=denoising,
        supervised=supervised,
    )
    made: Calls = []
    trainer.model.register_comm_hook(made, _note_gradients)
    batches = iter(trainer.train_loader)
    with _noted(made):
        for number in (1, 2):  # after the first, DDP lays out its buckets anew
            made.clear()
            trainer.step = number
            step(trainer, next(batches))
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert sum(size for kind, size in made if kind == GRADIENTS) == 4 * trained, "a gradient sent twice, or not at all"
    return made


def _note_gradients(made, bucket):  # annotations as text, as in this file, are an error to DDP
    """What DDP does with a bucket of gradients by itself, noted."""
    made.append((GRADIENTS, _bytes(bucket.buffer())))
    mean = bucket.buffer().div_(dist.get_world_size())
    return dist.group.WORLD.allreduce([mean]).get_future().then(lambda done: done.value()[0])


@contextmanager
def _noted(made: Calls) -> Iterator[None]:
    """While entered, note every call that is made from Python."""

    def noting(function: Any, what: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            made.append(what(*args))
            return function(*args, **kwargs)

        return mock.patch.object(dist, function.__name__, call)

    def reduced(tensor: Tensor, *_: Any) -> tuple[str, int]:
        return (COUNT if tensor.numel() == 1 and not tensor.is_floating_point() else SCALE), _bytes(tensor)

    with (
        noting(dist.all_reduce, reduced),
        noting(dist.all_gather, lambda received, sent, *_: (SIZES, _bytes(sent))),
        noting(dist.broadcast, lambda sent, *_: ("broadcast", _bytes(sent))),
        noting(dist._broadcast_coalesced, lambda group, sent, *_: (BUFFERS, sum(map(_bytes, sent)))),
    ):
        yield


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


if __name__ == "__main__":
    main()
