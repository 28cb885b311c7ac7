"""The settings: the `task.denoising` block of a fairchem config, parsed once into frozen objects.

Every setting has a default, a range and a description; the descriptions are the text of the README's table.
"""

from __future__ import annotations

import difflib
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model, model_validator


class ConfigError(ValueError):
    """A config that cannot be trained as written. The message names the key, what was wrong and what would be right."""


def _reject_bool(value: Any) -> Any:
    # bool is an int to Python, and `std: yes` a bool to YAML.
    if isinstance(value, bool):
        raise ValueError("expected a number, not a boolean")
    return value


Real = Annotated[float, BeforeValidator(_reject_bool), Field(allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_reject_bool)]
Share = Annotated[Real, Field(ge=0, le=1)]
Length = Annotated[Real, Field(gt=0)]
Ratio = Annotated[Real, Field(gt=0, le=1)]


class Settings(BaseModel):
    """Base of every task's settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prob: Share | None = Field(None, description="share of the steps; `null`: what the other tasks leave")
    coefficient: Annotated[Real, Field(ge=0)] = Field(description="weight of the denoising term in the loss")
    all_atoms: bool = Field(False, description="corrupt and denoise fixed atoms too")


class DensSettings(Settings):
    """DeNS (Liao et al. 2024, arXiv 2403.09549). Defaults: the OC20 2M run of 12 epochs."""

    prob: Share | None = Field(0.5, description="share of the steps that denoise (p_DeNS)")
    std: Length = Field(0.1, description="standard deviation σ of the noise, Å")
    num_steps: Annotated[Count, Field(ge=1)] | None = Field(None, description="schedule: how many σ, evenly in log")
    std_low: Length | None = Field(None, description="schedule: smallest σ, Å")
    std_high: Length | None = Field(None, description="schedule: largest σ, Å; also the unit of the target")
    sigma_encoding: bool = Field(False, description="schedule: tell the model each structure's σ")
    force_encoding: bool = Field(True, description="tell the model the original's forces (`false`: ablation)")
    corrupt_ratio: Ratio | None = Field(0.5, description="probability that an atom moves; `null`: all move")
    coefficient: Annotated[Real, Field(ge=0)] = Field(10.0, description="weight λ of the denoising term")
    coefficient_decay: Share | None = Field(
        None, description="λ falls linearly to this share of itself by the last step; `null`: constant"
    )
    train_outputs: tuple[str, ...] = Field(
        ("energy",), description="outputs, besides forces, that train on corrupted structures (stress does not)"
    )
    exclude_md: bool = Field(True, description="never corrupt structures marked `md`")
    min_num_atoms: Annotated[Count, Field(ge=1)] | None = Field(None, description="never corrupt smaller structures")
    max_force_norm: Length | None = Field(
        None, description="never corrupt a structure whose largest |F| exceeds this, eV/Å"
    )
    max_stress_norm: Length | None = Field(
        None, description="never corrupt a structure whose stress exceeds this (Frobenius norm, the data's unit)"
    )
    strict_max_ratio: Ratio | None = Field(
        None, description="leave a structure alone when more than this share of its atoms would move"
    )
    honour_skip_dens: bool = Field(True, description="never corrupt structures marked `skip_dens`")

    @model_validator(mode="after")
    def _schedule_is_whole(self) -> DensSettings:
        schedule = {"num_steps": self.num_steps, "std_low": self.std_low, "std_high": self.std_high}
        missing = [key for key, value in schedule.items() if value is None]
        if 0 < len(missing) < len(schedule):
            raise ValueError(f"a noise schedule needs num_steps, std_low and std_high; missing: {', '.join(missing)}")
        if self.schedule is None and self.sigma_encoding:
            raise ValueError("sigma_encoding needs a noise schedule: set num_steps, std_low and std_high")
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


class NoisyNodesSettings(Settings):
    """Noisy nodes: unconditioned denoising beside the ordinary loss, on slightly noisy input."""

    std: Length = Field(5e-4, description="standard deviation σ of the noise, Å (crystals; molecules: 0.005)")
    corrupt_ratio: Ratio | None = Field(None, description="probability that an atom moves; `null`: all move")
    coefficient: Annotated[Real, Field(ge=0)] = Field(0.1, description="weight of the denoising term")
    loss: Literal["mse", "mae", "l2mae"] = Field("mse", description="the host's loss function for the noise")


class _Denoising(BaseModel):
    """The block's own keys, beside one key a task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    restart: bool = Field(
        False, description="count steps from zero when a checkpoint of another kind (plain, say) is given"
    )


def parse_denoising(block: Any, tasks: dict[str, type[Settings]]) -> tuple[dict[str, Settings], bool]:
    """Parse the `task.denoising` block.

    Args:
        block: the block as read from YAML. A task set to null is off.
        tasks: settings class of every known task, by name.

    Returns:
        Settings of each task that is on, with every `prob` filled in, and `restart`.

    Raises:
        ConfigError: names each offending key with what was wrong.
    """
    model = create_model("Denoising", __base__=_Denoising, **{n: (cls | None, None) for n, cls in tasks.items()})
    try:
        parsed = model.model_validate({} if block is None else block)
    except ValidationError as error:
        raise ConfigError(_explain(error, {"": model, **tasks})) from None
    settings = {name: getattr(parsed, name) for name in tasks if getattr(parsed, name) is not None}
    return _fill_probabilities(settings), parsed.restart


def _fill_probabilities(settings: dict[str, Settings]) -> dict[str, Settings]:
    """Give every task without a `prob` an equal part of what the others leave."""
    taken = {name: s.prob for name, s in settings.items() if s.prob is not None}
    if sum(taken.values()) > 1 + 1e-9:
        shares = ", ".join(f"task.denoising.{name}.prob = {prob:g}" for name, prob in taken.items())
        raise ConfigError(f"{shares}: a step has at most one task, so the probabilities must sum to at most 1")
    rest = max(0.0, 1 - sum(taken.values())) / max(1, len(settings) - len(taken))
    return {name: s if s.prob is not None else s.model_copy(update={"prob": rest}) for name, s in settings.items()}


def _explain(error: ValidationError, models: dict[str, type[BaseModel]]) -> str:
    lines = []
    for issue in error.errors():
        path = [str(part) for part in issue["loc"]]
        key = ".".join(["task.denoising", *path])
        if issue["type"] == "extra_forbidden":
            owner = models.get(path[0], models[""]) if len(path) > 1 else models[""]
            known = list(owner.model_fields)
            close = difflib.get_close_matches(path[-1], known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"
            lines.append(f"{key}: unknown key; {hint}")
        else:
            reason = issue["msg"].removeprefix("Value error, ")
            value = f" (got {issue['input']!r})" if not isinstance(issue["input"], dict) else ""
            lines.append(f"{key}: {reason}{value}")
    return "\n".join(lines)
