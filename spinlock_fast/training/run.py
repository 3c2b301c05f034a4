"""The main job: an HDF5 file in, a checkpoint directory out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spinlock_fast import _native
from spinlock_fast.checkpoints.directory import CONFIG, write_results
from spinlock_fast.checkpoints.resumable import check_same_features, read_resumable
from spinlock_fast.checkpoints.run_directory import RunDirectory
from spinlock_fast.config.loading import dump_config
from spinlock_fast.config.random_streams import VERSION, streams_of
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.data.source import Source
from spinlock_fast.data.split import Split, split_rows
from spinlock_fast.device import resolve_device
from spinlock_fast.errors import ConfigError, DataError, Interrupted
from spinlock_fast.features.categories import MIN_ROWS, read_mapping
from spinlock_fast.features.cleaning import FeatureCleaner, fit_cleaner
from spinlock_fast.features.encode import FamilyEncoder, block_rows, encode_rows, encode_seconds, make_encoders
from spinlock_fast.features.normalize import Normalizer, fit_normalizer, units
from spinlock_fast.features.statistics import mean_and_std
from spinlock_fast.interrupts import handling
from spinlock_fast.models.input_check import KnownRows, Spread, TrainingRange, outside_share, row_errors
from spinlock_fast.models.metrics import Metrics
from spinlock_fast.output.atomic_files import write_text
from spinlock_fast.training.state_keeper import Display, StateKeeper
from spinlock_fast.training.trainer import Trainer, find_categories

log = logging.getLogger(__name__)

_RANGE_ROWS = 10_000  # that tell how many features lie outside the range of training
_ESTIMATE_ROWS = 10_000  # from here on the time to encode is worth an estimate


@dataclass
class Prepared:
    """Features that the model sees, and everything that made them."""

    x: NDArray[np.float32]  # [N, F]
    encoders: list[FamilyEncoder]
    cleaner: FeatureCleaner
    normalizer: Normalizer
    groups: dict[str, list[int]]
    feature_names: list[str]
    columns: int  # before cleaning
    seconds: dict[str, float]
    known_rows: KnownRows
    low: NDArray[np.float64]  # [F] range of the training rows before clipping, see `TrainingRange`
    high: NDArray[np.float64]
    outside: Spread
    missing: dict[str, int]  # missing raw values by family

    def parts(self) -> dict[str, Any]:
        """The entries of a model file besides the model's."""
        cleaning = self.cleaner.state()
        return {
            "encoder_state_dicts": {family.name: family.state() for family in self.encoders},
            "feature_mask": cleaning.pop("keep"),
            "feature_cleaning": cleaning,
            "normalization": self.normalizer.state(),
            "feature_names": self.feature_names,
            "known_rows": self.known_rows.state(),
        }


@dataclass
class Outcome:
    """What a run made."""

    directory: Path
    metrics: Metrics


def run(config: RunConfig, display: Display, resume: Path | None = None) -> Outcome:
    """Trains a tokenizer on the configuration's data and writes its checkpoint directory.

    Args:
        config: settings; `output_dir` must be set.
        display: shows progress.
        resume: directory of an interrupted run (or a finished one, to train it longer).

    Raises:
        ConfigError, DataError, OutputError, TrainingError: each with one line.
        Interrupted: by SIGINT, SIGTERM or SIGHUP; what can be resumed has been saved.
    """
    started = time.perf_counter()
    directory = output_directory(config)
    device = resolve_device(config.device)
    signals = _Signals(resume)
    with handling(signals.handle), RunDirectory(directory) as place:
        state = read_resumable(resume, config) if resume is not None else None
        streams = state["run"].get("streams", 1) if state is not None else VERSION
        with open_source(config) as source, streams_of(streams):
            prepared = prepare(source, config, device, display)
        features = fingerprint(prepared)
        if state is not None:
            check_same_features(state["features"], features)
        partial = place.begin(resume is not None and _same_place(resume, directory))
        write_text(partial / CONFIG, dump_config(config))
        seconds = _added_up(state.get("seconds", {}) if state is not None else {}, prepared.seconds, started)
        keeper = StateKeeper(display, partial, features, config, seconds)
        trainer = Trainer(config, keeper, lambda: signals.number)
        signals.deferred = True
        display.stage("training")
        with _advice_to_resume(directory), keeper:
            result = trainer.fit(
                prepared.x,
                prepared.groups,
                feature_names=prepared.feature_names,
                normalize=False,
                resume=state["run"] if state is not None else None,
            )
        display.training_finished()
        metrics = result.metrics
        metrics |= {"missing_values": prepared.missing, "units": units(config.training)}
        errors = Spread.of(row_errors(result.model, prepared.x, result.split.val))
        known_range = TrainingRange(prepared.low, prepared.high, prepared.outside, errors)
        spent = seconds()
        total = spent.pop("total")
        metrics["seconds"] = {**spent, "train": metrics["seconds"]["train"], "total": total}
        write_results(
            partial,
            config,
            result.model,
            {
                **prepared.parts(),
                "streams": streams,
                "training_range": known_range.state(),
                "code_usage": result.model.quantizer.usage,
                "code_usage_rows": int(result.model.quantizer.rows_seen),
            },
            prepared.normalizer.by_category(result.model.config.group_indices),
            metrics,
            {"best_epoch": result.best_epoch, "epochs": [vars(record) for record in result.history]},
            keeper.resumable(result.final_state),
        )
        place.publish()
    if signals.number is not None:
        raise Interrupted(f"stopped when the run was done: {directory} is complete", signals.number)
    return Outcome(directory, metrics)


