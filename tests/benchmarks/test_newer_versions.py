"""With newer PyTorch, NumPy and SciPy fairchem-core 1.10 finds what it asks for, and what was patched is said."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
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


@pytest.mark.skipif(not hasattr(scipy.special, "sph_harm_y"), reason="this SciPy has the former function alone")
def test_spherical_harmonics_that_scipy_took_away_are_there_again(monkeypatch):
    polar, azimuth = np.linspace(0.1, 3.0, 7), np.linspace(0.2, 6.0, 7)
    monkeypatch.setattr(scipy.special, "sph_harm", None, raising=False)
    monkeypatch.delattr(scipy.special, "sph_harm")
    assert any("sph_harm" in what for what in newer_versions.patch())
    # Y_2^1, written out.
    expected = -np.sqrt(15 / (8 * np.pi)) * np.sin(polar) * np.cos(polar) * np.exp(1j * azimuth)
    np.testing.assert_allclose(scipy.special.sph_harm(1, 2, azimuth, polar), expected, atol=1e-12)


def test_files_with_objects_load_under_a_torch_that_refuses_them_by_default(monkeypatch, tmp_path):
    torch.save({"range": range(3)}, tmp_path / "objects.pt")
    load = torch.load

    def refusing(file, weights_only=True, **more):
        return load(file, weights_only=weights_only, **more)

    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    monkeypatch.setattr(torch, "load", refusing)
    assert any(what.startswith("torch.load") for what in newer_versions.patch())
    assert torch.load(tmp_path / "objects.pt") == {"range": range(3)}
