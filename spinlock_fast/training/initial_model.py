"""The checkpoint that a run starts from: what is taken over, and what a configuration may change."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spinlock_fast.checkpoints.directory import checkpoint_hash, load_payload
from spinlock_fast.checkpoints.run_directory import CONFIG
from spinlock_fast.checkpoints.tokenizer_files import Origin
from spinlock_fast.config.families import FamilyConfig
from spinlock_fast.config.loading import check_config, parse_yaml
from spinlock_fast.config.schema import ModelConfig, RunConfig, Section
from spinlock_fast.data.feature_source import FeatureSource
from spinlock_fast.distributed import SINGLE, Ranks
from spinlock_fast.errors import ConfigError, DataError, SpinlockFastError
from spinlock_fast.estimators.rows import check_source
from spinlock_fast.features.encode import FamilyEncoder
from spinlock_fast.features.matrix import MatrixNormalizer
from spinlock_fast.messages import shown
from spinlock_fast.models.input_check import TRAIN, KnownRows
from spinlock_fast.models.token_decoder import TOKEN_DECODER
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# Keys of `model` that a configuration may change: they act on training only.
_TRAINING_KEYS = {"commitment_cost", "decay", "dropout", "decoder_dropout", "rotation_trick"}
_LEVEL_KEYS = ("levels", "compression_ratios", "uniform_codebook_init")
_NO_EFFECT = {"codebook_init"}
# Keys of `training` that determine categories.
_CATEGORY_KEYS = (
    "category_assignment",
    "num_categories_auto",
    "min_features_per_category",
    "max_clusters",
    "isolated_families",
)


@dataclass(frozen=True)
class InitialModel:
    """The tokenizer of a checkpoint whose training is continued, on the same or on other data.

    Args:
        name: directory of the checkpoint, for messages.
        tokenizer: not changed.
        config: settings of its run; None if the checkpoint has none.
    """

    name: str
    tokenizer: Tokenizer
    config: RunConfig | None

    @classmethod
    def load(cls, directory: str | Path, ranks: Ranks = SINGLE) -> InitialModel:
        """Reads a checkpoint directory of this package, which only rank 0 needs to see; raises DataError."""

        def read() -> tuple[dict[str, Any], str, Origin]:
            try:
                payload = load_payload(directory)
                return payload, checkpoint_hash(directory), Origin.read(Path(directory), payload)
            except DataError as error:
                raise DataError(f"training.init_from: {error}") from None

        payload, digest, origin = ranks.on_main(read)
        tokenizer = Tokenizer.from_payload(payload)
        tokenizer.checkpoint_hash, tokenizer.origin = digest, origin
        return cls.of(tokenizer, str(directory))

    @classmethod
    def of(cls, tokenizer: Tokenizer, name: str = "the given tokenizer") -> InitialModel:
        """From a tokenizer in memory; raises ConfigError if its settings cannot be read."""
        text = tokenizer.origin.texts.get(CONFIG)
        try:
            config = None if text is None else check_config(parse_yaml(text) or {}, f"{name}/{CONFIG}")
        except (SpinlockFastError, ValueError, AttributeError) as error:
            raise ConfigError(f"{name}/{CONFIG}: cannot be read: {error}") from None
        if config is not None and text is not None and "nan_fill:" not in text:  # of a version without this setting
            cleaning = config.feature_cleaning.model_copy(update={"nan_fill": "zero"})
            config = config.model_copy(update={"feature_cleaning": cleaning})
        return cls(name, tokenizer, config)

    @property
    def model_config(self) -> CategoricalVQVAEConfig:
        return self.tokenizer.model.config

    def settings(self, config: RunConfig) -> RunConfig:
        """The settings of a run from this checkpoint: features, categories and model are its own.

        Raises:
            ConfigError: a key is set in `config` to another value; one line for each.
        """
        problems: list[str] = []
        model = self._model_settings(config.model, problems)
        families = self._family_settings(config, problems)
        cleaning, categories = config.feature_cleaning, {}
        if self.config is not None:
            cleaning = self.config.feature_cleaning
            problems += self._contradictions("feature_cleaning", config.feature_cleaning, dict(cleaning))
            categories = {key: getattr(self.config.training, key) for key in _CATEGORY_KEYS}
        categories["normalization_method"] = self.tokenizer.normalizer.method
        problems += self._contradictions("training", config.training, categories)
        if problems:
            raise ConfigError(*problems)
        return config.model_copy(
            update={
                "families": families,
                "feature_cleaning": cleaning,
                "model": model,
                "training": config.training.model_copy(update=categories),
            }
        )

    def _model_settings(self, given: ModelConfig, problems: list[str]) -> ModelConfig:
        saved = {key: getattr(self.model_config, key) for key in ModelConfig.model_fields}
        fixed = {key: value for key, value in saved.items() if key not in (*_TRAINING_KEYS, *_LEVEL_KEYS, *_NO_EFFECT)}
        problems += self._contradictions("model", given, fixed)
        levels = {key: getattr(given, key) for key in _LEVEL_KEYS if key in given.model_fields_set}
        if not self._same_codebooks(levels):
            key = next((key for key in levels if levels[key] != saved[key]), _LEVEL_KEYS[0])
            problems.append(
                f"model.{key}: gives other codebooks than {self.name} has, which are kept; leave the key out"
            )
        changed = {key: getattr(given, key) for key in _TRAINING_KEYS & given.model_fields_set}
        return ModelConfig(**{**saved, **changed})

    def _same_codebooks(self, levels: Mapping[str, Any]) -> bool:
        """Whether settings of levels give the codebooks of the checkpoint."""
        try:
            other = CategoricalVQVAEConfig(**{**self.model_config.model_dump(), **levels})
        except ValueError:
            return False
        return other.resolved_levels() == self.model_config.resolved_levels()

    def _family_settings(self, config: RunConfig, problems: list[str]) -> dict[str, FamilyConfig]:
        given = config.families if "families" in config.model_fields_set else {}
        own = {family.name: family for family in self.tokenizer.families}
        problems += [
            f"families.{name}: {self.name} has no such family; it has {', '.join(own)}" for name in given.keys() - own
        ]
        if given:
            problems += [f"families.{name}: required by {self.name}, not given" for name in own if name not in given]
        settings = {}
        for name, family in own.items():
            other = given.get(name, FamilyConfig())
            saved = FamilyConfig(
                encoder=family.encoder_name,  # type: ignore[arg-type]
                encoder_params=family.params,
                dataset=other.dataset or family.dataset,
                standardize=family.center is not None,
            )
            keys = {"standardize"} if other.encoder == "auto" else {"encoder", "standardize"}
            problems += self._contradictions(f"families.{name}", other, {key: getattr(saved, key) for key in keys})
            if other.encoder == saved.encoder:
                params = f"families.{name}.encoder_params"
                problems += self._contradictions(params, other.encoder_params, dict(saved.encoder_params))
            settings[name] = saved
        return settings

    def _contradictions(self, section: str, given: Section, saved: Mapping[str, Any]) -> list[str]:
        """One line for each key that is set explicitly and has another value in the checkpoint."""
        return [
            f"{section}.{key}: {shown(getattr(given, key))}, but {self.name} has {shown(saved[key])}, which is kept: "
            "leave the key out"
            for key in sorted(saved)
            if key in given.model_fields_set and getattr(given, key) != saved[key]
        ]

    def plan(self, frozen: str) -> list[str]:
        """Lines for --dry-run: what is taken over, and what is frozen."""
        tokenizer, quantizer = self.tokenizer, self.tokenizer.model.quantizer
        kept = {"encoders": "category encoders", "codes": "codes", "tokens": "category encoders and codes"}
        return [
            f"init_from: {self.name}: encoders of {len(tokenizer.families)} families, cleaning to "
            f"{len(tokenizer.feature_names)} of {tokenizer.cleaner.keep.size} columns, normalisation, "
            f"{len(self.model_config.group_indices)} categories, {quantizer.layout.groups} codebooks with "
            f"{quantizer.layout.total_codes} codes, and all weights",
            f"freeze: {kept.get(frozen, 'nothing')}",
        ]

    def encoders(self, source: FeatureSource, families: Mapping[str, FamilyConfig]) -> list[FamilyEncoder]:
        """Copies of the encoders for the rows of a source, whose families are checked by shape and column names.

        Raises:
            DataError: a family does not fit; names it.
        """
        check_source(self.tokenizer.families, source)
        encoders = [copy.deepcopy(family) for family in self.tokenizer.families]
        for family in encoders:
            family.dataset = families[family.name].dataset or family.dataset
        return encoders

    def known_rows(self, now: KnownRows) -> KnownRows:
        """The rows of this run and those of the checkpoint's; warns of validation rows that it was trained on."""
        before = self.tokenizer.known_rows
        if before is None:
            return now
        held_out = now.keys[now.splits != TRAIN]
        trained = int((before.splits_of(held_out) == TRAIN).sum())
        if trained:
            log.warning(
                "%d of %d held-out rows are training rows of %s: their errors are not those of unseen data",
                trained,
                len(held_out),
                self.name,
            )
        return now.joined(before)

    def matrix_normalizer(self) -> MatrixNormalizer:
        """The transform of rows in the units of the checkpoint's features to normalised ones."""
        cleaner = self.tokenizer.cleaner
        return MatrixNormalizer(cleaner.low, cleaner.high, self.tokenizer.normalizer)

    def check_features(self, columns: int, names: list[str] | None) -> list[str]:
        """The names of the features of a matrix; raises DataError if it has others than the checkpoint."""
        own = self.tokenizer.feature_names
        if columns != len(own):
            raise DataError(f"x has {columns} columns, but {self.name} has {len(own)} features")
        if names is not None and names != own:
            found, expected = next((a, b) for a, b in zip(names, own, strict=True) if a != b)
            raise DataError(f"feature_names: {shown(found)} instead of {shown(expected)}, as in {self.name}")
        return own

    def check_structure(self, group_indices: Mapping[str, Any] | None, levels: Any) -> None:
        """Raises ConfigError if arguments of `Trainer.fit` ask for other categories or codebooks."""
        own = self.model_config.group_indices
        if group_indices is not None and {n: list(map(int, m)) for n, m in group_indices.items()} != own:
            raise ConfigError(f"group_indices: not the categories of {self.name}, which are kept; leave it out")
        if levels is not None and not self._same_codebooks({"levels": levels}):
            raise ConfigError(f"levels: not the codebooks of {self.name}, which are kept; leave it out")

    def model_settings(self, config: RunConfig) -> CategoricalVQVAEConfig:
        """The configuration of the model that is trained further, given the result of `settings`."""
        return self.model_config.model_copy(update={key: getattr(config.model, key) for key in _TRAINING_KEYS})

    def start(self, model: CategoricalHierarchicalVQVAE, config: RunConfig) -> RunConfig:
        """Sets the weights of a model and freezes what the settings say; returns the settings of its training loop."""
        self._copy_weights(model)
        freeze(model, config.training.freeze)
        if not model.quantizer.frozen:
            return config
        update = {"dead_code_reset_interval": 0, "dead_code_reset_steps": 0}
        return config.model_copy(update={"training": config.training.model_copy(update=update)})

    @torch.no_grad()
    def _copy_weights(self, model: CategoricalHierarchicalVQVAE) -> None:
        """Copies the weights, the codes and the standardisation of extra inputs; a token decoder is fitted anew."""
        state = self.tokenizer.model.state_dict()
        weights = {name: value for name, value in state.items() if not name.startswith(TOKEN_DECODER)}
        model.load_state_dict({**weights, "quantizer.initialized": torch.tensor(True)})
        if model.config.extra_inputs:
            model.error_weight[model.feature_order] = model.input_scale.clamp(max=1.0)


