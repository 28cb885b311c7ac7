"""SCD: self-conditioned denoising (Perez, Gómez-Bombarelli, 2026, arXiv 2603.17196)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fairchem_scd.denoising.conditions import ConditionHead, ForceEncoding, Modulation
from fairchem_scd.denoising.corruption import Corruption, corrupt
from fairchem_scd.denoising.plan import VALIDATION, AtomSubset, Objective, Pass
from fairchem_scd.denoising.random import stream
from fairchem_scd.denoising.running_scale import RunningScale
from fairchem_scd.denoising.settings import ScdSettings
from fairchem_scd.denoising.structures import Structures, require
from fairchem_scd.denoising.tasks.base import Backbone, DenoisingTask
from fairchem_scd.errors import ConfigError


class Scd(DenoisingTask):
    """Embed a structure, corrupt it, tell the model the embedding, predict the noise.

    Two passes. The first, over the clean structure, embeds it, and beside other losses predicts the config's outputs;
    the second, over the corrupted one, predicts the noise. Where the parts to embed or to denoise are not the whole
    structure, each is a graph of its own, and outputs come from a pass over the whole.
    """

    name = "scd"
    Settings = ScdSettings
    settings: ScdSettings

    @property
    def labels(self) -> frozenset[str]:
        s = self.settings
        forces = {"forces"} if "forces" in s.condition else set()
        return frozenset(forces | ({"tags"} if s.embed_tags or s.denoise_tags else set()))

    @property
    def conditions_on_forces(self) -> bool:
        return "forces" in self.settings.condition

    def check(self, outputs: Collection[str], trained: Collection[str]) -> None:
        if self.supervised and self.settings.embed_tags is None and self.settings.std_reg:
            raise ConfigError(
                "task.denoising.scd.std_reg: the clean pass also trains the config's outputs, whose labels belong to "
                "the structure as it is; leave std_reg out"
            )

    def check_sample(self, sample: Sequence[Structures], origin: str) -> None:
        super().check_sample(sample, origin)
        s = self.settings
        present = sorted({int(tag) for structures in sample for tag in structures.tags}) if s.parts else []
        for key, tags in s.parts.items():
            counts = [int(_tagged(structures, tags).sum()) for structures in sample]
            if max(counts) < 2:
                what = "more than one atom" if max(counts) else "an atom"
                raise ConfigError(
                    f"task.denoising.scd.{key}: none of the {len(sample)} structures {origin} has {what} with the "
                    f"tags {sorted(tags)}; their tags: {present}"
                )
        if not any(self.corrupt(structures, seed=0, step=VALIDATION).mask.any() for structures in sample):
            raise ConfigError(
                f"task.denoising.scd: of the {len(sample)} structures {origin} none has anything to denoise: free "
                f"atoms{f' with the tags {sorted(s.denoise_tags)}' if s.denoise_tags else ''}, two or more of them"
            )

    def modules(self, backbone: Backbone) -> nn.ModuleDict:
        s = self.settings
        modules = nn.ModuleDict({"noise_head": backbone.vector_head()})
        if "self" in s.condition:
            channels, masked = backbone.scalar_channels, s.null_condition == "mask_token"
            modules["condition_head"] = ConditionHead(channels, pool=s.pool, clamp=s.clamp, mask_token=masked)
            modules["modulation"] = Modulation(
                channels, backbone.num_modulated, null=s.null_condition, gate_bound=s.gate_bound
            )
        if self.conditions_on_forces:
            modules["encoding"] = ForceEncoding(**backbone.encoding_spec)
        if self._runs_scale:
            modules["scale"] = RunningScale(math.sqrt(sum(sigma**2 for sigma in s.sigmas) / len(s.sigmas)))
        return modules

    def corrupt(self, structures: Structures, *, seed: int, step: int) -> Corruption:
        s = self.settings
        return self._noise(structures, s.denoise_tags, s.sigmas, seed, step, ratio=s.corrupt_ratio)

    def passes(self, structures: Structures, corruption: Corruption, *, seed: int, step: int) -> tuple[Pass, ...]:
        s = self.settings
        passes, conditioned = [], None
        if "self" in s.condition:
            clean = self._clean_view(structures, seed, step)
            shared = self.supervised and s.embed_tags is None
            if self.supervised and not shared:
                passes.append(Pass(structures.pos))
            passes.append(replace(self.embedding(structures), pos=clean, outputs=shared))
            conditioned = self._conditioned(structures, seed, step)
        elif self.supervised:
            passes.append(Pass(structures.pos))
        encoding = None
        if "forces" in s.condition:
            forces = require(structures.forces, "forces", self.name)
            encoding = (forces, corruption.mask, corruption.sigma[corruption.batch])
        subset = None
        if s.denoise_tags is not None:
            target = _tagged(structures, s.denoise_tags) & corruption.corrupted[corruption.batch]
            subset = _part(structures, target)
        noisy = structures.pos + corruption.noise
        passes.append(Pass(noisy, subset=subset, encoding=encoding, conditioned=conditioned, outputs=False, noise=True))
        return tuple(passes)

    def embedding(self, structures: Structures) -> Pass:
        """The pass that embeds structures as they are."""
        subset = _part(structures, self.embedded(structures))
        return Pass(
            structures.pos,
            subset=subset,
            outputs=False,
            embed=True,
            detach_embedding=self.settings.stop_gradient_condition,
        )

    def objective(self, progress: float) -> Objective:
        s = self.settings
        scale = None if self._runs_scale else s.std
        return Objective(s.coefficient_of(self.supervised), scale, loss=s.loss, clean=True)

    @property
    def _runs_scale(self) -> bool:
        s = self.settings
        return s.noise_scale == "running" or (s.noise_scale is None and s.schedule is not None)

    def _clean_view(self, structures: Structures, seed: int, step: int) -> Tensor:
        """[N, 3] positions of the clean pass, Å."""
        s = self.settings
        std = s.std_reg_of(self.supervised)
        if std == 0:
            return structures.pos
        view = self._noise(structures, s.embed_tags, (std,), seed, step, purpose="clean view of ")
        return structures.pos + view.noise

    def embedded(self, structures: Structures) -> Tensor:
        """[N] bool: the atoms to embed. A part of one atom would be a graph without edges, which hosts cannot run."""
        chosen = _tagged(structures, self.settings.embed_tags)
        if self.settings.embed_tags is None:
            return chosen
        batch = structures.batch
        counts = torch.zeros_like(structures.natoms).index_add_(0, batch, chosen.to(structures.natoms))
        return chosen & (counts > 1)[batch]

    def _conditioned(self, structures: Structures, seed: int, step: int) -> Tensor:
        """[B] bool: structures that have an embedding and are told it."""
        conditioned = torch.zeros(len(structures.natoms), dtype=torch.bool)
        conditioned[structures.batch[self.embedded(structures)]] = True
        if step != VALIDATION:
            drops = [stream(seed, step, f"condition of {name}").random() for name in structures.ids]
            conditioned &= torch.tensor(drops) >= self.settings.condition_drop
        return conditioned

    def _noise(
        self,
        structures: Structures,
        tags: Collection[int] | None,
        sigmas: tuple[float, ...],
        seed: int,
        step: int,
        *,
        ratio: float | None = None,
        purpose: str = "",
    ) -> Corruption:
        """Noise on a part as if it were all there is: its mean is removed where the whole part moved."""
        chosen = _tagged(structures, tags)
        movable, batch = self.movable(structures), structures.batch
        counts = torch.zeros_like(structures.natoms).index_add_(0, batch, chosen.to(structures.natoms))
        ids = [purpose + name for name in structures.ids]
        drawn = corrupt(counts, ids, movable[chosen], seed=seed, step=step, sigmas=sigmas, ratio=ratio)
        noise, mask = torch.zeros(len(chosen), 3), torch.zeros_like(chosen)
        noise[chosen], mask[chosen] = drawn.noise, drawn.mask
        return Corruption(noise, mask, drawn.sigma, batch)


def _tagged(structures: Structures, tags: Collection[int] | None) -> Tensor:
    """[N] bool: the atoms with one of the tags; None: all."""
    if tags is None:
        return torch.ones_like(structures.fixed)
    return torch.isin(require(structures.tags, "tags", Scd.name), torch.tensor(sorted(tags)))


def _part(structures: Structures, chosen: Tensor) -> AtomSubset | None:
    """The chosen [N] atoms as a batch of their own; None: all atoms.

    All atoms too where none is chosen: such a pass has no effect, but every rank makes one.
    """
    return None if chosen.all() or not chosen.any() else AtomSubset.of(structures.natoms, chosen)
