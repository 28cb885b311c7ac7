"""The contract of adapters, without a host: every block is modulated, also where activation checkpointing reruns it."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fairchem_scd.denoising.adapter import Adapter
from fairchem_scd.denoising.conditions import Modulation
from fairchem_scd.denoising.hooks import StateOfPass, changed_output
from fairchem_scd.errors import ConfigError

CHANNELS = 6


class Block(nn.Module):
    """Its messages read `shared.mix`, which the backbone overwrites in every pass."""

    def __init__(self, shared: SimpleNamespace, saves: str) -> None:
        super().__init__()
        self.shared, self.saves = shared, saves
        self.norm, self.messages = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def chunk(self, x: Tensor) -> Tensor:
        return torch.tanh(self.messages(x) * self.shared.mix)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return checkpoint(self.chunk, x, use_reentrant=False) if self.saves == "chunk" else self.chunk(x)


class Backbone(nn.Module):
    """Args: saves: what runs under activation checkpointing: "block", a method of it ("chunk"), or nothing."""

    def __init__(self, saves: str) -> None:
        super().__init__()
        self.saves, self.shared = saves, SimpleNamespace(mix=None)
        self.blocks = nn.ModuleList(Block(self.shared, saves) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        self.shared.mix = x.square().mean(dim=0)
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.saves == "block" else block(x))
        return x


class ToyAdapter(Adapter):
    host_class, names = Backbone, ("toy",)

    def vector_head(self):
        return nn.Identity()

    @property
    def blocks(self):
        return self.backbone.blocks

    @contextmanager
    def modulated(self, block, index, modulation):
        with (
            changed_output(block.norm, lambda x: modulation.scalars(index, x)),
            changed_output(block, lambda update: modulation.update(index, update)),
        ):
            yield

    def recomputed(self, heads):
        if self.backbone.saves == "block":
            return [(self.backbone, "blocks")]
        return [(block, "chunk") for block in self.backbone.blocks] if self.backbone.saves == "chunk" else []

    def state_of_pass(self):
        shared = self.backbone.shared
        return StateOfPass(lambda: shared.mix, lambda mix: setattr(shared, "mix", mix))


class Forgetful(ToyAdapter):
    def state_of_pass(self):
        return None


def modulation() -> Modulation:
    torch.manual_seed(1)
    made = Modulation(CHANNELS, 3)
    for p in made.parameters():
        nn.init.normal_(p, std=0.5)
    return made


def gradients(saves: str, adapter: type[Adapter] = ToyAdapter) -> list[Tensor]:
    """Of two passes under different conditions, whose backward runs after both."""
    torch.manual_seed(0)
    backbone, conditions = Backbone(saves), modulation()
    hooked = adapter(backbone)
    loss = torch.zeros(())
    for seed in range(2):
        x, condition = torch.randn(2, 5, CHANNELS, generator=torch.Generator().manual_seed(seed))
        with hooked.in_pass(conditions.bind(condition, torch.arange(5) > 0), ()):
            loss = loss + backbone(x).square().sum()
    assert not {"blocks", "chunk"} & (set(vars(backbone)) | {key for block in backbone.blocks for key in vars(block)})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.modules())
    return torch.autograd.grad(loss, [*backbone.parameters(), *conditions.parameters()])


@pytest.mark.parametrize("saves", ["block", "chunk"])
def test_what_is_recomputed_in_backward_is_what_its_pass_computed(saves):
    expected = gradients("nothing")
    assert all(gradient.any() for gradient in expected)
    for gradient, found in zip(expected, gradients(saves), strict=True):
        assert torch.equal(found, gradient)
    without = zip(expected, gradients(saves, Forgetful), strict=True)
    assert not all(torch.allclose(found, gradient) for gradient, found in without), "the state makes no difference"


def test_every_block_is_modulated_once_and_by_its_own_weights():
    backbone, conditions, calls = Backbone("nothing"), modulation(), []
    adapter, bound = ToyAdapter(backbone), conditions.bind(torch.randn(5, CHANNELS), torch.ones(5, dtype=torch.bool))
    for i, block in enumerate(conditions.blocks):
        block.register_forward_hook(lambda module, args, out, i=i: calls.append(i))
    x = torch.randn(5, CHANNELS)
    plain = backbone(x)
    with adapter.in_pass(bound, ()):
        changed = backbone(x)
    assert calls == list(range(adapter.num_modulated)) == [0, 1, 2]
    assert not torch.allclose(changed, plain)
    with adapter.in_pass(None, ()):
        assert torch.equal(backbone(x), plain)


def test_an_error_in_a_pass_leaves_no_hook():
    backbone = Backbone("block")
    adapter = ToyAdapter(backbone)
    bound = modulation().bind(torch.zeros(5, CHANNELS), torch.ones(5, dtype=torch.bool))
    with pytest.raises(RuntimeError), adapter.in_pass(bound, ()):
        backbone(torch.zeros(5, CHANNELS + 1))
    assert "blocks" not in vars(backbone)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.modules())


def test_an_adapter_that_cannot_modulate_says_so_when_it_is_asked_to():
    class VectorsOnly(Adapter):
        host_class, names = Backbone, ("toy",)

        def vector_head(self):
            return nn.Identity()

    adapter = VectorsOnly(Backbone("nothing"))
    bound = modulation().bind(torch.zeros(5, CHANNELS), torch.ones(5, dtype=torch.bool))
    with pytest.raises(ConfigError, match="does not say how to modulate"), adapter.in_pass(bound, ()):
        pass
    with adapter.in_pass(None, ()):
        adapter.backbone(torch.randn(5, CHANNELS))
