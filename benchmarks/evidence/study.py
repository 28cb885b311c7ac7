"""What the commands of the studies have in common: their last options, and how their process begins."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common import use_threads


def add_options(parser: argparse.ArgumentParser, *, seeds: Sequence[int], results: Path) -> None:
    """Add the options that all studies have, with these defaults."""
    add, usual = parser.add_argument, " ".join(map(str, seeds))
    add("--seeds", nargs="+", type=int, default=list(seeds), metavar="N", help=f"default: {usual}")
    add("--results", type=Path, default=results, metavar="FILE", help="JSON lines, one a finished run; appended to")
    add("--threads", type=int, metavar="N", help="CPU threads (default: OMP_NUM_THREADS, else all cores)")


def begin(options: argparse.Namespace) -> None:
    """Prepare this process for a study."""
    use_threads(options.threads)
    torch.set_flush_denormal(True)  # radial bases make many numbers too small to count, and slow
    logging.getLogger().setLevel(logging.ERROR)
