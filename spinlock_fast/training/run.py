"""The training pipeline: HDF5 files in, a checkpoint directory out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from spinlock_fast.checkpoints.directory import CONFIG, finite_or_null, write_results
from spinlock_fast.checkpoints.resumable import check_same_features, read_resumable
from spinlock_fast.checkpoints.run_directory import REFERENCE, VOCABULARY, RunDirectory
from spinlock_fast.config.loading import dump_config
from spinlock_fast.config.random_streams import VERSION, streams_of
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.device import resolve_device
from spinlock_fast.distributed import Ranks, current_ranks
from spinlock_fast.errors import ConfigError, Interrupted
from spinlock_fast.features.family_layout import resolve_families
from spinlock_fast.features.normalize import units
from spinlock_fast.interrupts import handle_signals
from spinlock_fast.models.input_check import RowStatistic, TrainingRange, row_errors
from spinlock_fast.models.metrics import Metrics
from spinlock_fast.output.atomic_files import write_json, write_text
from spinlock_fast.training.async_checkpointer import AsyncCheckpointer
from spinlock_fast.training.initial_model import initial_model
from spinlock_fast.training.observer import Display
from spinlock_fast.training.preparation import PreparedFeatures, open_source, prepare
from spinlock_fast.training.result import TrainResult
from spinlock_fast.training.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass
class RunResult:
    """Where a run wrote its checkpoint, and the metrics of its best model."""

    directory: Path
    metrics: Metrics


def run(config: RunConfig, display: Display, resume: Path | None = None) -> RunResult:
    """Trains a tokenizer on the configured data and writes its checkpoint directory.

    Under torchrun all ranks call this; rank 0 writes the directory, which need not be visible to the others.

    Args:
        config: settings; `output_dir` must be set.
        display: shows progress.
        resume: directory of an interrupted run, or of a finished run to be extended.

    Raises:
        ConfigError, DataError, OutputError, TrainingError: each with one line.
        Interrupted: by SIGINT, SIGTERM or SIGHUP; after the first step a resumable state was saved.
    """
    started = time.perf_counter()
    ranks = current_ranks()
    directory = output_directory(config)
    device = resolve_device(config.device)
    signals = _SignalHandler(resume)
    with handle_signals(signals.handle), _output(directory, ranks) as output:
        initial = initial_model(config, ranks=ranks)
        config = resolve_families(config if initial is None else initial.settings(config))
        state = ranks.on_main(lambda: read_resumable(resume, config)) if resume is not None else None
        streams = state["run"].get("streams", 1) if state is not None else VERSION
        with open_source(config, ranks) as source, streams_of(streams):
            prepared = prepare(source, config, device, display, directory, ranks, initial)
        fingerprint = prepared.fingerprint(ranks)
        if state is not None:
            check_same_features(state["features"], fingerprint)
        earlier = state.get("seconds", {}) if state is not None else {}
        stage_seconds = _stage_seconds(earlier, prepared.seconds, started)
        checkpointer: AsyncCheckpointer | None = None
        if output is not None:
            partial = output.begin(resume is not None and resume.resolve() == directory.resolve())
            write_text(partial / CONFIG, dump_config(config))
            checkpointer = AsyncCheckpointer(display, partial, fingerprint, config, stage_seconds)
        trainer = Trainer(config, checkpointer, lambda: signals.number)
        signals.deferred = True
        display.stage("training")
        with _resume_hint(directory), checkpointer or nullcontext():
            result = trainer.fit(
                prepared.x,
                prepared.groups,
                feature_names=prepared.feature_names,
                normalize=False,
                resume=state["run"] if state is not None else None,
                init_from=initial,
            )
        display.training_finished()
        seconds = stage_seconds()
        total = seconds.pop("total")
        result.metrics["seconds"] = {**seconds, "train": result.metrics["seconds"]["train"], "total": total}
        result.metrics |= {"missing_values": prepared.missing, "units": units(config.training)}
        if ranks.size > 1:
            result.metrics["ranks"] = ranks.size
        if output is not None and checkpointer is not None:
            write_result(partial, config, prepared, result, streams, checkpointer.resumable(result.final_state))
            output.publish()
    if signals.number is not None:
        raise Interrupted(f"stopped when the run was done: {directory} is complete", signals.number)
    return RunResult(directory, result.metrics)


@contextmanager
def _output(directory: Path, ranks: Ranks) -> Iterator[RunDirectory | None]:
    """The output directory on rank 0, None on the others; an error of rank 0 is raised on all."""
    with ExitStack() as stack:
        output = None

        def enter() -> None:
            nonlocal output
            output = stack.enter_context(RunDirectory(directory))

        ranks.on_main(enter)
        yield output


def write_result(
    directory: Path,
    config: RunConfig,
    prepared: PreparedFeatures,
    result: TrainResult,
    streams: int,
    resumable: dict[str, Any],
) -> None:
    """Writes the checkpoint files of a finished training; see `write_results`."""
    model = result.model
    errors = RowStatistic.of(row_errors(model, prepared.x, result.split.val))
    entries = {
        **prepared.checkpoint_entries(),
        "streams": streams,
        "training_range": TrainingRange(prepared.low, prepared.high, prepared.outside, errors).state(),
        "code_usage": model.quantizer.usage,
        "code_usage_rows": int(model.quantizer.rows_seen),
    }
    normalization = prepared.normalizer.by_category(model.config.group_indices)
    history = {"best_epoch": result.best_epoch, "epochs": [vars(record) for record in result.history]}
    if result.vocabulary is not None:
        write_json(directory / VOCABULARY, finite_or_null(result.vocabulary))
    reference = prepared.reference_statistics(model, result.split)
    write_text(directory / REFERENCE, reference.model_dump_json())
    write_results(directory, config, model, entries, normalization, result.metrics, history, resumable)


def output_directory(config: RunConfig) -> Path:
    """The checkpoint directory of the run; raises ConfigError if it is not set."""
    if config.output_dir is None:
        raise ConfigError("output_dir: not set")
    return Path(config.output_dir)


def _stage_seconds(
    earlier: Mapping[str, float], stages: Mapping[str, float], started: float
) -> Callable[[], dict[str, float]]:
    """A function that returns the seconds per stage and in total, including those of earlier, interrupted runs."""

    def seconds() -> dict[str, float]:
        now = {**stages, "total": time.perf_counter() - started}
        return {name: earlier.get(name, 0.0) + value for name, value in now.items()}

    return seconds


@contextmanager
def _resume_hint(directory: Path) -> Iterator[None]:
    """Adds to an Interrupted error how the run is resumed."""
    try:
        yield
    except Interrupted as stopped:
        raise Interrupted(
            f"{stopped}; go on with the same command and --resume {directory}", stopped.exit_status - 128
        ) from None


class _SignalHandler:
    """Raises Interrupted on a signal; once `deferred` is set, stores the signal's number instead."""

    def __init__(self, resume: Path | None) -> None:
        self.number: int | None = None
        self.deferred = False
        self._resume = resume

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. Only the first deferred signal is stored."""
        if self.deferred:
            self.number = self.number or number
        elif self._resume is not None:
            raise Interrupted(f"interrupted before the first step; --resume {self._resume} still works", number)
        else:
            raise Interrupted("interrupted before the first step: there is nothing to resume", number)
