"""The main job: an HDF5 file in, a checkpoint directory out."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from spinlock_fast import _native
from spinlock_fast.checkpoint import (
    BEST,
    CONFIG,
    FILES,
    FINAL,
    RESUME,
    Staging,
    load_torch,
    plain,
    save_torch,
    write_results,
)
from spinlock_fast.config import RunConfig
from spinlock_fast.config_file import dump_config
from spinlock_fast.data.source import Source
from spinlock_fast.errors import ConfigError, DataError, Interrupted, OutputError
from spinlock_fast.features.categories import MIN_ROWS, read_mapping
from spinlock_fast.features.cleaning import FeatureCleaner, fit_cleaner
from spinlock_fast.features.encode import FamilyEncoder, block_rows, encode_rows, encode_seconds, make_encoders
from spinlock_fast.features.normalize import Normalizer, fit_normalizer
from spinlock_fast.features.statistics import mean_and_std
from spinlock_fast.files import check_writable, write_text
from spinlock_fast.input_check import KnownRows, Spread, TrainingRange, outside_share, row_errors
from spinlock_fast.loop import EpochRecord, Observer
from spinlock_fast.metrics import Metrics
from spinlock_fast.trainer import (
    Split,
    Trainer,
    find_categories,
    resolve_device,
    split_rows,
    units,
)

log = logging.getLogger(__name__)

# What may differ between a run and the one that resumes it.
_FREE_TO_CHANGE = {
    "dataset_path",
    "output_dir",
    "memory_budget",
    "device",
    "logging",
    "training.num_epochs",
    "training.save_every",
    "training.early_stopping_patience",
    "training.use_torch_compile",
    "training.cuda_graphs",
    "training.data_on_device",
    "training.checkpoint_dir",
}


_RANGE_ROWS = 10_000  # that tell how many features lie outside the range of training
_ESTIMATE_ROWS = 10_000  # from here on the time to encode is worth an estimate


class Display(Observer, Protocol):
    """What a run shows while it works."""

    def stage(self, text: str) -> None: ...

    def encoded(self, family: str, done: int, rows: int) -> None: ...


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
        display: hears of progress.
        resume: directory of an interrupted run (or a finished one, to train it longer).

    Raises:
        ConfigError, DataError, OutputError, TrainingError: each with one line.
        Interrupted: by SIGINT or SIGTERM; what can be resumed has been saved.
    """
    started = time.perf_counter()
    directory = output_directory(config)
    device = resolve_device(config.device)
    with _Signals(resume) as signals:
        state = read_resumable(resume, config) if resume is not None else None
        with open_source(config) as source:
            check_writable(directory)
            prepared = prepare(source, config, device, display)
        features = fingerprint(prepared)
        if state is not None:
            _check_same_features(state["features"], features)
        if state is None or resume is None or not _same_place(resume, directory):
            set_aside_earlier_run(directory)
        write_text(directory / CONFIG, dump_config(config))
        keeper = _Keeper(display, directory, features, config)
        trainer = Trainer(config, keeper)
        signals.trainer = trainer
        display.stage("training")
        with _advice_to_resume(directory), keeper:
            result = trainer.fit(
                prepared.x,
                prepared.groups,
                feature_names=prepared.feature_names,
                normalize=False,
                resume=state["run"] if state is not None else None,
            )
        train_seconds = result.metrics["seconds"]["train"]
        metrics = result.metrics
        metrics |= {"missing_values": prepared.missing, "units": units(config.training)}
        errors = Spread.of(row_errors(result.model, prepared.x, result.split.val))
        known_range = TrainingRange(prepared.low, prepared.high, prepared.outside, errors)
        metrics["seconds"] = {
            **prepared.seconds,
            "train": train_seconds,
            "total": time.perf_counter() - started,
        }
        write_results(
            directory,
            config,
            result.model,
            {
                **prepared.parts(),
                "training_range": known_range.state(),
                "code_usage": result.model.quantizer.usage,
                "code_usage_rows": int(result.model.quantizer.rows_seen),
            },
            prepared.normalizer.by_category(result.model.config.group_indices),
            metrics,
            {"best_epoch": result.best_epoch, "epochs": [vars(record) for record in result.history]},
            keeper.resumable(result.final_state),
        )
        (directory / RESUME).unlink(missing_ok=True)
    return Outcome(directory, metrics)


def output_directory(config: RunConfig) -> Path:
    """Where the run writes; raises ConfigError where it is not set."""
    name = config.output_dir or config.training.checkpoint_dir
    if name is None:
        raise ConfigError("output_dir: not set")
    return Path(name)


def open_source(config: RunConfig) -> Source:
    """The configuration's data; raises DataError, or ConfigError where dataset_path is not set."""
    if config.dataset_path is None:
        raise ConfigError("dataset_path: required, not given; name an HDF5 file, a glob or a list of files")
    return Source(config.dataset_path, config.datasets())


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
    kept = cleaner.kept(columns)
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


