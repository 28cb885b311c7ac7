"""Newer versions of PyTorch and NumPy: what fairchem-core 1.10 asks for is there, and what was patched is said."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks import newer_versions


def test_names_that_numpy_2_took_away_are_there_again(monkeypatch):
    for former in ("float_", "Inf"):
        monkeypatch.setattr(np, former, None, raising=False)  # restored afterwards, whatever NumPy it is
        monkeypatch.delattr(np, former)
    assert "numpy.float_ and numpy.Inf, gone since NumPy 2" in newer_versions.patch()
    assert np.__dict__["float_"] is np.float64
    assert np.__dict__["Inf"] == np.inf
    assert not any("numpy" in what for what in newer_versions.patch())


def test_files_with_objects_load_under_a_torch_that_refuses_them_by_default(monkeypatch, tmp_path):
    torch.save({"range": range(3)}, tmp_path / "objects.pt")
    load = torch.load

    def refusing(file, weights_only=True, **more):
        return load(file, weights_only=weights_only, **more)

    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    monkeypatch.setattr(torch, "load", refusing)
    assert any(what.startswith("torch.load") for what in newer_versions.patch())
    assert torch.load(tmp_path / "objects.pt") == {"range": range(3)}
