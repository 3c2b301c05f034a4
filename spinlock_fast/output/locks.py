"""Exclusive locks of outputs, released by the operating system when the process ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from spinlock_fast.errors import OutputError
from spinlock_fast.output.atomic_files import is_written_through, process_exists

log = logging.getLogger(__name__)

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # of file systems without flock
_LOG_SECONDS = 30.0  # between messages about waiting
_WAIT_SECONDS = 5.0  # for worker processes of a killed process, which inherit its lock, to end


class _LockedError(OutputError):
    """Another process holds the lock."""


def lock_path(output: Path) -> Path:
    """Path of the lock file of an output: inside a directory, next to a file."""
    return output / ".lock" if os.path.isdir(output) else output.with_name(f".{output.name[:200]}.lock")


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Holds the lock of an output, a file or an existing directory, within the block.

    The operating system releases the lock of a process that ends, so a leftover lock file of a killed process has no
    effect. On file systems without locks, the process and host stored in the lock file are checked instead.

    Raises:
        OutputError: another process holds the lock (named in the message), or the lock file cannot be created.
    """
    try:
        descriptor = _acquire(output)
    except _LockedError as error:
        raise OutputError(*error.args) from None
    with _released_at_the_end(descriptor, lock_path(output)):
        yield


@contextmanager
def locked_unless(done: Callable[[], bool], output: Path, seconds: float) -> Iterator[None]:
    """As `locked`, but waits while another process holds the lock, until `done()` or for some time.

    In both cases the block runs without the lock.
    """
    started = logged = time.monotonic()
    with ExitStack() as stack:
        while not done() and time.monotonic() - started < seconds:
            try:
                stack.enter_context(_released_at_the_end(_acquire(output), lock_path(output)))
                break
            except _LockedError as error:
                if time.monotonic() - logged > _LOG_SECONDS:
                    logged = time.monotonic()
                    log.info("waiting: %s", error)
                time.sleep(0.1)
        yield


@contextmanager
def _released_at_the_end(descriptor: int, path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        # Remove the file while the lock is held: a waiting process then detects this and creates a new one.
        with suppress(OSError):
            os.unlink(path)
        os.close(descriptor)


@contextmanager
def locked_output_file(output: Path) -> Iterator[None]:
    """Holds the lock of a file that a command will replace; no effect for devices and FIFOs.

    Raises:
        OutputError: another process is writing the file, or its directory cannot be written.
    """
    if is_written_through(output):
        yield
        return
    target = Path(os.path.realpath(output))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output}: cannot be written: {error.strerror}") from None
    with locked(target):
        yield


@contextmanager
def locked_output_directory(directory: Path) -> Iterator[None]:
    """Creates a directory and holds its lock while a command writes files to it; raises OutputError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{directory}: cannot be written: {error.strerror}") from None
    with locked(directory):
        yield


def _acquire(output: Path) -> int:
    """Descriptor of the locked lock file; raises OutputError."""
    try:
        return _open_locked(lock_path(output), output)
    except OSError as error:
        raise OutputError(f"{output}: cannot be written: {os.strerror(error.errno or 0)}") from None


def _open_locked(path: Path, output: Path) -> int:
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            if not _try_flock(descriptor):
                if not _holder_exists(descriptor) and time.monotonic() < deadline:
                    os.close(descriptor)
                    time.sleep(0.05)
                    continue
                raise _LockedError(f"{output}: is being written by {_holder(descriptor)}")
            if _is_same_file(descriptor, path):
                text = f"{os.getpid()} {socket.gethostname()} {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
                try:
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, text.encode(), 0)
                except OSError:  # the disk is full
                    os.unlink(path)
                    raise
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _try_flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return not _holder_exists(descriptor)
    return True


def _holder_exists(descriptor: int) -> bool:
    fields = os.pread(descriptor, 4096, 0).decode(errors="replace").split()
    if len(fields) < 2 or not fields[0].isdigit():
        return False
    return fields[1] != socket.gethostname() or process_exists(int(fields[0]))


def _is_same_file(descriptor: int, path: Path) -> bool:
    """Whether the path still refers to the open file: the previous holder may have removed it."""
    try:
        current = os.stat(path)
    except FileNotFoundError:
        return False
    opened = os.fstat(descriptor)
    return (current.st_dev, current.st_ino) == (opened.st_dev, opened.st_ino)


def _holder(descriptor: int) -> str:
    fields = os.pread(descriptor, 4096, 0).decode(errors="replace").split()
    if len(fields) < 4:
        return "another process"
    return f"process {fields[0]} on {fields[1]}, since {fields[2]} {fields[3]}"
