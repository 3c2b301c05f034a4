"""Standard streams that tolerate closed pipes, terminals and descriptors."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from spinlock_fast.errors import OutputError


class ReaderGone(Exception):  # noqa: N818 - a normal way for a command to end
    """The reader of standard output has closed the pipe or terminal."""


class MessageStream:
    """A text stream for messages, which drops its output once the stream is closed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._closed = False

    def write(self, text: str) -> int:
        """Writes, unless the stream is closed."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flushes, unless the stream is closed."""
        self._try(self._stream.flush)

    def _try(self, action: Any) -> None:
        if self._closed:
            return
        try:
            action()
        except OSError:  # also a full disk under a log file: messages are not results
            self._closed = True
            redirect_to_null(self._stream)
        except ValueError:  # closed
            self._closed = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class ResultStream:
    """Standard output; raises ReaderGone where it is closed, OutputError on other failures such as a full disk."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes; raises ReaderGone or OutputError."""
        with _output_errors(self._stream):
            return self._stream.write(text)

    def flush(self) -> None:
        """Flushes; raises ReaderGone or OutputError."""
        with _output_errors(self._stream):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _output_errors(stream: TextIO) -> Iterator[None]:
    try:
        yield
    except UnicodeEncodeError as error:
        text = error.object[error.start : error.end]
        raise OutputError(
            f"standard output cannot show {text!r} in {error.encoding}: set PYTHONIOENCODING=utf-8"
        ) from None
    except OSError as error:
        redirect_to_null(stream)
        if error.errno in (errno.EPIPE, errno.EIO) and (error.errno == errno.EPIPE or stream.isatty()):
            raise ReaderGone from None
        raise OutputError(f"standard output cannot be written: {error.strerror}") from None


def redirect_to_null(stream: TextIO) -> None:
    """Redirects a stream to os.devnull, including buffered output, which the interpreter flushes at exit."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


@contextmanager
def tolerant_streams() -> Iterator[None]:
    """Within the block, sys.stderr is a `MessageStream` and sys.stdout a `ResultStream`."""
    for number in range(3):  # a closed descriptor would be reused by the next open file
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    sys.stdout = cast("TextIO", ResultStream(before[0] if before[0] is not None else _null_stream()))
    sys.stderr = cast("TextIO", MessageStream(before[1] if before[1] is not None else _null_stream()))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _null_stream() -> TextIO:
    return open(os.devnull, "w")
