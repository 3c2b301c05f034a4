"""Settings of a predictor of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from spinlock_fast.config.loading import parse_overrides, read_yaml
from spinlock_fast.config.problems import describe_problems
from spinlock_fast.config.section import NonNegativeFloat, PositiveFloat, PositiveInt, Probability, Section
from spinlock_fast.errors import ConfigError


class PredictorConfig(Section):
    """All settings of `predict train`."""

    parameters: str | None = Field(
        default="parameters/params", description="dataset of theta [N, P]; null: theta is not an input"
    )
    fields: str | None = Field(
        default="inputs/fields",
        description="dataset of initial fields [N, C, *space] in 1 to 3 dimensions; null: they are no input",
    )
    periodic: Annotated[str, Field(pattern="^(none|[xyz]+)$")] | None = Field(
        default=None,
        description="periodic axes of the initial fields, such as xy, or none; null: by the attribute "
        "`periodic` of the file, else all",
    )
    hidden_dim: PositiveInt = Field(default=256, description="width of the MLP")
    channels: PositiveInt = Field(default=8, description="channels of the first stage of the convolutional network")
    stages: PositiveInt = Field(default=3, description="stages of the convolutional network, each halves the grid")
    dropout: Probability = Field(default=0.1, description="dropout before the output layer")
    autoregressive: bool = Field(
        default=True, description="a level of a category also depends on the tokens of the levels before it"
    )
    num_epochs: PositiveInt = Field(default=50, description="passes over the training rows")
    batch_size: PositiveInt = Field(default=128, description="rows per step")
    learning_rate: PositiveFloat = Field(default=1e-3, description="highest learning rate of the cosine schedule")
    weight_decay: NonNegativeFloat = Field(default=0.05, description="weight decay of AdamW")
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.1, description="share of the rows other than test rows by which the best epoch is chosen"
    )
    test_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.1,
        description="share of rows that are only measured, where the data have no held-out rows of the tokenizer's run",
    )
    random_seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(default=42, description="seed of all random numbers")


def load_predictor_config(
    path: str | Path | None, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> PredictorConfig:
    """The settings of a YAML file, or the defaults, with overrides such as "num_epochs=5"; raises ConfigError."""
    data = {**({} if path is None else read_yaml(Path(path))), **dict(parse_overrides(overrides))}
    source = "settings" if path is None else str(path)
    try:
        config = PredictorConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(*(f"{source}: {line}" for line in describe_problems(error, data, PredictorConfig))) from None
    if config.parameters is None and config.fields is None:
        raise ConfigError(f"{source}: parameters and fields are both null: one input is needed")
    return config
