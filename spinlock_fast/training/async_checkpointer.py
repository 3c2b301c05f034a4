"""Writes resumable states in a background thread while training continues."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from spinlock_fast.checkpoints.host_copies import PinnedStaging, to_cpu
from spinlock_fast.checkpoints.resumable import write_state
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.training.observer import EpochRecord, Observer


class AsyncCheckpointer:
    """An observer that writes resumable states in a thread and forwards epochs to another observer.

    A context manager; on exit the last state is on disk.

    Args:
        observer: receives `training_started` and `epoch_finished`.
        directory: where resume.pt is written.
        features: fingerprint of the features, see `check_same_features`.
        config: settings of the run.
        stage_seconds: returns the seconds spent in each stage so far.
    """

    def __init__(
        self,
        observer: Observer,
        directory: Path,
        features: dict[str, Any],
        config: RunConfig,
        stage_seconds: Callable[[], dict[str, float]] = dict,
    ) -> None:
        self.observer = observer
        self.directory = directory
        self.features = features
        self.config = config
        self.stage_seconds = stage_seconds
        self._executor = ThreadPoolExecutor(1, "checkpoint")
        self._pending_write: Future[None] | None = None
        self._staging = PinnedStaging()

    def __enter__(self) -> AsyncCheckpointer:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._wait()
        finally:
            self._executor.shutdown()

    def training_started(self, epochs: int, first_epoch: int, rows: int) -> None:
        self.observer.training_started(epochs, first_epoch, rows)

    def epoch_finished(self, record: EpochRecord) -> None:
        self.observer.epoch_finished(record)

    def save(self, state: dict[str, Any]) -> None:
        """Copies a state and starts to write it; raises OutputError if the previous write failed."""
        self._wait()
        payload = self.resumable(self._staging(state))
        self._pending_write = self._executor.submit(write_state, self.directory, payload)

    def resumable(self, state: dict[str, Any]) -> dict[str, Any]:
        """The contents of resume.pt, as `read_resumable` returns them."""
        return {
            "run": to_cpu(state),
            "features": self.features,
            "config": self.config.model_dump(mode="json"),
            "seconds": self.stage_seconds(),
        }

    def _wait(self) -> None:
        if self._pending_write is not None:
            write, self._pending_write = self._pending_write, None
            write.result()
