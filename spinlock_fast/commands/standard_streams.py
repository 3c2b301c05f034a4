"""Standard streams that may go away: a closed pipe, terminal or descriptor ends no run."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from spinlock_fast.errors import OutputError


class ReaderGone(Exception):  # noqa: N818 - as much an end as an error
    """Nobody reads the standard output any more: a closed pipe or terminal."""


class Messages:
    """A text stream for messages: once nobody can read it, what is written is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._gone = False

    def write(self, text: str) -> int:
        """Writes, unless the reader has gone."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flushes, unless the reader has gone."""
        self._try(self._stream.flush)

    def _try(self, action: Any) -> None:
        if self._gone:
            return
        try:
            action()
        except OSError:  # a full disk under a log file included: messages are no result
            self._gone = True
            drop(self._stream)
        except ValueError:  # closed
            self._gone = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Results:
    """The standard output: raises ReaderGone, or OutputError for another reason such as a full disk."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes; raises ReaderGone or OutputError."""
        with _results_written(self._stream):
            return self._stream.write(text)

    def flush(self) -> None:
        """Flushes; raises ReaderGone or OutputError."""
        with _results_written(self._stream):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _results_written(stream: TextIO) -> Iterator[None]:
    try:
        yield
    except UnicodeEncodeError as error:
        text = error.object[error.start : error.end]
        raise OutputError(
            f"standard output cannot show {text!r} in {error.encoding}: set PYTHONIOENCODING=utf-8"
        ) from None
    except OSError as error:
        drop(stream)
        if error.errno in (errno.EPIPE, errno.EIO) and (error.errno == errno.EPIPE or stream.isatty()):
            raise ReaderGone from None
        raise OutputError(f"standard output cannot be written: {error.strerror}") from None


def drop(stream: TextIO) -> None:
    """Sends what a stream still holds, and all that follows, nowhere: the interpreter flushes it at its end."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def tolerant_streams() -> Iterator[None]:
    """Within the block stderr is a `Messages` and stdout a `Results`."""
    for number in range(3):  # a free number would be taken by the next file that is opened
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    sys.stdout = cast("TextIO", Results(before[0] if before[0] is not None else _nowhere()))
    sys.stderr = cast("TextIO", Messages(before[1] if before[1] is not None else _nowhere()))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _nowhere() -> TextIO:
    return open(os.devnull, "w")
