"""The settings under `task.denoising`: a frozen class for each block. `parse_settings` reads a config into them.

Every setting has a default, a range and a description; the descriptions are the text of docs/settings.md.
(Longer than 300 lines, since a setting takes a line or more and all blocks are best compared side by side.)
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from typing_extensions import Self


def _reject_bool(value: Any) -> Any:
    # bool is an int to Python, and `std: yes` a bool to YAML.
    if isinstance(value, bool):
        raise ValueError("expected a number, not a boolean")
    return value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, (str, int)) and not isinstance(value, bool) else value


Real = Annotated[float, BeforeValidator(_reject_bool), Field(allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_reject_bool)]
Probability = Annotated[Real, Field(ge=0, le=1)]
PositiveFloat = Annotated[Real, Field(gt=0)]
PositiveFraction = Annotated[Real, Field(gt=0, le=1)]
Tags = Annotated[frozenset[Count], BeforeValidator(_listed), Field(min_length=1)]
Conditions = Annotated[frozenset[Literal["self", "forces"]], BeforeValidator(_listed)]
NoiseLoss = Literal["mse", "mae", "l2mae"]


class _Block(BaseModel):
    """Base of every block.

    Class attributes:
        source: where the defaults come from.
        sources: of single settings, where it is elsewhere.
        former: settings that are no more, with the reason. A config that names one is read without it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: ClassVar[str] = "ours"
    sources: ClassVar[dict[str, str]] = {}
    former: ClassVar[dict[str, str]] = {}


class Settings(_Block):
    """Base of every task's settings."""

    prob: Probability | None = Field(None, description="share of the steps; `null`: the steps that other tasks leave")
    coefficient: Annotated[Real, Field(ge=0)] = Field(description="weight of the denoising term in the loss")
    all_atoms: bool = Field(False, description="corrupt and denoise fixed atoms too")


class _NoiseSettings(Settings):
    """One σ, or a schedule of them."""

    std: PositiveFloat = Field(description="standard deviation σ of the noise, Å")
    num_steps: Annotated[Count, Field(ge=1)] | None = Field(
        None, description="noise schedule: number of σ, evenly in log"
    )
    std_low: PositiveFloat | None = Field(None, description="noise schedule: smallest σ, Å")
    std_high: PositiveFloat | None = Field(None, description="noise schedule: largest σ, Å")

    @model_validator(mode="after")
    def _schedule_is_whole(self) -> Self:
        schedule = {"num_steps": self.num_steps, "std_low": self.std_low, "std_high": self.std_high}
        missing = [key for key, value in schedule.items() if value is None]
        if 0 < len(missing) < len(schedule):
            raise ValueError(f"a noise schedule needs num_steps, std_low and std_high; missing: {', '.join(missing)}")
        if self.schedule is not None:
            if "std" in self.model_fields_set:
                raise ValueError("std and a noise schedule (num_steps, std_low, std_high) exclude each other")
            if self.std_low > self.std_high:
                raise ValueError(f"std_low ({self.std_low}) must not exceed std_high ({self.std_high})")
        return self

    @property
    def schedule(self) -> tuple[float, ...] | None:
        """The σ of the schedule in Å, evenly spaced in log; None where σ is fixed."""
        if self.std_high is None or self.std_low is None or self.num_steps is None:
            return None
        low, high = math.log(self.std_low), math.log(self.std_high)
        return tuple(math.exp(low + (high - low) * i / max(self.num_steps - 1, 1)) for i in range(self.num_steps))

    @property
    def sigmas(self) -> tuple[float, ...]:
        """All σ that structures may get, Å."""
        return self.schedule or (self.std,)


class DensSettings(_NoiseSettings):
    """DeNS (Liao et al. 2024, arXiv 2403.09549). Defaults: the OC20 2M run of 12 epochs."""

    source = "OC20 2M run"
    sources = {
        "exclude_md": "OC20 All+MD run",
        **dict.fromkeys(
            ("coefficient_decay", "min_num_atoms", "max_force_norm", "max_stress_norm", "strict_max_ratio"),
            "off; EquiformerV3 has it",
        ),
        "honour_skip_dens": "EquiformerV3",
    }

    prob: Probability | None = Field(0.5, description="share of the steps that denoise (p_DeNS)")
    std: PositiveFloat = Field(0.1, description="standard deviation σ of the noise, Å")
    std_high: PositiveFloat | None = Field(
        None, description="noise schedule: largest σ, Å; the target is divided by it"
    )
    sigma_encoding: bool = Field(False, description="noise schedule: condition on each structure's σ")
    force_encoding: bool = Field(True, description="condition on the original's forces (`false`: ablation)")
    corrupt_ratio: PositiveFraction | None = Field(0.5, description="probability that an atom moves; `null`: all move")
    coefficient: Annotated[Real, Field(ge=0)] = Field(10.0, description="weight λ of the denoising term")
    coefficient_decay: Probability | None = Field(
        None, description="λ falls linearly to this share of itself by the last step; `null`: constant"
    )
    train_outputs: tuple[str, ...] = Field(
        ("energy",), description="outputs, besides forces, that are trained on corrupted structures (stress is not)"
    )
    exclude_md: bool = Field(True, description="never corrupt structures marked `md`")
    min_num_atoms: Annotated[Count, Field(ge=1)] | None = Field(None, description="never corrupt smaller structures")
    max_force_norm: PositiveFloat | None = Field(
        None, description="never corrupt a structure whose largest |F| exceeds this, eV/Å"
    )
    max_stress_norm: PositiveFloat | None = Field(
        None, description="never corrupt a structure whose stress exceeds this (Frobenius norm, the data's unit)"
    )
    strict_max_ratio: PositiveFraction | None = Field(
        None,
        description="never corrupt a structure of whose atoms, fixed ones included, more than this share was drawn to "
        "move",
    )
    honour_skip_dens: bool = Field(True, description="never corrupt structures marked `skip_dens`")

    @model_validator(mode="after")
    def _sigma_encoding_has_a_schedule(self) -> Self:
        if self.schedule is None and self.sigma_encoding:
            raise ValueError("sigma_encoding needs a noise schedule: set num_steps, std_low and std_high")
        return self


