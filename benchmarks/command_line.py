"""What the benchmarks' commands have in common."""

from __future__ import annotations

import argparse


def parser_of(module: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser without options yet.

    Args:
        module: the command's, such as "benchmarks.step_cost".
        doc: its docstring: the first paragraph is the summary, the rest stands below the options.
    """
    summary, _, epilog = (doc or "").partition("\n\n")
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=summary,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