def _added_up(
    earlier: Mapping[str, float], stages: Mapping[str, float], started: float
) -> Callable[[], dict[str, float]]:
    """Gives the seconds of each stage and in total, those of the interrupted runs before included."""

    def seconds() -> dict[str, float]:
        now = {**stages, "total": time.perf_counter() - started}
        return {name: earlier.get(name, 0.0) + value for name, value in now.items()}

    return seconds


def _same_place(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def output_directory(config: RunConfig) -> Path:
    """Where the run writes; raises ConfigError where it is not set."""
    if config.output_dir is None:
        raise ConfigError("output_dir: not set")
    return Path(config.output_dir)


def open_source(config: RunConfig) -> Source:
    """The configuration's data; raises DataError, or ConfigError where dataset_path is not set."""
    if config.dataset_path is None:
        raise ConfigError("dataset_path: required, not given; name an HDF5 file, a glob or a list of files")
    return Source(config.dataset_path, config.datasets(), allow_external=config.data.allow_external)


def prepare(source: Source, config: RunConfig, device: torch.device, display: Display) -> Prepared:
    """Encodes, cleans, discovers categories and normalises. All is fitted to the training rows."""
    clock = _Clock()
    split = split_rows(source.rows, config.training, config.random_seed)
    if split.train.size < MIN_ROWS:
        raise DataError(f"{source.rows} rows leave {split.train.size} to train on: at least {MIN_ROWS} are needed")
    # What can be refused without reading the data is refused now.
    if config.training.mapping_file is not None:
        read_mapping(config.training.mapping_file)
    for info in source.datasets.values():
        block_rows(info, config.memory_budget)
    training_rows = split.train if config.feature_cleaning.nan_fill == "median" else None
    encoders = make_encoders(source, config.families, config.random_seed, config.memory_budget, training_rows)
    size = sum(info.rows * info.row_bytes for info in source.datasets.values()) / 1e9
    text = f"encoding {source.rows:,} samples of {len(config.families)} families"
    if source.rows >= _ESTIMATE_ROWS:
        seconds = encode_seconds(source, encoders, config.memory_budget, device)
        text += f": {size:.3g} GB, about {seconds:.0f} s"
    display.stage(text)
    encoded = encode_rows(source, encoders, config.memory_budget, device, display.encoded, training_rows)
    columns = encoded.columns
    known_rows, missing = KnownRows.of(encoded.keys, split.val, split.test), encoded.missing
    del encoded
    names = [name for family in encoders for name in family.names]
    clock.lap("load_encode")
    display.stage(f"cleaning {columns.shape[1]} columns")
    cleaner = fit_cleaner(columns[split.train], config.feature_cleaning)
    kept = cleaner.select(columns)
    width = columns.shape[1]
    del columns  # the raw matrix is no longer needed
    low, high, outside = training_range(kept, split, cleaner)
    cleaned = cleaner.clip(kept)
    kept_names = [name for name, keep in zip(names, cleaner.keep, strict=True) if keep]
    clock.lap("clean")
    display.stage(f"discovering categories of {len(kept_names)} features")
    groups = find_categories(cleaned[split.train], kept_names, config)
    clock.lap("discover")
    normalizer = fit_normalizer(cleaned[split.train], config.training.normalization_method)
    return Prepared(
        x=normalizer(cleaned),
        encoders=encoders,
        cleaner=cleaner,
        normalizer=normalizer,
        groups=groups,
        feature_names=kept_names,
        columns=width,
        seconds=clock.seconds,
        known_rows=known_rows,
        low=low,
        high=high,
        outside=outside,
        missing=missing,
    )


def training_range(
    kept: NDArray[np.float32], split: Split, cleaner: FeatureCleaner
) -> tuple[NDArray[np.float64], NDArray[np.float64], Spread]:
    """The range of the training rows, and the share outside of it; see `TrainingRange`.

    Args:
        kept: [N, F] features of all rows before clipping.
    """
    low, high = cleaner.low.copy(), cleaner.high.copy()
    for bound, extreme in ((low, np.min), (high, np.max)):
        for i in np.flatnonzero(~np.isfinite(bound)):
            bound[i] = extreme(kept[split.train, i])
    rows = np.sort(np.concatenate([split.train, split.val]))
    some = rows[:: max(1, len(rows) // _RANGE_ROWS)]
    return low, high, Spread.of(outside_share(kept[some], low, high))


def fingerprint(prepared: Prepared) -> dict[str, Any]:
    """What tells whether a resumed run sees the same features."""
    x = np.ascontiguousarray(prepared.x)
    mean, std = mean_and_std(x)
    return {
        "shape": list(x.shape),
        "fletcher32": _native.fletcher32(x),
        "mean": torch.from_numpy(mean),
        "std": torch.from_numpy(std),
        "feature_names": prepared.feature_names,
        "group_indices": prepared.groups,
    }


@contextmanager
def _advice_to_resume(directory: Path) -> Iterator[None]:
    try:
        yield
    except Interrupted as stopped:
        raise Interrupted(
            f"{stopped}; go on with the same command and --resume {directory}", stopped.exit_status - 128
        ) from None


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


class _Signals:
    """Turns a signal into Interrupted: at once before training, after a whole step from then on."""

    def __init__(self, resume: Path | None) -> None:
        self.number: int | None = None
        self.deferred = False  # signals are kept in `number`, for who can save before the run ends
        self._resume = resume

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. A second signal finds the state being saved, and waits for it like the first."""
        if self.deferred:
            self.number = self.number or number
        elif self._resume is not None:
            raise Interrupted(f"interrupted before the first step; --resume {self._resume} still works", number)
        else:
            raise Interrupted("interrupted before the first step: there is nothing to resume", number)