# SCD's settings that have a meaning only where the noisy pass is conditioned on an embedding.
_OF_THE_EMBEDDING = ("std_reg", "condition_drop", "null_condition", "stop_gradient_condition", "gate_bound")
_OF_THE_EMBEDDING += ("embed_tags", "judge_condition")
# SCD's defaults in pre-training, and beside other losses.
_CLEAN_STD = 0.005
_ALONE, _BESIDE_LABELS = 1.0, 10.0


class ScdSettings(_NoiseSettings):
    """SCD (Perez, Gómez-Bombarelli 2026, arXiv 2603.17196). Defaults: the paper's, and ours where it has none."""

    source = "the paper"
    sources = {
        "prob": "ours",
        "coefficient": "1: the paper; 10: ours",
        "all_atoms": "ours: slabs have fixed atoms",
        "num_steps": "ours",
        "std_low": "ours",
        "std_high": "ours",
        "std_reg": "0.005: the paper; none: ours",
        "noise_scale": "ours: a statistic a component, as in the paper, breaks equivariance",
        "condition": "the paper; forces beside it: ours",
        "null_condition": "ours: the plain model stays what it is",
        "stop_gradient_condition": "the paper; true: ours",
        "recompute_clean_pass": "ours",
        "gate_bound": "ours",
        "judge_condition": "ours",
        "embed_tags": "the paper, for pockets and ligands",
        "denoise_tags": "the paper, for pockets and ligands",
    }
    former = {
        "pool": "sum and mean are the same behind the LayerNorm that follows",
        "clamp": "the condition comes from a LayerNorm, which keeps it far below the former default of 1000; a bound "
        "so small that it would act is applied no more",
    }

    std: PositiveFloat = Field(0.04, description="standard deviation σ of the noise, Å")
    std_reg: Annotated[Real, Field(ge=0)] | None = Field(
        None,
        description=f"standard deviation of the noise on the clean view, Å; `null`: {_CLEAN_STD:g} in pre-training, "
        "none beside other losses, whose labels belong to the structure as it is",
    )
    corrupt_ratio: PositiveFraction | None = Field(None, description="probability that an atom moves; `null`: all move")
    coefficient: Annotated[Real, Field(ge=0)] | None = Field(
        None,
        description=f"weight of the denoising term; `null`: {_ALONE:g} in pre-training, {_BESIDE_LABELS:g} beside "
        "other losses",
    )
    loss: NoiseLoss = Field("mse", description="the host's loss function for the noise")
    noise_scale: Literal["std", "running"] | None = Field(
        None,
        description="what the target is divided by: `std`, the σ; or `running`, the root mean square of all noise so "
        "far; `null`: `std`, and with a noise schedule `running`",
    )
    condition: Conditions = Field(
        frozenset({"self"}),
        description="what the noisy pass is conditioned on: `self`, the embedding from the clean pass; `forces`, those "
        "of the original structure; both or nothing",
    )
    condition_drop: Probability = Field(
        0.2, description="probability that a structure is not conditioned on its embedding"
    )
    null_condition: Literal["identity", "mask_token"] = Field(
        "identity",
        description="without an embedding: `identity`, the plain backbone; or `mask_token`, the authors' token, with "
        "which the model always needs this package",
    )
    stop_gradient_condition: bool = Field(
        False, description="no gradient flows through the embedding into the clean pass"
    )
    recompute_clean_pass: bool = Field(
        False,
        description="keep no activations of the clean pass and run it again in backward: about the memory of a plain "
        "step, for about a quarter more time than without; gradients are the same",
    )
    gate_bound: PositiveFraction = Field(1.0, description="a block's update is scaled within 1 ± this")
    judge_condition: bool | None = Field(
        None,
        description="measure in validation what the embedding is worth (docs/metrics.md), for two passes more a "
        "structure, beside labels four; `null`: in pre-training alone",
    )
    embed_tags: Tags | None = Field(
        None,
        description="embed only the atoms with these tags, as a graph of their own, in structures with two or more of "
        "them; `null`: all",
    )
    denoise_tags: Tags | None = Field(
        None, description="denoise only the atoms with these tags, as a graph of their own; `null`: all"
    )

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if "self" not in self.condition:
            idle = [key for key in _OF_THE_EMBEDDING if key in self.model_fields_set and getattr(self, key) is not None]
            if idle:
                raise ValueError(f"{', '.join(idle)}: of the embedding, but condition does not name 'self'")
        if self.null_condition == "mask_token" and self.gate_bound != 1.0:
            raise ValueError("gate_bound belongs to null_condition: identity; the authors' gate has none")
        if self.noise_scale == "std" and self.schedule is not None:
            raise ValueError("noise_scale: std needs one σ; with a schedule it is 'running'")
        return self

    def coefficient_of(self, supervised: bool) -> float:
        """`coefficient`, or its default, which depends on whether outputs are trained too."""
        return self.coefficient if self.coefficient is not None else _BESIDE_LABELS if supervised else _ALONE

    def std_reg_of(self, supervised: bool) -> float:
        """`std_reg` in Å, or its default, which depends on whether outputs are trained too."""
        return self.std_reg if self.std_reg is not None else 0.0 if supervised else _CLEAN_STD

    @property
    def subset_tags(self) -> dict[str, frozenset[int]]:
        """The tags of each choice of atoms that is not all atoms, by setting."""
        chosen = {"embed_tags": self.embed_tags, "denoise_tags": self.denoise_tags}
        return {key: tags for key, tags in chosen.items() if tags is not None}


