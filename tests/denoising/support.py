"""What these tests share: structures, and a small model in plain torch that plans run on, without any host."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fairchem_scd.denoising import passes
from fairchem_scd.denoising.adapter import Adapter
from fairchem_scd.denoising.conditions import BoundModulation
from fairchem_scd.denoising.corruption import Corruption
from fairchem_scd.denoising.hooks import hooked
from fairchem_scd.denoising.plan import VALIDATION, Pass, Plan
from fairchem_scd.denoising.structures import Structures, structures_of
from fairchem_scd.denoising.tasks import TaskModules, build_tasks


def structures(natoms: list[int], *, fixed: Tensor | None = None, **labels: Any) -> Structures:
    """Structures of given sizes, all atoms at the origin, with unit forces."""
    total = sum(natoms)
    return Structures(
        ids=[f"{i}/0" for i in range(len(natoms))],
        natoms=torch.tensor(natoms),
        pos=torch.zeros(total, 3),
        fixed=torch.zeros(total, dtype=torch.bool) if fixed is None else fixed,
        forces=labels.pop("forces", torch.ones(total, 3)),
        **labels,
    )


def clusters(natoms: tuple[int, ...] = (5, 6, 4), first: int = 0) -> SimpleNamespace:
    """A batch as a host would collate it: clusters of atoms with forces, tags, and one fixed atom each.

    Args:
        natoms: of each cluster.
        first: number of the first; a cluster is the same whatever batch it is in.
    """
    pos, numbers, forces, tags, fixed = [], [], [], [], []
    for i, n in enumerate(natoms):
        generator = torch.Generator().manual_seed(100 + first + i)
        pos.append(1.5 * torch.rand(n, 3, generator=generator))
        numbers.append(torch.randint(1, 9, (n,), generator=generator))
        forces.append(torch.randn(n, 3, generator=generator))
        tags.append((torch.arange(n) >= n - 2).long() * 2)
        fixed.append((torch.arange(n) == 0).long())
    counts = torch.tensor(natoms)
    return SimpleNamespace(
        pos=torch.cat(pos), atomic_numbers=torch.cat(numbers), forces=torch.cat(forces), tags=torch.cat(tags),
        fixed=torch.cat(fixed), natoms=counts, batch=torch.repeat_interleave(torch.arange(len(natoms)), counts),
        sid=[first + i for i in range(len(natoms))], fid=[0] * len(natoms),
    )  # fmt: skip


class Block(nn.Module):
    """Scalars and vectors of atoms, updated from their neighbours'."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(channels), nn.Linear(channels, 3 * channels)
        self.filter = nn.Sequential(nn.Linear(4, channels), nn.SiLU(), nn.Linear(channels, 3 * channels))

    def forward(self, x: Tensor, v: Tensor, edges: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        source, target, unit, radial = edges
        scalar, along, across = (self.filter(radial) * self.mix(self.norm(x))[source]).chunk(3, dim=1)
        dv = torch.zeros_like(v).index_add(0, target, along[:, None] * unit[:, :, None] + across[:, None] * v[source])
        dx = torch.zeros_like(x).index_add(0, target, scalar.to(x)) + (v + dv).square().mean(dim=1)
        return dx, dv


class Backbone(nn.Module):
    """An equivariant network on all pairs of a structure's atoms.

    It has the habits of hosts that the engine must bear: it writes the graph into the batch and takes it from there
    where it is, and it keeps a reference to its latest result.
    """

    regress_forces = direct_forces = True

    def __init__(self, channels: int = 6, num_blocks: int = 2) -> None:
        super().__init__()
        self.channels = channels
        self.elements = nn.Embedding(10, channels)
        self.blocks = nn.ModuleList(Block(channels) for _ in range(num_blocks))
        self.latest: Any = None

    def forward(self, data: Any) -> dict[str, Tensor]:
        if not hasattr(data, "edges"):
            data.edges = self._edges(data)
        x = self.elements(data.atomic_numbers)
        v = x.new_zeros(len(x), 3, self.channels)
        for block in self.blocks:
            dx, dv = block(x, v, data.edges)
            x, v = x + dx, v + dv
        self.latest = {"node_embedding": x, "vectors": v, "batch": data.batch}
        return self.latest

    @staticmethod
    def _edges(data: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        same = data.batch[:, None] == data.batch
        source, target = (same & ~torch.eye(len(same), dtype=torch.bool)).nonzero(as_tuple=True)
        along = data.pos[target] - data.pos[source]
        distance = along.norm(dim=1, keepdim=True)
        radial = torch.exp(-((distance - torch.linspace(0, 2, 4)) ** 2)) * (1 - distance / 4).clamp(min=0)
        return source, target, along / distance.clamp(min=1e-6), radial


class EnergyHead(nn.Module):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.linear = nn.Linear(backbone.channels, 1)

    def forward(self, data: Any, emb: dict[str, Tensor]) -> dict[str, Tensor]:
        each = self.linear(emb["node_embedding"])[:, 0]
        return {"energy": each.new_zeros(len(data.natoms)).index_add(0, data.batch, each)}


class VectorHead(nn.Module):
    """Reads what the backbone keeps of its latest pass, as some hosts' heads do."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.gate = nn.Linear(backbone.channels, backbone.channels)
        self.latest = lambda: backbone.latest

    def forward(self, data: Any, emb: dict[str, Tensor]) -> dict[str, Tensor]:
        assert self.latest() is emb, "another pass ran before this head"
        return {"forces": (self.gate(emb["node_embedding"])[:, None] * emb["vectors"]).sum(dim=2)}


class ToyAdapter(Adapter):
    host_class, names = Backbone, ("toy",)

    def vector_head(self) -> nn.Module:
        return VectorHead(self.backbone)

    @property
    def scalar_channels(self) -> int:
        return self.backbone.channels

    @property
    def num_modulated(self) -> int:
        return len(self.backbone.blocks)

    @property
    def encoding_spec(self) -> dict[str, Any]:
        return {"lmax_list": [1], "channels": self.backbone.channels, "bound": 1.0}

    def scalars(self, embedding: Any) -> Tensor:
        return embedding["node_embedding"]

    def element_embeddings(self) -> tuple[nn.Module, ...]:
        return (self.backbone.elements,)

    @contextmanager
    def in_pass(self, modulation: BoundModulation | None, heads: Any) -> Iterator[None]:
        with ExitStack() as stack:
            for i, block in enumerate(self.backbone.blocks if modulation is not None else ()):
                enter = block.norm.register_forward_hook(lambda _, args, normed, i=i: modulation.scalars(i, normed))
                leave = block.register_forward_hook(lambda _, args, out, i=i: (modulation.update(i, out[0]), out[1]))
                stack.enter_context(hooked(enter, leave))
            yield

    @contextmanager
    def encoded(self, encoding: Tensor) -> Iterator[None]:
        x, v = encoding[:, 0], encoding[:, 1:]
        first = self.backbone.blocks[0]
        with hooked(
            self.backbone.elements.register_forward_hook(lambda _, args, out: out + x),
            first.register_forward_pre_hook(lambda _, args: (args[0], args[1] + v, *args[2:])),
            first.register_forward_hook(lambda _, args, out: (out[0], out[1] + v)),
        ):
            yield


class PlainModel(nn.Module):
    """A host's model: backbone, then heads."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.output_heads = nn.ModuleDict({"energy": EnergyHead(self.backbone), "forces": VectorHead(self.backbone)})

    def forward(self, data: Any) -> dict[str, Tensor]:
        emb = self.backbone(data)
        return {key: value for head in self.output_heads.values() for key, value in head(data, emb).items()}


class ToyModel(PlainModel):
    """The same with denoising tasks: all that a host has to add for the engine."""

    def __init__(self, block: Mapping[str, Any], supervised: bool = True) -> None:
        super().__init__()
        self.denoising_tasks, _ = build_tasks(block, supervised)
        self.adapter = ToyAdapter(self.backbone)
        with torch.random.fork_rng(devices=[]):
            added = {name: TaskModules.of(task.modules(self.adapter)) for name, task in self.denoising_tasks.items()}
            self.denoising = nn.ModuleDict(added)

    def forward(self, data: Any, plan: Plan | None = None) -> dict[str, Tensor]:
        return passes.run_plain(self, data) if plan is None else passes.run_plan(self, data, plan)

    def embed(self, data: Any) -> Tensor:
        return passes.embed(self, data, structures_of(data))

    def view_of(self, data: Any, run: Pass) -> Any:
        if run.subset is None:
            view = copy.copy(data)
            view.pos = run.pos
            return view
        atoms, subset = run.subset.atoms, run.subset
        numbers = data.atomic_numbers[atoms]
        return SimpleNamespace(pos=run.pos[atoms], atomic_numbers=numbers, batch=subset.batch, natoms=subset.natoms)

    def host_forward(self, view: Any) -> dict[str, Tensor]:
        return super().forward(view)

    def vectors(self, head: nn.Module, view: Any, embedding: Any) -> Tensor:
        return head(view, embedding)["forces"]


def models(block: Mapping[str, Any], supervised: bool = True) -> tuple[PlainModel, ToyModel]:
    """The plain model and one with tasks, of equal weights, in training mode."""
    torch.manual_seed(0)
    plain = PlainModel()
    torch.manual_seed(0)
    return plain, ToyModel(block, supervised)


def stirred(model: ToyModel) -> ToyModel:
    """The model with its conditions moved away from their initial values, as after training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.denoising.named_parameters():
            if "noise_head" not in name:
                p += torch.randn(p.shape, generator=generator) / max(p.shape[-1] if p.dim() else 1, 1) ** 0.5
    return model


def plan_of(
    model: ToyModel, batch: Any, task: str | None = None, step: int = VALIDATION, seed: int = 0
) -> tuple[Plan, Corruption]:
    """The plan of a step, and its corruption. In validation every structure is told its embedding."""
    drawn, seen = model.denoising_tasks[task or next(iter(model.denoising_tasks))], structures_of(batch)
    corruption = drawn.corrupt(seen, seed=seed, step=step)
    return Plan(drawn.name, drawn.passes(seen, corruption, seed=seed, step=step)), corruption


def with_conditioned(plan: Plan, value: bool | None) -> Plan:
    """A plan whose last pass is conditioned for all structures, for none, or (None) not at all."""
    last = plan.passes[-1]
    changed = replace(last, conditioned=None if value is None else torch.full_like(last.conditioned, value))
    return replace(plan, passes=(*plan.passes[:-1], changed))


def gradients(model: nn.Module, batch: Any, *plan: Plan) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Outputs of one call on a copy of the batch, and each parameter's gradient of the sum of their squares."""
    model.zero_grad()
    out = model(copy.deepcopy(batch), *plan)
    sum(value.square().sum() for value in out.values()).backward()
    return out, {name: p.grad for name, p in model.named_parameters()}
