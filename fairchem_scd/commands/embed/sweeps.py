"""The sweeps over data in which `embed --judge` judges a condition, on both hosts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tqdm import tqdm

from fairchem_scd.denoising.condition_judge import ConditionJudge
from fairchem_scd.denoising.condition_report import ConditionReport
from fairchem_scd.errors import ConfigError


def judged(
    judge: ConditionJudge,
    batches: Callable[[], Iterable[Sequence[Any]]],
    run: Callable[[Callable[[Any], None], Sequence[Any], int], None],
    *,
    size: int,
    progress: bool,
) -> ConditionReport:
    """What a judge finds on rows of data, which are read twice.

    Args:
        judge: fresh.
        batches: begins to read the rows, so many at a time.
        run: gets a sweep of the judge, rows, and the number of the first; it makes a batch of them for the sweep.
        size: how many rows there are.
        progress: show a progress bar on stderr.

    Raises:
        ConfigError: there are no two structures that can be told from each other.
    """

    def sweep(what: str, of: Callable[[Any], None]) -> None:
        first = 0  # not the bar's own count, which stands still where it is not shown
        with tqdm(total=size, desc=what, unit=" structures", disable=not progress) as bar:
            for rows in batches():
                run(of, rows, first)
                first += len(rows)
                bar.update(len(rows))

    sweep("told the right embedding", judge.first)
    judge.pair()
    sweep("told others, and none", judge.second)
    report = judge.report()
    if report is None:
        raise ConfigError(
            "--judge: the data has no two different structures with noise and an embedding; judge on more of it, or on "
            "another --split"
        )
    return report
