"""Benchmarks, run as modules from the top of the repository: `python -m benchmarks.evidence.learning --help`."""
