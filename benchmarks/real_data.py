"""DeNS and SCD against the host's plain training on DFT data: equal models, batches, supervised steps and seeds.

Four kinds of training, all scored on energies and forces of the test file:

- plain: the host's trainer, from random weights;
- dens: DeNS beside the labels;
- scd: SCD beside the labels, at every step;
- pretrain: SCD on the structures of the training file, whose labels are not read, then the plain training from the
  pre-trained backbone (the host's `finetune_config`) with fresh heads.

The data are ASE databases with energies and forces, `mlearn_<element>_train.db` and `mlearn_<element>_test.db` (the
mlearn benchmark of Zuo et al. 2020; another name by --pattern). Every run ends with one line in the results file, and a
run that is in there is not run again, so an interrupted call goes on where it stopped:

    python -m benchmarks.real_data --data FOLDER --results results.jsonl
    python -m benchmarks.real_data --data FOLDER --results results.jsonl --methods plain pretrain
    python -m benchmarks.real_data --results results.jsonl --table
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import BACKBONES, DENOISING, PLAIN, existing_folder, hydra, make_trainer, training, use_threads
from fairchem_scd.denoising.plan import VALIDATION
from fairchem_scd.denoising.structures import structures_of

METHODS = ("plain", "dens", "scd", "pretrain")


@dataclass(frozen=True)
class Pretraining:
    """Settings of `task.denoising.scd`, and the training by it."""

    scd: dict[str, float]
    epochs: int
    batch_size: int
    lr: float
    ema: float | None
    weight_decay: float
    clip: float


@dataclass(frozen=True)
class Run:
    """All that decides a run's result.

    Attributes:
        dens, scd: settings of the task beside the labels; both None: the plain host trainer.
        pretraining: SCD's settings and training before that; None: random weights.
    """

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
    scd: dict[str, float] | None = None
    pretraining: Pretraining | None = None

    @classmethod
    def of(cls, record: dict[str, Any]) -> Run:
        """The run of a line of the results file."""
        run = cls(**record["run"])
        return replace(run, pretraining=Pretraining(**run.pretraining)) if run.pretraining else run

    @property
    def baseline(self) -> Run:
        """The plain run to compare with."""
        return replace(self, dens=None, scd=None, pretraining=None)


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    if options.table:
        print(table(_read(options.results)))
        return
    use_threads(options.threads)
    logging.getLogger().setLevel(logging.ERROR)
    runs = list(_runs(options))
    for number, run in enumerate(runs, 1):
        if any(Run.of(record) == run for record in _read(options.results)):
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
    """Train and score one run; scores in eV per atom and eV/Å, those of pre-training in Å."""

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
    denoising = {name: getattr(run, name) for name in ("dens", "scd") if getattr(run, name)}
    scores: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if run.pretraining:
            checkpoint, scores["pretraining"] = pretrain(run, model, source, Path(folder))
            del model["backbone"]
            model["finetune_config"] = {"starting_checkpoint": checkpoint}
        trainer = make_trainer(
            DENOISING if denoising else PLAIN, model, dataset, optim, seed=run.seed, denoising=denoising
        )
    trainer.train(disable_eval_tqdm=True)
    if trainer.ema:
        trainer.ema.store()
        trainer.ema.copy_to()
    scores["steps"] = trainer.step
    scores["parameters"] = sum(p.numel() for p in trainer.model.parameters())
    for split, rows in (("test", trainer.val_dataset), ("train", trainer.train_dataset)):
        scores[split], scores[f"zero_{split}"] = score(trainer, rows)
    return scores


def pretrain(
    run: Run, model: dict[str, Any], source: Callable[[str], str], folder: Path
) -> tuple[str, dict[str, float]]:
    """Pre-train on structures alone; returns a checkpoint of the averaged weights, and errors on the test file."""
    how = run.pretraining
    unlabelled = {"a2g_args": {"r_energy": False, "r_forces": False}}
    start = time.monotonic()
    trainer = make_trainer(
        DENOISING,
        model,
        {
            "train": {"format": "ase_db", "src": source("train"), **unlabelled},
            "val": {"src": source("test"), **unlabelled},
        },
        training(
            epochs=how.epochs,
            batch_size=how.batch_size,
            lr=how.lr,
            ema=how.ema,
            weight_decay=how.weight_decay,
            clip=how.clip,
        ),
        seed=run.seed,
        denoising={"scd": how.scd},
        supervised=False,
        folder=folder,
    )
    batch = next(iter(trainer.train_loader))
    assert not {"energy", "forces"} & set(batch.keys()), "labels were read in pre-training"
    trainer.train(disable_eval_tqdm=True)
    errors = {
        "steps": trainer.step,
        "seconds": round(time.monotonic() - start, 1),
        "denoising_mae": trainer.validate("val", disable_tqdm=True)["denoising_pos_mae"]["metric"],
        "zero_denoising_mae": _size_of_noise(trainer),
    }
    return trainer.save(checkpoint_file="pretrained.pt", training_state=False), errors


def _size_of_noise(trainer: Any) -> float:
    """Mean absolute component of the validation noise, Å: the error of predicting zero."""
    noise = []
    for batch in trainer.val_loader:
        corruption = trainer.tasks["scd"].corrupt(structures_of(batch), seed=0, step=VALIDATION)
        noise.append(corruption.noise[corruption.mask])
    return torch.cat(noise).abs().mean().item()


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
    """Markdown tables: mean ± standard deviation over seeds, and the paired differences to the plain runs."""
    groups: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    runs: dict[str, Run] = {}
    for record in records:
        run = Run.of(record)
        key = json.dumps(asdict(replace(run, seed=0)), sort_keys=True)
        runs[key] = run
        groups[key][run.seed] = record["scores"]
    order = sorted(
        runs, key=lambda k: (runs[k].element, runs[k].backbone, runs[k].epochs, METHODS.index(_kind(runs[k])), k)
    )
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
        plain = groups.get(json.dumps(asdict(replace(run.baseline, seed=0)), sort_keys=True), {})
        shared = sorted(seeds.keys() & plain.keys())
        if _kind(run) != "plain" and shared:
            cells = [_spread([seeds[i][a][b] - plain[i][a][b] for i in shared], sign="+") for a, b in _COLUMNS]
            row(run, "… minus plain, by seed", len(shared), cells)
    pretrained = [key for key in order if runs[key].pretraining]
    if pretrained:
        lines += [
            "",
            "| data | backbone | pre-training | seeds | denoising MAE on the test file, mÅ | of predicting zero |",
            "|---|---|---|---|---|---|",
        ]
    for key in pretrained:
        run, scores = runs[key], [s["pretraining"] for s in groups[key].values()]
        cells = [_spread([s[name] for s in scores]) for name in ("denoising_mae", "zero_denoising_mae")]
        lines.append("| " + " | ".join([run.element, run.backbone, _method(run), str(len(scores)), *cells]) + " |")
    return "\n".join(lines)


def _spread(values: list[float], sign: str = "") -> str:
    values = [1000 * v for v in values]
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1f}{deviation}"


def _kind(run: Run) -> str:
    return "pretrain" if run.pretraining else "scd" if run.scd else "dens" if run.dens else "plain"


def _method(run: Run) -> str:
    def listed(settings: dict[str, float]) -> str:
        return ", ".join(f"{key} {value:g}" for key, value in settings.items())

    if run.pretraining:
        how = run.pretraining
        return f"SCD, {how.epochs} epochs, lr {how.lr:g}, {listed(how.scd)}; then plain"
    if run.scd:
        return f"SCD beside labels, {listed(run.scd)}"
    return f"DeNS {listed(run.dens)}" if run.dens else "plain"


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
                if "scd" in options.methods:
                    yield replace(plain, scd={"std": options.scd_std, "coefficient": options.scd_coefficient})
                if "pretrain" in options.methods:
                    pretraining = Pretraining(
                        scd={"std": options.scd_std},
                        epochs=options.pretrain_epochs,
                        batch_size=options.batch_size,
                        lr=options.pretrain_lr,
                        ema=options.ema or None,
                        weight_decay=options.pretrain_weight_decay,
                        clip=options.pretrain_clip,
                    )
                    yield replace(plain, pretraining=pretraining)


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
    add("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES[:2]), help="default: the first two")
    add("--elements", nargs="+", default=["Mo", "Li"], metavar="NAME", help="default: Mo Li")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="kinds of training; default: all")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    add("--threads", type=int, metavar="N", help="CPU threads (default: OMP_NUM_THREADS, else all cores)")

    dens = parser.add_argument_group("DeNS", "the settings of task.denoising.dens")
    add = dens.add_argument
    add("--prob", type=float, default=0.5, help="share of the steps that denoise (default: %(default)s)")
    add("--std", nargs="+", type=float, default=[0.1], metavar="σ", help="noise in Å, one run for each (default: 0.1)")
    add("--corrupt-ratio", type=float, default=0.5, help="probability that an atom moves (default: %(default)s)")
    add("--coefficient", type=float, default=10.0, help="weight of the denoising term (default: %(default)s)")

    scd = parser.add_argument_group("SCD", "the settings of task.denoising.scd, and of pre-training by it")
    add = scd.add_argument
    add("--scd-std", type=float, default=0.04, metavar="σ", help="noise in Å (default: %(default)s)")
    add("--scd-coefficient", type=float, default=10.0, help="weight beside labels (default: %(default)s)")
    add("--pretrain-epochs", type=int, default=16, help="passes over the training file (default: %(default)s)")
    add("--pretrain-lr", type=float, default=0.002, help="highest learning rate (default: %(default)s)")
    add("--pretrain-weight-decay", type=float, default=0.05, help="the paper's (default: %(default)s)")
    add("--pretrain-clip", type=float, default=1.0, help="largest gradient norm, the paper's (default: %(default)s)")

    size = parser.add_argument_group("model and training", "alike for all kinds of training")
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
