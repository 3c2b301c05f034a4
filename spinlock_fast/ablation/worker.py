"""A worker process, and its tasks: to encode features, and to train on them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from spinlock_fast.ablation.plan import Run
from spinlock_fast.ablation.records import Record, write_record
from spinlock_fast.checkpoints.directory import CONFIG
from spinlock_fast.checkpoints.run_directory import METRICS, RunDirectory
from spinlock_fast.config.loading import dump_config
from spinlock_fast.config.random_streams import VERSION
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.device import resolve_device
from spinlock_fast.errors import OutputError, SpinlockFastError, TrainingError, is_out_of_memory
from spinlock_fast.features.normalize import units
from spinlock_fast.messages import one_line
from spinlock_fast.output.atomic_files import write_json, write_text
from spinlock_fast.training.async_checkpointer import AsyncCheckpointer
from spinlock_fast.training.observer import EpochRecord, SilentDisplay, SilentObserver
from spinlock_fast.training.preparation import PreparedFeatures, open_source, prepare
from spinlock_fast.training.result import TrainResult
from spinlock_fast.training.run import write_result
from spinlock_fast.training.trainer import Trainer


class Task(Protocol):
    """Work for a worker process; it is pickled."""

    def perform(self, device: str, reply: Reply) -> object:
        """The result, which is pickled; raises SpinlockFastError."""


@dataclass(frozen=True)
class PrepareTask:
    """Encode, clean and normalise features; the answer is the pickled `PreparedFeatures` without its matrix.

    Attributes:
        config: settings.
        matrix: NumPy file that the matrix is written to.
    """

    config: RunConfig
    matrix: Path

    def perform(self, device: str, reply: Reply) -> bytes:
        """Performs the task."""
        with open_source(self.config) as source:
            prepared = prepare(source, self.config, resolve_device(device), _Observer(reply), self.matrix.parent)
        try:
            np.save(self.matrix, prepared.x)
        except OSError as error:
            raise OutputError(f"{self.matrix}: cannot be written: {error.strerror or error}") from None
        for family in prepared.encoders:
            family.to(torch.device("cpu"))
        empty = np.zeros((0, prepared.x.shape[1]), np.float32)
        return pickle.dumps(replace(prepared, x=empty, on_disk=False))


@dataclass(frozen=True)
class RunTask:
    """Train on prepared features; the answer is the `Record`."""

    run: Run
    matrix: Path
    prepared: bytes
    keep_checkpoint: bool

    def perform(self, device: str, reply: Reply) -> Record:
        """Performs the task."""
        run = self.run
        config = run.config.model_copy(update={"device": device})
        # Private pages: torch refuses arrays that cannot be written.
        prepared = replace(pickle.loads(self.prepared), x=np.load(self.matrix, mmap_mode="c"))
        trainer = Trainer(config, _Observer(reply))
        with RunDirectory(run.directory) as output:
            result = trainer.fit(prepared.x, prepared.groups, feature_names=prepared.feature_names, normalize=False)
            metrics = result.metrics
            metrics |= {"missing_values": prepared.missing, "units": units(config.training)}
            if self.keep_checkpoint:
                _write_checkpoint(output, config, prepared, result)
            else:
                write_json(run.directory / METRICS, metrics)
            record = Record.of(run, metrics, time.strftime("%Y-%m-%d"))
            write_record(run.directory, record)
        return record


@dataclass(frozen=True)
class Progress:
    """An epoch was finished."""

    epoch: int
    epochs: int


@dataclass(frozen=True)
class Warned:
    """A warning was logged."""

    text: str


@dataclass(frozen=True)
class Done:
    """A task was finished."""

    value: Any


@dataclass(frozen=True)
class Failed:
    """A task raised an error."""

    error: SpinlockFastError


def serve(connection: Connection, device: str, threads: int) -> None:
    """Performs tasks until the connection is closed.

    Args:
        connection: to the parent process; receives tasks, sends `Progress`, `Warned`, and a `Done` or `Failed` each.
        device: device of all tasks.
        threads: CPU threads.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    reply = Reply(connection)
    logger = logging.getLogger("spinlock_fast")
    logger.addHandler(_WarningHandler(reply))
    logger.propagate = False
    with suppress(EOFError, ConnectionError):  # the parent ended
        while True:
            reply(_answer(connection.recv(), device, reply))


def _answer(task: Task, device: str, reply: Reply) -> Done | Failed:
    try:
        return Done(task.perform(device, reply))
    except SpinlockFastError as error:
        return Failed(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return Failed(TrainingError(f"out of memory: {one_line(error, 200)}"))


def _exit_with_parent() -> None:
    """Ends this process when its parent has ended, also by SIGKILL."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


class Reply:
    """Sends messages to the parent process, from any thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def __call__(self, message: object) -> None:
        with self._lock:
            self._connection.send(message)


class _WarningHandler(logging.Handler):
    def __init__(self, reply: Reply) -> None:
        super().__init__(logging.WARNING)
        self._reply = reply

    def emit(self, record: logging.LogRecord) -> None:
        self._reply(Warned(record.getMessage()))


class _Observer(SilentDisplay):
    """Sends the number of a finished epoch, at most twice a second."""

    def __init__(self, reply: Reply) -> None:
        self._reply, self._epochs, self._sent = reply, 0, 0.0

    def training_started(self, epochs: int, first_epoch: int, rows: int) -> None:
        self._epochs = epochs

    def epoch_finished(self, record: EpochRecord) -> None:
        if time.monotonic() - self._sent > 0.5:
            self._sent = time.monotonic()
            self._reply(Progress(record.epoch, self._epochs))


def _write_checkpoint(output: RunDirectory, config: RunConfig, prepared: PreparedFeatures, result: TrainResult) -> None:
    """Writes the checkpoint directory that `train` writes."""
    partial = output.begin(resumed=False)
    write_text(partial / CONFIG, dump_config(config))
    with AsyncCheckpointer(SilentObserver(), partial, prepared.fingerprint(), config) as checkpointer:
        resumable = checkpointer.resumable(result.final_state)
    write_result(partial, config, prepared, result, VERSION, resumable)
    output.publish()
