"""DeNS against the host's plain training on DFT data: equal models, initial weights, batches, steps and seeds.

The data are ASE databases with energies and forces, `mlearn_<element>_train.db` and `mlearn_<element>_test.db` (the
mlearn benchmark of Zuo et al. 2020; another name by --pattern). Every run ends with one line in the results file, and a
run that is in there is not run again, so an interrupted call goes on where it stopped:

    python -m benchmarks.real_data --data FOLDER --results results.jsonl
    python -m benchmarks.real_data --results results.jsonl --table
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import BACKBONES, DENOISING, PLAIN, existing_folder, hydra, make_trainer, training, use_threads


@dataclass(frozen=True)
class Run:
    """All that decides a run's result; `dens` is None for the plain host trainer."""

    backbone: str
    element: str
    seed: int
    layers: int
    channels: int
    lmax: int
    radius: float
    neighbors: int
    epochs: int
    batch_size: int
    lr: float
    ema: float | None
    dens: dict[str, float] | None


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    if options.table:
        print(table(_read(options.results)))
        return
    use_threads(options.threads)
    logging.getLogger().setLevel(logging.ERROR)
    runs = list(_runs(options))
    for number, run in enumerate(runs, 1):
        if any(record["run"] == asdict(run) for record in _read(options.results)):
            continue
        start = time.monotonic()
        scores = train(run, options.data, options.pattern)
        record = {"run": asdict(run), "scores": scores, "seconds": round(time.monotonic() - start, 1)}
        options.results.parent.mkdir(parents=True, exist_ok=True)
        with options.results.open("a") as file:
            file.write(json.dumps(record) + "\n")
        test = scores["test"]
        print(
            f"{number}/{len(runs)} {_name(run)} seed {run.seed}: {1000 * test['energy_mae']:.1f} meV/atom, "
            f"{1000 * test['force_mae']:.1f} meV/Å on the test file, {record['seconds']:.0f} s",
            flush=True,
        )
    print(table(_read(options.results)))


def train(run: Run, data: Path, pattern: str) -> dict[str, Any]:
    """Train and score one run; scores in eV per atom and eV/Å."""

    def source(split: str) -> str:
        return str(data / pattern.format(element=run.element, split=split))

    dataset = {
        "train": {
            "format": "ase_db",
            "src": source("train"),
            "a2g_args": {"r_energy": True, "r_forces": True},
            # Sizes vary: energies relative to the best energy per atom, all fitted by the host to the training file.
            "transforms": {
                "element_references": {"fit": {"targets": ["energy"], "batch_size": 32}},
                "normalizer": {
                    "fit": {"targets": {"energy": {"mean": 0.0}, "forces": {"mean": 0.0}}, "batch_size": 32}
                },
            },
        },
        "val": {"src": source("test")},
    }
    model = hydra(
        run.backbone,
        layers=run.layers,
        channels=run.channels,
        lmax=run.lmax,
        radius=run.radius,
        neighbors=run.neighbors,
        mixed_sizes=True,
    )
    optim = training(epochs=run.epochs, batch_size=run.batch_size, lr=run.lr, ema=run.ema)
    trainer = make_trainer(
        DENOISING if run.dens else PLAIN,
        model,
        dataset,
        optim,
        seed=run.seed,
        denoising={"dens": run.dens} if run.dens else None,
    )
    trainer.train(disable_eval_tqdm=True)
    if trainer.ema:
        trainer.ema.store()
        trainer.ema.copy_to()
    scores: dict[str, Any] = {
        "steps": trainer.step,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
    }
    for split, rows in (("test", trainer.val_dataset), ("train", trainer.train_dataset)):
        scores[split], scores[f"zero_{split}"] = score(trainer, rows)
    return scores


