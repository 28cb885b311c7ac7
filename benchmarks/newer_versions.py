"""What fairchem-core 1.10 needs to run with newer versions of PyTorch, NumPy and SciPy than it was made for.

Only benchmarks use this: a GPU machine may bring its own PyTorch. For training, install the versions that the package
pins.
"""

from __future__ import annotations

import functools

import numpy as np
import scipy.special
import torch


def patch() -> list[str]:
    """Patch PyTorch, NumPy and SciPy in this process where the host needs it. Call it before the host is imported.

    Returns:
        What was patched, a line each; nothing where the versions are those that the package pins.
    """
    patched = []
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6):
        # The host reads its own tables of rotations, and its checkpoints, by the former default.
        torch.load = _with_pickles(torch.load)
        patched.append("torch.load: weights_only is False by default, as before 2.6")
    if not hasattr(np, "float_"):
        for former, value in {"float_": np.float64, "Inf": np.inf}.items():
            setattr(np, former, value)  # not as np.float_ = …, which ruff would mend to np.float64
        patched.append("numpy.float_ and numpy.Inf, gone since NumPy 2")
    if not hasattr(scipy.special, "sph_harm"):
        scipy.special.sph_harm = _sph_harm
        patched.append("scipy.special.sph_harm, gone since SciPy 1.17")
    return patched


def _sph_harm(m, n, azimuth, polar):
    return scipy.special.sph_harm_y(n, m, polar, azimuth)


def _with_pickles(load):
    @functools.wraps(load)
    def load_with_pickles(*args, **kwargs):
        kwargs.setdefault("weights_only", False)
        return load(*args, **kwargs)

    return load_with_pickles
