"""Directory of copies of files with a size limit, shared by processes."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from spinlock_fast.errors import ConfigError, DataError, OutputError
from spinlock_fast.messages import one_line
from spinlock_fast.output.atomic_files import replacing
from spinlock_fast.output.locks import NO_LOCKS, locked_unless

log = logging.getLogger(__name__)

_ATTEMPTS = 5
_FIRST_WAIT = 0.5  # seconds before the second attempt; doubled for each further one
_ROOM_SECONDS = 60.0  # wait for other processes to release copies
_LOCK_SECONDS = 600.0  # wait for another process that downloads the same file
_UNUSED_SECONDS = 3600.0  # without locks, copies used more recently than this are not removed
_STALE_SECONDS = 86400.0  # unfinished downloads older than this are removed
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_held: Counter[Path] = Counter()  # number of holds of this process on a copy
_held_lock = Lock()
_downloading: dict[Path, int] = {}  # bytes of the downloads of this process
_room_lock = Lock()


@dataclass
class Hold:
    """Keeps a copy in the cache until it is released: by a shared lock, and within this process by a count."""

    path: Path
    _descriptor: int

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            with _held_lock:
                _held[self.path] -= 1


@dataclass(frozen=True)
class FileCache:
    """Copies of files in a directory; the least recently used ones are removed when the limit is reached.

    A copy is downloaded to a temporary file and renamed when it is complete. While one process downloads, others that
    need the same file wait for it. Copies in use carry a shared lock (flock) and are not removed.

    On file systems without locks, processes may download a file twice, of which one copy remains, and copies that were
    used in the last hour are not removed.

    Args:
        directory: created if it does not exist.
        max_bytes: size limit; running downloads of other processes may exceed it.
    """

    directory: Path
    max_bytes: int

    def get(self, path: Path, size: int, download: Callable[[Path], None], name: str, wait: bool = True) -> Hold | None:
        """Makes a copy, or finds it, and holds it.

        Args:
            path: the copy, in the directory.
            size: its size in bytes.
            download: writes the file to a path; called again after an error.
            name: of the file, for messages.
            wait: False returns None if the cache is full of copies in use.

        Raises:
            ConfigError: copies in use leave no room.
            DataError: the download failed, several times.
            OutputError: the directory cannot be written.
        """
        while (hold := _hold(path, size)) is None:
            # Without the lock after _LOCK_SECONDS: both download, and each copy is renamed when it is complete.
            _create(self.directory)
            with locked_unless(lambda: _is_complete(path, size), path, _LOCK_SECONDS):
                if _is_complete(path, size):
                    continue
                if not self._make_room(path, size, name, wait):
                    return None
                try:
                    with replacing(path) as temporary:
                        _try_repeatedly(lambda: download(temporary), name)
                finally:
                    _downloading.pop(path, None)
        return hold

    def _make_room(self, path: Path, size: int, name: str, wait: bool) -> bool:
        """Removes the least recently used copies until `size` more bytes fit; False if there is no room.

        Reserves the bytes for this process, until they are removed from `_downloading`.
        """
        deadline = time.monotonic() + (_ROOM_SECONDS if wait else 0.0)
        while True:
            with _room_lock:
                copies = self._copies()
                total = sum(entry.st_size for entry in copies.values()) + sum(_downloading.values())
                for copy in sorted(copies, key=lambda copy: copies[copy].st_atime_ns):
                    if total + size <= self.max_bytes:
                        break
                    if copy != path and _remove(copy, copies[copy]):
                        total -= copies[copy].st_size
                if total + size <= self.max_bytes:
                    _downloading[path] = size
                    return True
            if time.monotonic() >= deadline:
                break
            time.sleep(0.5)
        if wait:
            raise ConfigError(
                f"remote_cache_size: {self.max_bytes} bytes do not hold {name} of {size} bytes beside {total} bytes "
                f"of other files in use in {self.directory}"
            )
        return False

    def _copies(self) -> dict[Path, os.stat_result]:
        """Copies, and unfinished downloads of other processes."""
        copies = {}
        own = f"-{os.getpid()}-"  # in names of temporary files
        with suppress(FileNotFoundError):
            for entry in os.scandir(self.directory):
                with suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    unfinished = entry.name.startswith(".") and own in entry.name
                    if entry.is_file(follow_symlinks=False) and not entry.name.endswith(".lock") and not unfinished:
                        copies[Path(entry.path)] = status
        return copies


def _create(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{directory}: cannot be written: {error.strerror}") from None


def _hold(path: Path, size: int) -> Hold | None:
    """Holds a complete copy and marks it as used now; None if there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {error.strerror}") from None
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    opened = os.fstat(descriptor)
    try:
        current = os.stat(path)  # it may have been removed before it was locked
    except FileNotFoundError:
        current = None
    if current is None or not os.path.samestat(opened, current) or opened.st_size != size:
        os.close(descriptor)
        if current is not None and current.st_size != size:
            path.unlink(missing_ok=True)  # a copy that was damaged afterwards
        return None
    with suppress(OSError):
        os.utime(path, ns=(time.time_ns(), opened.st_mtime_ns))
    with _held_lock:
        _held[path] += 1
    return Hold(path, descriptor)


def _is_complete(path: Path, size: int) -> bool:
    try:
        return os.stat(path).st_size == size
    except OSError:
        return False


def _remove(path: Path, status: os.stat_result) -> bool:
    """Removes a copy that is not in use, or an old unfinished download; returns whether it was removed."""
    unused = time.time() - max(status.st_atime, status.st_mtime)
    if _held.get(path) or (path.name.startswith(".") and unused < _STALE_SECONDS):
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS or unused < _UNUSED_SECONDS:
            return False
        path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
    return True


def _try_repeatedly(action: Callable[[], None], name: str) -> None:
    """Calls an action until it succeeds; raises DataError after the last attempt."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            action()
            return
        except (DataError, FileNotFoundError, PermissionError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{name}: cannot be downloaded: {one_line(error)}") from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
                raise
            reason = one_line(error) or type(error).__name__
            if attempt == _ATTEMPTS:
                raise DataError(f"{name}: cannot be downloaded, after {attempt} attempts: {reason}") from error
            pause = _FIRST_WAIT * 2 ** (attempt - 1) * (1.0 + random.random() / 2)
            log.warning("%s: download failed (%s), trying again in %.1f s", name, reason, pause)
            time.sleep(pause)
