"""Settings of feature families and of their encoders."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from spinlock_fast.config.section import PositiveInt, Probability, Section


class MLPEncoderParams(Section):
    hidden_dims: list[PositiveInt] = Field(default=[512, 256], description="width of each hidden layer")
    output_dim: PositiveInt = Field(default=128, description="number of output columns")
    dropout: Probability = Field(default=0.1, description="no effect, since encoders are in eval mode")
    activation: Literal["relu", "gelu", "silu", "tanh"] = Field(default="relu", description="non-linearity")
    batch_norm: bool = Field(default=True, description="BatchNorm after each linear layer")


class TemporalCNNEncoderParams(Section):
    embedding_dim: PositiveInt = Field(default=128, description="number of output columns")
    architecture: Literal["resnet1d_3"] = Field(default="resnet1d_3", description="network architecture")


class AutoEncoderParams(Section):
    pass


class IdentityEncoderParams(Section):
    pass


class StatisticsEncoderParams(Section):
    pass


EncoderParams = (
    AutoEncoderParams | MLPEncoderParams | TemporalCNNEncoderParams | IdentityEncoderParams | StatisticsEncoderParams
)

ENCODER_PARAMS: dict[str, type[EncoderParams]] = {
    "auto": AutoEncoderParams,
    "MLPEncoder": MLPEncoderParams,
    "TemporalCNNEncoder": TemporalCNNEncoderParams,
    "IdentityEncoder": IdentityEncoderParams,
    "StatisticsEncoder": StatisticsEncoderParams,
}

DEFAULT_DATASETS = {
    "summary": "features/summary/aggregated/features",
    "temporal": "features/temporal/features",
    "architecture": "features/architecture/aggregated/features",
}


class FamilyConfig(Section):
    encoder: Literal["auto", "MLPEncoder", "TemporalCNNEncoder", "IdentityEncoder", "StatisticsEncoder"] = Field(
        default="auto",
        description="from the family's raw values to columns; MLPEncoder and TemporalCNNEncoder are random networks; "
        "auto: StatisticsEncoder for time series [N, T, D], IdentityEncoder for at most 1,024 values, else MLPEncoder",
    )
    encoder_params: EncoderParams = Field(default=None, validate_default=True, description="settings of the encoder")
    dataset: str | None = Field(
        default=None,
        description="path in the HDF5 file; null: the dataset of the group features/NAME",
    )
    standardize: bool = Field(
        default=False,
        description="standardise raw columns before encoding, by median and MAD, clipped at +/- 10",
    )

    @field_validator("encoder_params", mode="before")
    @classmethod
    def _params_of_the_named_encoder(cls, value: Any, info: ValidationInfo) -> Any:
        kind = ENCODER_PARAMS.get(info.data.get("encoder", ""))
        if kind is None:  # the unknown encoder is reported instead
            return IdentityEncoderParams()
        return value if isinstance(value, kind) else kind.model_validate({} if value is None else value)


def default_families() -> dict[str, FamilyConfig]:
    return {
        "summary": FamilyConfig(encoder="MLPEncoder", encoder_params=MLPEncoderParams()),
        "temporal": FamilyConfig(encoder="TemporalCNNEncoder", encoder_params=TemporalCNNEncoderParams()),
        "architecture": FamilyConfig(encoder="IdentityEncoder"),
    }


AUTO: dict[str, FamilyConfig] = {}  # `families: auto`, until they are found in the file


def parse_families(value: Any) -> Any:
    """The text "auto" as `AUTO`; raises ValueError for no family."""
    if value == "auto":
        return AUTO
    if isinstance(value, str):
        raise ValueError("expected auto, or a section for each family")
    if isinstance(value, dict) and not value:
        raise ValueError("at least 1 family, or auto, is required")
    return value
