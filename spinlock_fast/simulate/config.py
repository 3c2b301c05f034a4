"""Settings of a generated data set, read from YAML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from spinlock_fast.config.loading import read_yaml
from spinlock_fast.config.problems import describe_problems
from spinlock_fast.config.schema import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section
from spinlock_fast.errors import ConfigError

Activation = Literal["relu", "gelu", "tanh", "sine"]
NoiseSchedule = Literal["constant", "decaying", "periodic"]
Normalization = Literal["none", "instance", "layer"]
Compression = Literal["none", "lzf", "gzip"]
Share = Annotated[float, Field(ge=0.0, le=1.0)]

Range = Annotated[tuple[float, float], Field(strict=False)]
IntegerRange = Annotated[tuple[int, int], Field(strict=False)]


# Smallest and largest value that a range of `ParameterSpace` may contain.
_LIMITS: dict[str, tuple[float, float]] = {
    "num_layers": (2, 8),
    "base_channels": (1, 64),
    "dropout_rate": (0.0, 0.9),
    "noise_scale": (1e-12, 10.0),
    "noise_correlation": (0.0, 32.0),
    "step_size": (1e-6, 1.0),
}


class ParameterSpace(Section):
    """Ranges and choices of the twelve parameters of an operator."""

    num_layers: IntegerRange = Field(default=(2, 4), description="number of convolutions, inclusive range")
    base_channels: IntegerRange = Field(default=(4, 8), description="hidden channels, inclusive range")
    kernel_size: list[Literal[3, 5, 7]] = Field(default=[3, 5], description="kernel widths", min_length=1)
    activation: list[Activation] = Field(
        default=["relu", "gelu", "tanh", "sine"], description="non-linearities", min_length=1
    )
    dropout_rate: Range = Field(default=(0.0, 0.3), description="share of hidden channels dropped at each step")
    noise_scale: Range = Field(
        default=(1e-4, 0.3), description="standard deviation of the noise added at each step, log-uniform"
    )
    noise_correlation: Range = Field(
        default=(0.0, 6.0), description="distance in pixels at which the autocorrelation of the noise is exp(-1/2)"
    )
    noise_schedule: list[NoiseSchedule] = Field(
        default=["constant", "decaying", "periodic"], description="amplitude of the noise over time", min_length=1
    )
    normalization: list[Normalization] = Field(
        default=["none", "instance", "layer"], description="normalization of hidden layers", min_length=1
    )
    residual_share: Share = Field(default=0.75, description="share of residual operators; the rest are convex")
    step_size: Range = Field(
        default=(0.05, 0.6), description="step of the residual update, weight of the convex update"
    )

    @field_validator(*_LIMITS)
    @classmethod
    def _increasing_within_limits(cls, value: tuple[Any, Any], info: ValidationInfo) -> tuple[Any, Any]:
        low, high = _LIMITS[str(info.field_name)]
        if not low <= value[0] <= value[1] <= high:
            raise ValueError(f"expected two increasing numbers between {low} and {high}")
        return value

    @field_validator("kernel_size", "activation", "noise_schedule", "normalization")
    @classmethod
    def _distinct(cls, value: list[Any]) -> list[Any]:
        if len(set(value)) < len(value):
            raise ValueError("expected each choice once")
        return value


class GeneratorConfig(Section):
    """All settings of a generated data set."""

    operators: PositiveInt | None = Field(default=None, description="operators to simulate, without --operators")
    random_seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(default=42, description="seed of all random numbers")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = Field(
        default="auto", description="auto, cpu, cuda or cuda:N"
    )
    grid_size: Literal[32, 64, 128, 256] = Field(default=64, description="points along each side of the square")
    num_timesteps: Annotated[int, Field(ge=64, le=65536)] = Field(default=256, description="steps of a trajectory")
    num_realizations: PositiveInt = Field(default=3, description="trajectories per operator, with different noise")
    clip: PositiveFloat = Field(default=10.0, description="fields are clipped at +/- this value at each step")
    confinement: NonNegativeFloat = Field(
        default=0.25, description="c of the restoring force -c u^3 of residual operators; 0: none"
    )
    gain: PositiveFloat = Field(default=2.0, description="standard deviation of weights, relative to 1 / sqrt(fan-in)")
    operator_sensitivity: bool = Field(
        default=False, description="compute the ten operator-sensitivity features, else NaN"
    )
    last_fields: bool = Field(
        default=False, description="keep the last state of the first realization of each operator in outputs/fields"
    )
    compression: Compression = Field(
        default="gzip", description="compression of the chunks; gzip is level 4 with shuffle"
    )
    batch_operators: PositiveInt = Field(default=16, description="operators between two writes")
    workers: NonNegativeInt = Field(
        default=0, description="processes on the CPU; 0: one per core; the data do not depend on it"
    )
    parameters: ParameterSpace = Field(default_factory=ParameterSpace, description="see its section")

    @model_validator(mode="after")
    def _cross_checks(self) -> GeneratorConfig:
        if self.parameters.noise_correlation[1] > self.grid_size / 2:
            raise ValueError("parameters.noise_correlation must stay below half of grid_size")
        return self

    def provenance(self) -> dict[str, Any]:
        """The settings that determine the data, as JSON values."""
        chosen = self.model_dump(
            mode="json", exclude={"operators", "device", "batch_operators", "workers", "compression"}
        )
        if not self.last_fields:
            del chosen["last_fields"]  # so that data sets of earlier versions can be resumed
        return chosen


def load_generator_config(path: str | Path | None, changes: Mapping[str, Any] | None = None) -> GeneratorConfig:
    """The settings of a YAML file (or the defaults) with changes.

    Raises:
        ConfigError: one line for each wrong key.
    """
    data = {**({} if path is None else read_yaml(Path(path))), **(changes or {})}
    source = "arguments" if path is None else str(path)
    try:
        return GeneratorConfig.model_validate(data)
    except ValidationError as error:
        problems = describe_problems(error, data, GeneratorConfig)
        raise ConfigError(*(f"{source}: {problem}" for problem in problems)) from None
