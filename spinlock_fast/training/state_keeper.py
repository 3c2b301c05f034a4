"""Writes resumable states in a thread while training continues."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from spinlock_fast.checkpoints.directory import Staging, plain
from spinlock_fast.checkpoints.resumable import write_state
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.training.observer import EpochRecord, Observer


class Display(Observer, Protocol):
    """What a run shows while it works."""

    def stage(self, text: str) -> None: ...

    def encoded(self, family: str, done: int, rows: int) -> None: ...

    def training_finished(self) -> None:
        """No epoch follows: files of the display, if it has any, are closed."""


class StateKeeper:
    """Passes news to the display and writes resumable states, each in a thread beside the training.

    A context manager: at its end the last state is on the disk.

    Args:
        display: shows the run.
        directory: where the run is built.
        features: fingerprint of the features, see `check_same_features`.
        config: settings of the run.
        seconds: tells what the stages have taken so far.
    """

    def __init__(
        self,
        display: Display,
        directory: Path,
        features: dict[str, Any],
        config: RunConfig,
        seconds: Callable[[], dict[str, float]] = dict,
    ) -> None:
        self.display = display
        self.directory = directory
        self.features = features
        self.config = config
        self.seconds = seconds
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[None] | None = None
        self._staging = Staging()

    def __enter__(self) -> StateKeeper:
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
        self._written = self._writer.submit(write_state, self.directory, kept)

    def resumable(self, state: dict[str, Any]) -> dict[str, Any]:
        """What `read_resumable` takes."""
        return {
            "run": plain(state),
            "features": self.features,
            "config": self.config.model_dump(mode="json"),
            "seconds": self.seconds(),
        }

    def _wait(self) -> None:
        if self._written is not None:
            written, self._written = self._written, None
            written.result()
