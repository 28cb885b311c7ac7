"""The running unit of the noise."""

from __future__ import annotations

import pytest
import torch

from fairchem_scd.denoising.running_scale import RunningScale


def test_running_scale_is_the_root_mean_square_of_all_noise_so_far():
    generator = torch.Generator().manual_seed(0)
    batches = [0.04 * torch.randn(n, 3, generator=generator) for n in (7, 0, 100, 1)]
    scale = RunningScale(initial=0.1)
    assert float(scale.scale) == pytest.approx(0.1)
    scale.update(batches[1], lambda x: x)
    assert float(scale.scale) == pytest.approx(0.1), "nothing seen, nothing changed"
    for noise in batches:
        scale.update(noise, lambda x: x)
    together = torch.cat(batches)
    assert float(scale.scale) == pytest.approx(float(together.square().mean().sqrt()), rel=1e-6)
    assert int(scale.count) == together.numel()
    again = RunningScale(initial=0.1)
    again.load_state_dict(scale.state_dict())
    assert torch.equal(again.scale, scale.scale)
