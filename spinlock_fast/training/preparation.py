"""Feature preparation: encoding, cleaning, category discovery and normalisation of a data set."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spinlock_fast.config.schema import RunConfig
from spinlock_fast.data.checksums import fletcher32_of_rows
from spinlock_fast.data.feature_matrix import FeatureMatrix, is_kept_on_disk
from spinlock_fast.data.feature_source import FeatureSource
from spinlock_fast.data.remote_files import RemoteCache
from spinlock_fast.data.row_view import RowView
from spinlock_fast.data.split import Split, split_rows
from spinlock_fast.descriptors.field_grid import FieldGrid
from spinlock_fast.distributed import SINGLE, Ranks
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.features.blocks import TransformedRows, extremes
from spinlock_fast.features.categories import MIN_ROWS, find_categories, read_mapping
from spinlock_fast.features.cleaning import FeatureCleaner, fit_cleaner
from spinlock_fast.features.encode import FamilyEncoder, block_rows, encode_rows, encode_seconds, make_encoders
from spinlock_fast.features.family_layout import resolve_families
from spinlock_fast.features.normalize import Normalizer, fit_normalizer
from spinlock_fast.features.statistics import mean_and_std
from spinlock_fast.models.input_check import KnownRows, RowStatistic, outside_share
from spinlock_fast.models.reference_statistics import (
    REFERENCE_ROWS,
    ReferenceStatistics,
    evenly_spaced,
    normalized_bounds,
)
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE
from spinlock_fast.training.initial_model import InitialModel
from spinlock_fast.training.observer import Display

_RANGE_ROWS = 10_000  # about how many rows the share of out-of-range features is measured on
_ESTIMATE_ROWS = 10_000  # least rows for which the encoding time is estimated


@dataclass
class PreparedFeatures:
    """The model's input features, and the fitted transforms that produced them."""

    x: NDArray[np.float32]  # [N, F], cleaned and normalised
    encoders: list[FamilyEncoder]
    cleaner: FeatureCleaner
    normalizer: Normalizer
    groups: dict[str, list[int]]
    feature_names: list[str]
    columns: int  # before cleaning
    seconds: dict[str, float]  # per stage
    known_rows: KnownRows
    low: NDArray[np.float64]  # [F] range of the training rows before clipping, see `TrainingRange`
    high: NDArray[np.float64]
    outside: RowStatistic
    missing: dict[str, int]  # missing raw values by family
    raw_values: dict[str, int]  # all raw values by family
    field_grid: FieldGrid | None  # of the fields that `extract` described
    on_disk: bool = False  # x is a map of a scratch file
    initial: InitialModel | None = None

    def checkpoint_entries(self) -> dict[str, Any]:
        """The entries of a model file that do not come from the model."""
        cleaning = self.cleaner.state()
        return {
            "encoder_state_dicts": {family.name: family.state() for family in self.encoders},
            "feature_mask": cleaning.pop("keep"),
            "feature_cleaning": cleaning,
            "normalization": self.normalizer.state(),
            "feature_names": self.feature_names,
            "known_rows": self.known_rows.state(),
            "field_grid": None if self.field_grid is None else self.field_grid.state(),
        }

    def reference_statistics(self, model: CategoricalHierarchicalVQVAE, split: Split) -> ReferenceStatistics:
        """Distributions of the training and validation rows as the model sees them."""
        rows, bounds = RowView(self.x), normalized_bounds(self.cleaner, self.normalizer)
        used = evenly_spaced(np.sort(np.concatenate([split.train, split.val])), REFERENCE_ROWS)
        held_out = evenly_spaced(np.sort(split.val), REFERENCE_ROWS)
        missing = {name: (self.missing.get(name, 0), count) for name, count in self.raw_values.items()}
        return ReferenceStatistics.of(model, self.feature_names, bounds, rows[used], rows[held_out], missing)

    def fingerprint(self, ranks: Ranks = SINGLE) -> dict[str, Any]:
        """What `check_same_features` compares when a run is resumed; all ranks must call it."""
        rows = RowView(self.x)
        mean, std = mean_and_std(rows, ranks)
        return {
            "shape": list(self.x.shape),
            "fletcher32": fletcher32_of_rows(rows, ranks),
            "mean": torch.from_numpy(mean),
            "std": torch.from_numpy(std),
            "feature_names": self.feature_names,
            "group_indices": self.groups,
            "init_from": None if self.initial is None else self.initial.tokenizer.checkpoint_hash,
        }


def open_source(config: RunConfig, ranks: Ranks = SINGLE) -> FeatureSource:
    """The configured data, whose files rank 0 opens for all; raises DataError, or ConfigError without dataset_path."""
    if config.dataset_path is None:
        raise ConfigError("dataset_path: required, not given; name an HDF5 file, a glob or a list of files")
    remote_dir = None if config.data.remote_cache_dir is None else Path(config.data.remote_cache_dir)
    return FeatureSource(
        config.dataset_path,
        resolve_families(config).datasets(),
        allow_external=config.data.allow_external,
        manifest_dir=config.data.manifest_dir,
        remote_cache=RemoteCache(remote_dir, config.data.remote_cache_size),
        ranks=ranks,
    )


