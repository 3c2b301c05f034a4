"""Trains a tokenizer in memory: arrays or HDF5 files in, a `Tokenizer` out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from spinlock_fast.checkpoints.tokenizer_files import Origin
from spinlock_fast.config.families import AUTO, DEFAULT_DATASETS, FamilyConfig
from spinlock_fast.config.loading import load_config, make_config
from spinlock_fast.config.random_streams import VERSION, streams_of
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.data.array_source import ArraySource
from spinlock_fast.data.feature_source import FeatureSource
from spinlock_fast.device import resolve_device
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.estimators.rows import is_path, named_families
from spinlock_fast.estimators.transformer import MATRIX
from spinlock_fast.features.family_layout import resolve_families, with_encoder, with_families
from spinlock_fast.features.normalize import units
from spinlock_fast.models.input_check import RowStatistic, TrainingRange, row_errors
from spinlock_fast.tokenizer import Tokenizer
from spinlock_fast.training.initial_model import InitialModel, initial_model
from spinlock_fast.training.observer import Display
from spinlock_fast.training.preparation import open_source, prepare
from spinlock_fast.training.trainer import Trainer


def train_tokenizer(data: Any, config: RunConfig, display: Display, *, matrix: bool = False) -> Tokenizer:
    """Trains on arrays or HDF5 files.

    Args:
        data: {family: array [N, D] or [N, T, D]}, or a path, a glob or a list of files.
        config: settings; families that it does not name explicitly are chosen by the data.
        display: receives stages, epochs and states.
        matrix: the only family is a matrix of which no correlated column is dropped by default, so that every column
            can be reconstructed.

    Returns:
        The tokenizer, on the device of the training.

    Raises:
        ConfigError, DataError, TrainingError: each with one line.
    """
    started = time.perf_counter()
    device = resolve_device(config.device)
    initial = initial_model(config)
    if matrix and initial is None and "deduplicate_threshold" not in config.feature_cleaning.model_fields_set:
        cleaning = config.feature_cleaning.model_copy(update={"deduplicate_threshold": 1.0})
        config = config.model_copy(update={"feature_cleaning": cleaning})
    source, config = _open(data, config, initial)
    with closing(source), streams_of(VERSION):
        prepared = prepare(source, config, device, display, initial=initial)
    display.stage("training")
    result = Trainer(config, display).fit(
        prepared.x, prepared.groups, feature_names=prepared.feature_names, normalize=False, init_from=initial
    )
    display.training_finished()
    seconds = {**prepared.seconds, "train": result.metrics["seconds"]["train"], "total": time.perf_counter() - started}
    result.metrics |= {"seconds": seconds, "missing_values": prepared.missing, "units": units(config.training)}
    history = {"best_epoch": result.best_epoch, "epochs": [vars(record) for record in result.history]}
    errors = RowStatistic.of(row_errors(result.model, prepared.x, result.split.val))
    reference = prepared.reference_statistics(result.model, result.split).model_dump_json()
    return Tokenizer.from_parts(
        result.model,
        prepared.encoders,
        prepared.cleaner,
        prepared.normalizer,
        prepared.feature_names,
        checkpoint_hash="",
        known_rows=prepared.known_rows,
        field_grid=prepared.field_grid,
        training_range=TrainingRange(prepared.low, prepared.high, prepared.outside, errors),
        metrics=result.metrics,
        origin=Origin.of_run(config, result.metrics, history, result.vocabulary, reference),
    ).to(device)


def run_config(config: Any, settings: Mapping[str, Any]) -> RunConfig:
    """The settings of `Tokenizer.fit`.

    Args:
        config: YAML file, `RunConfig`, sections as a mapping, or None for the defaults.
        settings: values by dotted key.

    Raises:
        ConfigError: a setting is wrong.
    """
    if isinstance(config, (str, Path)):
        return load_config(config, settings)
    if config is None:
        return make_config({}, settings)
    if isinstance(config, RunConfig):
        return make_config(config.model_dump(mode="json", exclude_unset=True), settings)
    if isinstance(config, Mapping):
        return make_config(config, settings)
    raise ConfigError(f"config: expected a YAML file, a RunConfig or sections, got {type(config).__name__}")


def _open(data: Any, config: RunConfig, initial: InitialModel | None) -> tuple[FeatureSource, RunConfig]:
    """The source of the rows, and the settings with its families, which are those of `initial` if there is one."""
    if initial is not None:
        config = initial.settings(config)
    chosen = config.families if "families" in config.model_fields_set else AUTO
    if is_path(data):
        paths = [str(part) for part in data] if isinstance(data, list) else str(data)
        config = resolve_families(config.model_copy(update={"dataset_path": paths, "families": chosen}))
        return open_source(config), config
    arrays, columns = named_families(data)
    if initial is not None and list(arrays) == [MATRIX] and len(chosen) == 1:
        arrays, columns = ({name: part[MATRIX] for name in chosen if MATRIX in part} for part in (arrays, columns))
    names = list(arrays)
    if chosen and set(chosen) != set(names):
        raise DataError(f"the configuration has the families {', '.join(chosen)}, but the data {', '.join(names)}")
    families = {name: chosen.get(name, FamilyConfig()) for name in names}
    paths_by_name = {
        name: family.dataset or DEFAULT_DATASETS.get(name, f"features/{name}/features")
        for name, family in families.items()
    }
    source = ArraySource(arrays, paths_by_name, columns)
    resolved = {
        name: with_encoder(family, source.datasets[name].row_shape, paths_by_name[name])
        for name, family in families.items()
    }
    return source, with_families(config.model_copy(update={"dataset_path": None}), resolved)