def initial_model(
    config: RunConfig, given: str | Path | Tokenizer | InitialModel | None = None, ranks: Ranks = SINGLE
) -> InitialModel | None:
    """The checkpoint that a run starts from; None if it is trained from scratch.

    Args:
        config: `training.init_from` is used if nothing is given.
        given: checkpoint directory, or tokenizer in memory.

    Raises:
        ConfigError: parts are to be frozen without a checkpoint, or `given` is something else.
        DataError: the checkpoint cannot be read.
    """
    given = config.training.init_from if given is None else given
    if given is None and config.training.freeze != "none":
        raise ConfigError(f"training.freeze: {config.training.freeze} needs training.init_from, whose parts are kept")
    if given is None or isinstance(given, InitialModel):
        return given
    if isinstance(given, Tokenizer):
        return InitialModel.of(given)
    if isinstance(given, (str, Path)):
        return InitialModel.load(given, ranks)
    raise ConfigError(f"init_from: expected a checkpoint directory or a Tokenizer, got {type(given).__name__}")


def freeze(model: CategoricalHierarchicalVQVAE, parts: str) -> None:
    """Excludes parts of a model from training.

    Args:
        parts: "encoders": the category encoders and heads; "codes": the codebooks; "tokens": both; "none": nothing,
            which also undoes an earlier call.
    """
    encoders, codes = parts in ("encoders", "tokens"), parts in ("codes", "tokens")
    for module in (model.category_mlp, model.heads):
        module.requires_grad_(not encoders)
    model.quantizer.freeze(codes)
    for parameter in model.quantizer.parameters():  # codes that are learned by gradient
        parameter.requires_grad_(not codes)


def sampled(count: int, most: int) -> NDArray[np.int64]:
    """At most `most` evenly spaced numbers below `count`."""
    rows = min(count, most)
    return np.arange(rows) * count // max(rows, 1)
