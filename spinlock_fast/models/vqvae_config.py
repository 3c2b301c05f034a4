"""Configuration of the categorical hierarchical VQ-VAE."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from spinlock_fast.config.schema import LevelConfig, ModelConfig, PositiveInt
from spinlock_fast.quantize import resolve_levels

PARTIAL_HIDDEN = 128  # hidden width of the partial decoders
SHARED_HIDDEN = 256  # hidden width of the shared decoder


class CategoricalVQVAEConfig(ModelConfig):
    """Configuration of a model: `ModelConfig` plus the features and their categories.

    Args:
        input_dim: F, number of features.
        group_indices: features of each category; a feature belongs to at most one. Tokens are in the order of the
            categories. A feature in no category is reconstructed from all codes, but not encoded.
        extra_inputs: features in no category that the encoder of a category reads after its own, standardised.
        levels: codebook sizes; None or [] derives them from the number of features, a list applies to all categories,
            a mapping has an entry per category.

    Raises:
        pydantic.ValidationError (a ValueError): a feature is given twice or out of range, or `extra_inputs` names an
            unknown category.
    """

    input_dim: PositiveInt = Field(description="features")
    group_indices: dict[str, list[int]] = Field(min_length=1, description="features of each category")
    extra_inputs: dict[str, list[int]] = Field(default={}, description="features in no category, by their reader")

    @field_validator("levels", mode="before")
    @classmethod
    def _none_is_auto(cls, value: Any) -> Any:
        return [] if value is None else value

    @model_validator(mode="after")
    def _features_partitioned(self) -> CategoricalVQVAEConfig:
        seen = [i for part in (self.group_indices, self.extra_inputs) for members in part.values() for i in members]
        for name, members in self.group_indices.items():
            if not members:
                raise ValueError(f"group_indices.{name}: a category needs at least 1 feature")
        outside = [i for i in seen if not 0 <= i < self.input_dim]
        if outside:
            raise ValueError(f"group_indices: feature {outside[0]} is outside 0..{self.input_dim - 1}")
        unknown = [name for name in self.extra_inputs if name not in self.group_indices]
        if unknown:
            raise ValueError(f"extra_inputs: no category {unknown[0]!r}")
        if len(set(seen)) != len(seen):
            twice = next(i for i in seen if seen.count(i) > 1)
            raise ValueError(f"group_indices: feature {twice} is in two places")
        resolve_levels(self.group_sizes, self.levels, self.compression_ratios)
        return self

    @property
    def group_sizes(self) -> dict[str, int]:
        return {name: len(members) for name, members in self.group_indices.items()}

    @property
    def inputs(self) -> dict[str, list[int]]:
        """Input features of each category's encoder: its own, then its extra inputs."""
        return {name: [*members, *self.extra_inputs.get(name, [])] for name, members in self.group_indices.items()}

    def resolved_levels(self) -> dict[str, list[LevelConfig]]:
        """Codebooks of every category, coarse to fine."""
        return resolve_levels(self.group_sizes, self.levels, self.compression_ratios, self.uniform_codebook_init)

    def parameter_count(self) -> int:
        """Number of weights and code entries, without building the model."""
        levels = [level for category in self.resolved_levels().values() for level in category]
        D, G = sum(level.latent_dim for level in levels), len(levels)
        F, E, H, C = self.input_dim, self.group_embedding_dim, self.group_hidden_dim, len(self.group_indices)
        inputs = sum(len(members) for members in self.inputs.values())
        category_mlp = inputs * H + C * H + C * H * E + 3 * C * E
        heads = E * D + 3 * D
        shared_decoder = D * SHARED_HIDDEN + SHARED_HIDDEN + SHARED_HIDDEN * F + F
        partial_decoders = D * PARTIAL_HIDDEN + G * PARTIAL_HIDDEN + G * PARTIAL_HIDDEN * F + G * F
        codes = sum(level.num_tokens * level.latent_dim for level in levels)
        return category_mlp + heads + shared_decoder + partial_decoders + codes