class NoisyNodesSettings(Settings):
    """Noisy nodes: unconditioned denoising beside the ordinary loss, on slightly noisy input."""

    source = "ours"
    sources = {
        "std": "SCD's paper, crystals",
        "coefficient": "within the range of SCD's paper",
        "corrupt_ratio": "SCD's paper",
        "loss": "SCD's paper",
    }

    std: PositiveFloat = Field(5e-4, description="standard deviation σ of the noise, Å (crystals; molecules: 0.005)")
    corrupt_ratio: PositiveFraction | None = Field(None, description="probability that an atom moves; `null`: all move")
    coefficient: Annotated[Real, Field(ge=0)] = Field(0.1, description="weight of the denoising term")
    loss: NoiseLoss = Field("mse", description="the host's loss function for the noise")


class DropPathSettings(_Block):
    """A drop-path rate that falls while fine-tuning begins (SCD, arXiv 2603.17196)."""

    source = "SCD's paper"

    start: Annotated[Real, Field(ge=0, lt=1)] = Field(0.15, description="rate in the first step")
    end: Annotated[Real, Field(ge=0, lt=1)] = Field(0.0, description="rate from `steps` on")
    steps: Annotated[Count, Field(ge=1)] = Field(2000, description="over how many steps it falls, linearly")

    def rate(self, step: int) -> float:
        """Rate of a step, the first being 1."""
        return self.start + (self.end - self.start) * min((step - 1) / self.steps, 1.0)


class CellRepeatSettings(_Block):
    """Random repeats of small periodic cells in the training data (SCD, arXiv 2603.17196)."""

    source = "SCD's paper"
    sources = {"max_atoms": "ours: the paper has no bound"}

    tries: Annotated[Count, Field(ge=0)] = Field(2, description="how often, after `min_atoms`, an axis may be doubled")
    prob: Probability = Field(0.5, description="probability that a try doubles a random periodic axis")
    min_atoms: Annotated[Count, Field(ge=1)] = Field(
        4,
        description="a structure of fewer atoms N is first doubled along ⌈`min_atoms` / N⌉ − 1 random periodic axes, "
        "and if that is not enough repeated until it has this many",
    )
    max_atoms: Annotated[Count, Field(ge=1)] = Field(
        64, description="never double at random beyond this many atoms (ours; the paper has no bound)"
    )


class DenoisingBlock(_Block):
    """The block's own keys, beside one key a task."""

    sources = {"drop_path_per": "atom: SCD's authors' code; structure: fairchem"}

    restart: bool = Field(
        False,
        description="count steps from zero when a run starts from a checkpoint of another kind, such as a plain one",
    )
    on_bad_data: Literal["stop", "skip"] = Field(
        "stop",
        description="a row that cannot be read or trained on ends the run, which names it (`stop`), or is counted and "
        "replaced by the next good row (`skip`); docs/long-runs.md says which rows are bad",
    )
    quiet_heads: bool | None = Field(
        None,
        description="the last layer of new heads of scalars starts at zero, so that they first predict the mean that "
        "the normaliser and the references have; `null`: in fine-tuning, where the backbone comes from another "
        "checkpoint and a task is on",
    )
    drop_path: DropPathSettings | None = Field(None, description="a schedule for the backbone's drop path")
    drop_path_per: Literal["structure", "atom"] | None = Field(
        None,
        description="what the backbone's drop path leaves a block's update out for: whole structures, as fairchem "
        "does (`structure`), or each atom on its own, as SCD's authors do (`atom`); `null`: `atom` in pre-training, "
        "`structure` beside other losses",
    )
    repeat_cells: CellRepeatSettings | None = Field(None, description="repeat small periodic cells in training")
