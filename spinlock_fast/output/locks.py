"""One writer per output: a lock that ends with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spinlock_fast.errors import OutputError
from spinlock_fast.output.atomic_files import process_lives

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # of file systems without flock
_WORKERS_END = 5.0  # seconds in which workers of a killed process, which hold its lock as well, have ended


def lock_path(output: Path) -> Path:
    """Where the lock of an output lies: in a directory, or beside a file."""
    return output / ".lock" if os.path.isdir(output) else output.with_name(f".{output.name[:200]}.lock")


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Holds the lock of an output, a file or an existing directory, within the block.

    The operating system ends the lock of a process that dies, so a file that a killed process left holds nothing. On
    file systems without locks, the process and host in the file decide.

    Raises:
        OutputError: another process holds it (the message tells which), or the lock file cannot be made.
    """
    path = lock_path(output)
    try:
        descriptor = _acquire(path, output)
    except OSError as error:
        raise OutputError(f"{output}: cannot be written: {os.strerror(error.errno or 0)}") from None
    try:
        yield
    finally:
        # Removed while it is held: who waited for this file finds it gone and makes another.
        with suppress(OSError):
            os.unlink(path)
        os.close(descriptor)


@contextmanager
def written_by_one(output: Path) -> Iterator[None]:
    """Holds the lock of a file that a long command will replace; no effect for a device, which is written to.

    Raises:
        OutputError: another process writes the file, or its directory cannot be written.
    """
    target = Path(os.path.realpath(output))
    if os.path.exists(target) and not target.is_file():
        yield
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output}: cannot be written: {error.strerror}") from None
    with locked(target):
        yield


@contextmanager
def directory_written_by_one(directory: Path) -> Iterator[None]:
    """Makes a directory and holds its lock while the files of one command are written to it; raises OutputError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{directory}: cannot be written: {error.strerror}") from None
    with locked(directory):
        yield


def _acquire(path: Path, output: Path) -> int:
    deadline = time.monotonic() + _WORKERS_END
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            if not _try_flock(descriptor):
                if not _held_by_a_living_process(descriptor) and time.monotonic() < deadline:
                    os.close(descriptor)
                    time.sleep(0.05)
                    continue
                raise OutputError(f"{output}: is being written by {_holder(descriptor)}")
            if _is_same_file(descriptor, path):
                text = f"{os.getpid()} {socket.gethostname()} {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
                try:
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, text.encode(), 0)
                except OSError:  # a full disk
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
        if error.errno not in _NO_LOCKS:
            raise
        return not _held_by_a_living_process(descriptor)
    return True


def _held_by_a_living_process(descriptor: int) -> bool:
    words = os.pread(descriptor, 4096, 0).decode(errors="replace").split()
    if len(words) < 2 or not words[0].isdigit():
        return False
    return words[1] != socket.gethostname() or process_lives(int(words[0]))


def _is_same_file(descriptor: int, path: Path) -> bool:
    """Whether the path still names the open file: the holder before may have removed it."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def _holder(descriptor: int) -> str:
    words = os.pread(descriptor, 4096, 0).decode(errors="replace").split()
    if len(words) < 4:
        return "another process"
    return f"process {words[0]} on {words[1]}, since {words[2]} {words[3]}"
