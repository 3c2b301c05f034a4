"""Writing files so that a reader sees the old one or the new one, never half of one."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from spinlock_fast.errors import OutputError

# Names of temporary files: .NAME.HOST-PID-RANDOM.SUFFIX. Host and process tell whether the writer still lives.
_TEMPORARY = re.compile(r"\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}(?:\.[^.]*)?$")
_LONGEST_NAME = 200  # of the part that comes from the file; the file system's limit is mostly 255 bytes
_DESCRIPTOR = re.compile(r"/(?:dev/fd|proc/self/fd|proc/\d+/fd)/(\d+)$")
_STANDARD = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the name of a temporary file that takes the place of `path` when the block ends well.

    A symbolic link stays, and its target is replaced. A FIFO or character device, such as /dev/stdout, is written to.
    A file that is replaced keeps its permissions; a new one has those of the umask.

    Raises:
        OutputError: the directory cannot be made or the file not written; `path` is a block device or a socket.
    """
    try:
        descriptor = _open_descriptor(path)
        target = Path(os.path.realpath(path))
        special = descriptor is not None or _is_special(target)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be written: {_reason(error)}") from None
    try:
        with _written_through(target, descriptor) if special else _renamed(target) as temporary:
            yield temporary
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {_reason(error)}") from None


@contextmanager
def _renamed(target: Path) -> Iterator[Path]:
    """A temporary file beside the target, renamed to it at the end."""
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_temporaries(target)
        temporary = _create_temporary(target)
        yield temporary
        _take_permissions(temporary, target)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        temporary = None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def _written_through(target: Path, descriptor: int | None) -> Iterator[Path]:
    """A temporary file elsewhere, whose bytes go to a device, a FIFO or an open descriptor at the end."""
    with tempfile.TemporaryDirectory(prefix="spinlock-fast-") as place:
        temporary = Path(place) / "output"
        temporary.touch()
        yield temporary
        where = os.dup(descriptor) if descriptor is not None else os.open(target, os.O_WRONLY | os.O_NOCTTY)
        with open(temporary, "rb") as source, open(where, "wb") as sink:
            shutil.copyfileobj(source, sink)


def _open_descriptor(path: Path) -> int | None:
    """The number of the open file that /dev/stdout, /dev/fd/N or a link to it names."""
    seen = os.path.abspath(path)
    for _ in range(40):  # as many links as Linux follows
        if seen in _STANDARD:
            return _STANDARD[seen]
        if (match := _DESCRIPTOR.search(seen)) and seen.startswith(("/dev/", "/proc/self/", f"/proc/{os.getpid()}/")):
            return int(match[1])
        if not os.path.islink(seen):
            return None
        seen = os.path.abspath(os.path.join(os.path.dirname(seen), os.readlink(seen)))
    return None


def _is_special(target: Path) -> bool:
    """Whether a target is a FIFO or a character device; raises OSError for what cannot be written at all."""
    try:
        mode = target.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        raise OSError(f"it is a {'block device' if stat.S_ISBLK(mode) else 'socket'}")
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def check_regular(path: Path) -> None:
    """Raises OutputError where a path exists and is no regular file: a directory, device, FIFO or socket."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be written: {_reason(error)}") from None
    if stat.S_ISDIR(mode):
        raise OutputError(f"{path}: is a directory")
    if not stat.S_ISREG(mode):
        raise OutputError(f"{path}: is not a regular file; name a file")


def check_no_link(path: Path) -> None:
    """Raises OutputError where a path is a symbolic link, through which another file would be overwritten."""
    if path.is_symlink():
        raise OutputError(f"{path}: is a symbolic link; remove it")


def _create_temporary(target: Path) -> Path:
    """A new empty file beside the target, with the permissions that the umask leaves."""
    stem = os.fsdecode(os.fsencode(target.name)[:_LONGEST_NAME])
    suffix = target.suffix if len(target.suffix) <= 16 else ""
    # A private file must not be readable by others while it is written.
    mode = 0o600 if target.exists() else 0o666
    name = f".{stem}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}{suffix}"
    os.close(os.open(target.parent / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode))
    return target.parent / name


def remove_stale_temporaries(target: Path) -> None:
    """Removes temporary files of a target that processes of this host left when they were killed."""
    stem = os.fsdecode(os.fsencode(target.name)[:_LONGEST_NAME])
    with suppress(OSError):
        for entry in os.scandir(target.parent):
            match = _TEMPORARY.search(entry.name)
            if not match or entry.name[: match.start()] != f".{stem}" or match[1] != _host():
                continue
            if not process_lives(int(match[2])):
                Path(entry.path).unlink(missing_ok=True)


def process_lives(pid: int) -> bool:
    """Whether a process of this host is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _host() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _take_permissions(temporary: Path, target: Path) -> None:
    """Gives the new file the permissions, and as far as allowed the owner, of the one that it replaces."""
    try:
        old = target.stat()
    except FileNotFoundError:
        return
    new = temporary.stat()
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        with suppress(PermissionError):
            os.chown(temporary, old.st_uid, old.st_gid)
    os.chmod(temporary, stat.S_IMODE(old.st_mode) & 0o777)


def sync_directory(directory: Path) -> None:
    """Makes renames within a directory last through a power cut, where the file system can."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary name, then renames; raises OutputError."""
    with replacing(path) as temporary:
        try:
            write(temporary)
        except RuntimeError as error:  # what torch.save makes of a full disk
            raise OutputError(f"{path}: cannot be written: {_one_line(error)}") from None


def write_text(path: Path, text: str) -> None:
    """A UTF-8 text file."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """An indented JSON file; raises ValueError for NaN or Inf, which JSON does not have."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def reserve(path: Path, start: int, size: int) -> None:
    """Takes the disk space of `size` bytes of a file from `start` on; raises OSError where the disk is full.

    HDF5 must never meet a full disk: after a write that fails, it crashes when it closes the file or the process ends.
    No effect on systems without posix_fallocate.
    """
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), start, size)


def check_writable(directory: Path) -> None:
    """Raises OutputError where no file can be made in the directory; leaves nothing behind, not even an empty one."""
    missing: list[Path] = []
    try:
        missing = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise OutputError(f"{directory}: cannot be written: {_reason(error)}") from None
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def _reason(error: Exception) -> str:
    # HDF5 puts a page of detail where others put a phrase.
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else _one_line(error)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