def _same_place(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def _check_same_features(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    same_kind = all(saved[key] == now[key] for key in ("shape", "feature_names", "group_indices"))
    if not same_kind or not all(np.allclose(saved[key], now[key], rtol=1e-3, atol=1e-4) for key in ("mean", "std")):
        raise DataError("the features are not those of the interrupted run: the data or the encoders have changed")
    if saved["fletcher32"] != now["fletcher32"]:
        log.warning(
            "features differ in rounding from the interrupted run (another processor, thread count or library?): "
            "the result will not be bit-identical to an unbroken run"
        )


def read_resumable(directory: Path, config: RunConfig) -> dict[str, Any]:
    """The saved state of a run, checked against the settings that want to go on with it.

    Raises:
        DataError: there is nothing to resume.
        ConfigError: a setting differs that the result depends on.
    """
    if (directory / RESUME).exists():
        state = load_torch(directory / RESUME)
    elif (directory / FINAL).exists():
        state = load_torch(directory / FINAL).get("run_state", {})
    else:
        raise DataError(f"{directory}: nothing to resume, neither {RESUME} nor {FINAL} is there")
    if not {"run", "features", "config"} <= state.keys() or "values" not in state["run"]:
        raise DataError(f"{directory}: the saved state is incomplete, or of another version")
    old, new = _flat(state["config"]), _flat(config.model_dump(mode="json"))
    old.setdefault("feature_cleaning.nan_fill", "zero")  # what runs did before there was the setting
    for key in old.keys() | new.keys():
        if old.get(key) != new.get(key) and not any(
            key == free or key.startswith(f"{free}.") for free in _FREE_TO_CHANGE
        ):
            raise ConfigError(f"{key}: {new.get(key)!r}, but the run to resume was started with {old.get(key)!r}")
    return state


def set_aside_earlier_run(directory: Path) -> None:
    """Moves the files of an earlier run into `previous/`, in place of those that were there."""
    earlier = [directory / name for name in FILES if (directory / name).exists()]
    if not any(path.name in (BEST, FINAL, RESUME) for path in earlier):
        return
    aside = directory / "previous"
    try:
        aside.mkdir(exist_ok=True)
        for name in FILES:
            if (aside / name).is_dir():
                shutil.rmtree(aside / name)
            else:
                (aside / name).unlink(missing_ok=True)
        for path in earlier:
            os.replace(path, aside / path.name)
    except OSError as error:
        raise OutputError(f"{directory}: cannot set the earlier run aside: {error.strerror}") from None
    log.warning("%s holds an earlier run: moved to %s", directory, aside)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


@contextmanager
def _advice_to_resume(directory: Path) -> Iterator[None]:
    try:
        yield
    except Interrupted as stopped:
        raise Interrupted(
            f"{stopped}; go on with the same command and --resume {directory}", stopped.exit_status - 128
        ) from None


class _Keeper:
    """Passes news to the display and writes resumable states, each in a thread beside the training.

    A context manager: at its end the last state is on the disk.
    """

    def __init__(self, display: Display, directory: Path, features: dict[str, Any], config: RunConfig) -> None:
        self.display = display
        self.directory = directory
        self.features = features
        self.config = config
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[None] | None = None
        self._staging = Staging()

    def __enter__(self) -> _Keeper:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._wait()
        finally:
            self._writer.shutdown()

    def training_started(self, epochs: int, first_epoch: int, rows: int) -> None:
        self.display.training_started(epochs, first_epoch, rows)

    def epoch_finished(self, record: EpochRecord) -> None:
        self.display.epoch_finished(record)

    def save(self, state: dict[str, Any]) -> None:
        """Starts to write a state; raises OutputError where the one before could not be written."""
        self._wait()
        kept = self.resumable(self._staging(state))
        self._written = self._writer.submit(save_torch, self.directory / RESUME, kept)

    def resumable(self, state: dict[str, Any]) -> dict[str, Any]:
        """What `read_resumable` takes."""
        return {
            "run": plain(state),
            "features": self.features,
            "config": self.config.model_dump(mode="json"),
        }

    def _wait(self) -> None:
        if self._written is not None:
            written, self._written = self._written, None
            written.result()


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


class _Signals:
    """Turns SIGINT and SIGTERM into Interrupted: at once before training, after the step during it."""

    def __init__(self, resume: Path | None) -> None:
        self.trainer: Trainer | None = None
        self._resume = resume
        self._old: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.trainer is not None:
            self.trainer.stop(number)  # a second signal finds the state being saved, and waits for it like the first
        elif self._resume is not None:
            raise Interrupted(f"interrupted before the first step; --resume {self._resume} still works", number)
        else:
            raise Interrupted("interrupted before the first step: there is nothing to resume", number)
