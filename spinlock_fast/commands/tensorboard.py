"""Synchronous TensorBoard scalars: disk errors are raised by the call, not in a background thread."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from spinlock_fast.errors import OutputError


class ScalarFile:
    """A TensorBoard event file of scalars.

    Args:
        directory: created where it does not exist.
        first_epoch: finished epochs of a resumed run; TensorBoard ignores later steps of earlier files.

    Raises:
        ImportError: `tensorboard` is not installed.
        OutputError: the file cannot be written.
    """

    def __init__(self, directory: Path, first_epoch: int = 0) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        now = time.time()
        self.path = directory / f"events.out.tfevents.{int(now)}.{socket.gethostname()}.{os.getpid()}.0"
        self._file: BinaryIO | None = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab")  # noqa: SIM115 - open during the run
            self._records = RecordWriter(self._file)
            self._write(Event(wall_time=now, file_version="brain.Event:2"))
            if first_epoch:
                start = SessionLog(status=SessionLog.START)
                self._write(Event(wall_time=now, step=first_epoch + 1, session_log=start))
        except OSError as error:
            raise self._failed(error) from None

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Writes the scalars of a step; raises OutputError."""
        entries = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        try:
            self._write(self._event(wall_time=time.time(), step=step, summary=self._summary(value=entries)))
        except OSError as error:
            raise self._failed(error) from None

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()

    def _failed(self, error: OSError) -> OutputError:
        if self._file is not None:
            with suppress(OSError):  # its buffer cannot be written either
                self._file.close()
        return OutputError(f"{self.path}: cannot be written: {error.strerror}; logging.tensorboard=false disables it")
