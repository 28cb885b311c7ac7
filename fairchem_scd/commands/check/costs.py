"""What steps of each kind cost, in words."""

from __future__ import annotations

import resource
from collections.abc import Mapping

from fairchem_scd.commands.check.report import Report


def say_costs(
    times: Mapping[str, float],
    memory: Mapping[str, int],
    shares: Mapping[str, float],
    *,
    batch: int,
    rounds: int,
    steps_per_epoch: int,
    device: str,
    report: Report,
) -> None:
    """Report time and memory.

    Args:
        times: seconds of a step by its kind; "ordinary" where there are steps without a task.
        memory: peak bytes on the device by kind.
        shares: of the steps, by denoising task.
        batch: structures in the batch that was timed.
        rounds: how often each kind was timed.
        steps_per_epoch: of one rank.
        device: its type.
        report: gets the lines.
    """
    plain = times.get("ordinary")
    costs = [
        f"{name} {seconds:.3g} s" + (f" ({seconds / plain:.2f} x)" if plain and name != "ordinary" else "")
        for name, seconds in times.items()
    ]
    report.say("a step", f"{', '.join(costs)}; batch of {batch}; roughly, in {rounds} rounds")
    mean = sum(share * times[name] for name, share in shares.items())
    mean += max(0.0, 1 - sum(shares.values())) * (plain or 0.0)
    if plain:
        report.say(
            "", f"on average over the run {mean / plain:.2f} x an ordinary step, which costs what plain training does"
        )
    report.say(
        "an epoch",
        f"{steps_per_epoch} step{'s' * (steps_per_epoch != 1)}, {_duration(steps_per_epoch * mean)} on {device} with "
        "one rank, without reading data and validation",
    )
    if device == "cuda":
        report.say("memory", ", ".join(f"{name} {peak / 2**30:.2f} GiB" for name, peak in memory.items()) + " at most")
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        report.say("memory", f"the process, 1 rank, held at most {peak:.2f} GiB")


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"about {seconds / length:.1f} {unit}"
    return f"about {seconds:.2g} seconds"