@torch.no_grad()
def score(trainer: Any, rows: Any, batch_size: int = 32) -> tuple[dict[str, float], dict[str, float]]:
    """Errors of the trainer's present weights on a dataset, and those of a model whose outputs are all zero."""
    trainer.model.eval()
    energies, forces, reference = [], [], []
    for start in range(0, len(rows), batch_size):
        batch = trainer.collater([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        out = trainer._forward(batch)
        energy = trainer._denorm_preds("energy", out["energy"], batch).view(-1)
        nothing = trainer._denorm_preds("energy", torch.zeros_like(out["energy"]), batch).view(-1)
        energies.append((energy - batch.energy) / batch.natoms)
        reference.append((nothing - batch.energy) / batch.natoms)
        forces.append(
            torch.stack([trainer._denorm_preds("forces", out["forces"], batch) - batch.forces, -batch.forces])
        )
    ours, zero = torch.cat(forces, dim=1)
    return _errors(torch.cat(energies), ours), _errors(torch.cat(reference), zero)


def _errors(energy: Tensor, forces: Tensor) -> dict[str, float]:
    return {
        "energy_mae": energy.abs().mean().item(),
        "force_mae": forces.abs().mean().item(),
        "force_rmse": forces.square().mean().sqrt().item(),
    }


# --- the table ----------------------------------------------------------------------------------------------------

_COLUMNS = [(split, key) for split in ("test", "train") for key in ("energy_mae", "force_mae", "force_rmse")]
_HEADINGS = ("energy MAE, meV/atom", "force MAE, meV/Å", "force RMSE, meV/Å")


def table(records: list[dict[str, Any]]) -> str:
    """A markdown table: mean ± standard deviation over seeds, and DeNS's paired difference to the plain runs."""
    groups: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    runs: dict[str, Run] = {}
    for record in records:
        run = Run(**record["run"])
        key = json.dumps(asdict(replace(run, seed=0)), sort_keys=True)
        runs[key] = run
        groups[key][run.seed] = record["scores"]
    order = sorted(runs, key=lambda k: (runs[k].element, runs[k].backbone, runs[k].epochs, runs[k].dens is not None, k))
    headings = [f"{split} {heading}" for split in ("test", "train") for heading in _HEADINGS]
    lines = [
        "| " + " | ".join(["data", "backbone", "training", "epochs", "seeds", *headings]) + " |",
        "|" + "---|" * (5 + len(headings)),
    ]

    def row(run: Run, label: str, seeds: int | str, cells: list[str]) -> None:
        lines.append("| " + " | ".join([run.element, run.backbone, label, str(run.epochs), str(seeds), *cells]) + " |")

    zero_shown = set()
    for key in order:
        run, seeds = runs[key], groups[key]
        if run.element not in zero_shown:
            zero_shown.add(run.element)
            scores = next(iter(seeds.values()))
            cells = [f"{1000 * scores[f'zero_{split}'][name]:.1f}" for split, name in _COLUMNS]
            lines.append("| " + " | ".join([run.element, "none", "outputs zero", "", "", *cells]) + " |")
        row(run, _method(run), len(seeds), [_spread([s[a][b] for s in seeds.values()]) for a, b in _COLUMNS])
        plain = groups.get(json.dumps(asdict(replace(run, seed=0, dens=None)), sort_keys=True), {})
        shared = sorted(seeds.keys() & plain.keys())
        if run.dens and shared:
            cells = [_spread([seeds[i][a][b] - plain[i][a][b] for i in shared], sign="+") for a, b in _COLUMNS]
            row(run, "… minus plain, by seed", len(shared), cells)
    return "\n".join(lines)


def _spread(values: list[float], sign: str = "") -> str:
    values = [1000 * v for v in values]
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1f}{deviation}"


def _method(run: Run) -> str:
    if run.dens is None:
        return "plain"
    return "DeNS " + ", ".join(f"{key} {value:g}" for key, value in run.dens.items())


def _name(run: Run) -> str:
    return f"{run.element} {run.backbone} {_method(run)}"


# --- the command line ---------------------------------------------------------------------------------------------


def _runs(options: argparse.Namespace) -> Iterator[Run]:
    # Seeds outermost: a table of what is there so far compares like with like.
    for seed in options.seeds:
        for element in options.elements:
            for backbone in options.backbones:
                plain = Run(
                    backbone=backbone,
                    element=element,
                    seed=seed,
                    layers=options.layers,
                    channels=options.channels,
                    lmax=options.lmax,
                    radius=options.radius,
                    neighbors=options.neighbors,
                    epochs=options.epochs,
                    batch_size=options.batch_size,
                    lr=options.lr,
                    ema=options.ema or None,
                    dens=None,
                )
                if "plain" in options.methods:
                    yield plain
                if "dens" in options.methods:
                    for std in options.std:
                        dens = {
                            "prob": options.prob,
                            "std": std,
                            "corrupt_ratio": options.corrupt_ratio,
                            "coefficient": options.coefficient,
                        }
                        yield replace(plain, dens=dens)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    summary, _, epilog = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_data",
        description=summary,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=existing_folder, metavar="FOLDER", help="folder of the ASE databases")
    add(
        "--pattern",
        default="mlearn_{element}_{split}.db",
        help="names of the databases, with {element} and {split} (train, test) in them (default: %(default)s)",
    )
    add("--results", type=Path, required=True, metavar="FILE", help="JSON lines, one a finished run; appended to")
    add("--table", action="store_true", help="train nothing; print what the results file holds as a markdown table")

    which = parser.add_argument_group("what to run")
    add = which.add_argument
    add("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES), help="default: both")
    add("--elements", nargs="+", default=["Mo", "Li"], metavar="NAME", help="default: Mo Li")
    add("--methods", nargs="+", choices=("plain", "dens"), default=["plain", "dens"], help="default: both")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    add("--threads", type=int, metavar="N", help="CPU threads (default: OMP_NUM_THREADS, else all cores)")

    dens = parser.add_argument_group("DeNS", "the settings of task.denoising.dens")
    add = dens.add_argument
    add("--prob", type=float, default=0.5, help="share of the steps that denoise (default: %(default)s)")
    add("--std", nargs="+", type=float, default=[0.1], metavar="σ", help="noise in Å, one run for each (default: 0.1)")
    add("--corrupt-ratio", type=float, default=0.5, help="probability that an atom moves (default: %(default)s)")
    add("--coefficient", type=float, default=10.0, help="weight of the denoising term (default: %(default)s)")

    size = parser.add_argument_group("model and training", "alike for plain and DeNS runs")
    add = size.add_argument
    add("--layers", type=int, default=2, help="blocks of the backbone (default: %(default)s)")
    add("--channels", type=int, default=16, help="channels (default: %(default)s)")
    add("--lmax", type=int, default=2, help="highest degree (default: %(default)s)")
    add("--radius", type=float, default=4.2, help="cutoff in Å; reaches two shells of bcc Mo and Li (default: 4.2)")
    add("--neighbors", type=int, default=30, help="most neighbours of an atom; 30 cuts none (default: %(default)s)")
    add("--epochs", type=int, default=8, help="passes over the training file (default: %(default)s)")
    add("--batch-size", type=int, default=2, help="structures a step (default: %(default)s)")
    add("--lr", type=float, default=0.002, help="highest learning rate (default: %(default)s)")
    add("--ema", type=float, default=0.99, help="decay of the averaged weights; 0: none (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not options.table and options.data is None:
        parser.error("--data is needed, unless --table")
    return options


if __name__ == "__main__":
    main()