def prepare(
    source: FeatureSource,
    config: RunConfig,
    device: torch.device,
    display: Display,
    scratch: Path | None = None,
    ranks: Ranks = SINGLE,
    initial: InitialModel | None = None,
) -> PreparedFeatures:
    """Encodes, cleans, groups and normalises the rows of a source.

    Cleaning, categories and normalisation are fitted to the training rows. Every rank encodes a part of the rows and
    returns the same features, which do not depend on the number of ranks.

    Args:
        scratch: existing directory for a file of the features where they are kept on disk, see `data.feature_matrix`;
            all ranks share it. None: the directory for temporary files.
        ranks: the processes of the run; all must call the function.
        initial: the encoders, cleaning, categories and normalisation of this checkpoint are used; nothing is fitted.

    Raises:
        ConfigError, DataError: a setting or the data cannot be used; checked before the data are read if possible.
        OutputError: the disk has no space for the features.
    """
    timer = _StageTimer()
    split = split_rows(source.rows, config.training, config.random_seed)
    least = MIN_ROWS if initial is None else 2
    if split.train.size < least:
        raise DataError(f"{source.rows} rows leave {split.train.size} to train on: at least {least} are needed")
    if config.training.mapping_file is not None and initial is None:
        read_mapping(config.training.mapping_file)
    for info in source.datasets.values():
        block_rows(info, config.memory_budget)
    training_rows = split.train if config.feature_cleaning.nan_fill == "median" and initial is None else None
    encoders = (
        make_encoders(source, config.families, config.random_seed, config.memory_budget, training_rows)
        if initial is None
        else initial.encoders(source, config.families)
    )
    names = [name for family in encoders for name in family.names]
    matrix = _feature_matrix(source.rows, len(names), config, scratch, ranks)
    display.stage(_encoding_text(source, encoders, config, device))
    encoded = encode_rows(source, encoders, config.memory_budget, device, display.encoded, training_rows, matrix, ranks)
    known_rows, missing = KnownRows.of(encoded.keys, split.val, split.test), encoded.missing
    known_rows = known_rows if initial is None else initial.known_rows(known_rows)
    del encoded
    timer.lap("load_encode")
    display.stage(f"cleaning {len(names)} columns")
    train = RowView(matrix.x, split.train)
    cleaner = fit_cleaner(train, config.feature_cleaning, ranks) if initial is None else initial.tokenizer.cleaner
    low, high, outside = training_range(matrix.x, split, cleaner, ranks)
    kept_names = [name for name, keep in zip(names, cleaner.keep, strict=True) if keep]
    kept_names = kept_names if initial is None else initial.tokenizer.feature_names
    cleaned = TransformedRows(train, lambda block: np.ascontiguousarray(cleaner(block)), len(kept_names))
    timer.lap("clean")
    if initial is None:
        display.stage(f"discovering categories of {len(kept_names)} features")
        groups = ranks.on_main(lambda: find_categories(cleaned, kept_names, config))
        timer.lap("discover")
        normalizer = fit_normalizer(cleaned, config.training.normalization_method, ranks)
    else:
        groups, normalizer = initial.model_config.group_indices, initial.tokenizer.normalizer
    matrix.rewrite(lambda block: normalizer(cleaner(block)), len(kept_names))
    if config.data.feature_matrix == "memory":
        matrix.to_memory()
    timer.lap("clean")
    return PreparedFeatures(
        x=matrix.x,
        encoders=encoders,
        cleaner=cleaner,
        normalizer=normalizer,
        groups=groups,
        feature_names=kept_names,
        columns=len(names),
        seconds=timer.seconds,
        known_rows=known_rows,
        low=low,
        high=high,
        outside=outside,
        missing=missing,
        raw_values={name: info.rows * math.prod(info.row_shape) for name, info in source.datasets.items()},
        on_disk=matrix.on_disk,
        field_grid=FieldGrid.of_files(source.files),
        initial=initial,
    )


def _feature_matrix(rows: int, columns: int, config: RunConfig, scratch: Path | None, ranks: Ranks) -> FeatureMatrix:
    on_disk = is_kept_on_disk(rows, columns, config.data.feature_matrix, config.memory_budget, ranks)
    return FeatureMatrix(rows, columns, (scratch or Path(tempfile.gettempdir())) if on_disk else None, ranks)


def _encoding_text(
    source: FeatureSource, encoders: list[FamilyEncoder], config: RunConfig, device: torch.device
) -> str:
    """Description of the stage, with its size and duration if there are many rows."""
    text = f"encoding {source.rows:,} samples of {len(encoders)} families"
    if source.rows < _ESTIMATE_ROWS:
        return text
    seconds = encode_seconds(source, encoders, config.memory_budget, device)
    size = sum(info.rows * info.row_bytes for info in source.datasets.values()) / 1e9
    return f"{text}: {size:.3g} GB, about {seconds:.0f} s"


def training_range(
    columns: NDArray[np.float32], split: Split, cleaner: FeatureCleaner, ranks: Ranks = SINGLE
) -> tuple[NDArray[np.float64], NDArray[np.float64], RowStatistic]:
    """The range of the training rows, and the share of features outside it; see `TrainingRange`.

    Args:
        columns: [N, C] columns of all rows before cleaning.
    """
    low, high = cleaner.low.copy(), cleaner.high.copy()
    if not np.isfinite(low).all() or not np.isfinite(high).all():
        kept = TransformedRows(RowView(columns, split.train), cleaner.select, low.size)
        for bound, extreme in zip((low, high), extremes(kept, ranks), strict=True):
            np.copyto(bound, extreme, where=~np.isfinite(bound))
    rows = np.sort(np.concatenate([split.train, split.val]))
    sample = RowView(columns, rows[:: max(1, len(rows) // _RANGE_ROWS)])
    return low, high, RowStatistic.of(outside_share(cleaner.select(sample[:]), low, high))


class _StageTimer:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Adds the seconds since the last lap to a stage."""
        now = time.perf_counter()
        self.seconds[name], self._last = self.seconds.get(name, 0.0) + now - self._last, now
