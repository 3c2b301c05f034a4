"""Atomic file writes: readers see the old file or the complete new one."""

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
from spinlock_fast.messages import one_line

# Names of temporary files: .NAME.HOST-PID-RANDOM.SUFFIX. Host and process ID show whether the writer still exists.
_TEMPORARY = re.compile(r"\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}(?:\.[^.]*)?$")
_MAX_NAME_BYTES = 200  # bytes of the target's name in a temporary name; most file systems allow 255 in all
_DESCRIPTOR = re.compile(r"/(?:dev/fd|proc/self/fd|proc/\d+/fd)/(\d+)$")
_STANDARD = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the name of a temporary file that replaces `path` if the block does not raise.

    If `path` is a symbolic link, its target is replaced. A FIFO or character device, such as /dev/stdout, is written to
    at the end. A replaced file keeps its permissions; a new file gets those of the umask.

    Raises:
        OutputError: the directory or the file cannot be written, or `path` is a block device or a socket.
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
    """A temporary file in the directory of the target, renamed to it at the end."""
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_temporaries(target)
        temporary = create_temporary(target)
        yield temporary
        _copy_permissions(temporary, target)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        temporary = None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def _written_through(target: Path, descriptor: int | None) -> Iterator[Path]:
    """A temporary file elsewhere, copied to a device, a FIFO or an open descriptor at the end."""
    with tempfile.TemporaryDirectory(prefix="spinlock-fast-") as directory:
        temporary = Path(directory) / "output"
        temporary.touch()
        yield temporary
        output = os.dup(descriptor) if descriptor is not None else os.open(target, os.O_WRONLY | os.O_NOCTTY)
        with open(temporary, "rb") as source, open(output, "wb") as sink:
            shutil.copyfileobj(source, sink)


def _open_descriptor(path: Path) -> int | None:
    """Descriptor named by /dev/stdout, /dev/fd/N or a link to one of them; None for other paths."""
    current = os.path.abspath(path)
    for _ in range(40):  # limit of Linux
        if current in _STANDARD:
            return _STANDARD[current]
        if (match := _DESCRIPTOR.search(current)) and current.startswith(
            ("/dev/", "/proc/self/", f"/proc/{os.getpid()}/")
        ):
            return int(match[1])
        if not os.path.islink(current):
            return None
        current = os.path.abspath(os.path.join(os.path.dirname(current), os.readlink(current)))
    return None


def _is_special(target: Path) -> bool:
    """Whether a target is a FIFO or a character device; raises OSError for a block device or a socket."""
    try:
        mode = target.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        raise OSError(f"it is a {'block device' if stat.S_ISBLK(mode) else 'socket'}")
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def is_written_through(path: Path) -> bool:
    """Whether `replacing` copies to a path at the end: an open descriptor such as /dev/stdout, a device or a FIFO."""
    target = Path(os.path.realpath(path))
    return _open_descriptor(path) is not None or (os.path.exists(target) and not os.path.isfile(target))


def check_regular(path: Path) -> None:
    """Raises OutputError if a path exists and is not a regular file."""
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
    """Raises OutputError if a path is a symbolic link: writing would overwrite its target."""
    if path.is_symlink():
        raise OutputError(f"{path}: is a symbolic link; remove it")


def create_temporary(target: Path) -> Path:
    """Creates an empty temporary file of a target, in its directory; `remove_stale_temporaries` finds it."""
    stem = os.fsdecode(os.fsencode(target.name)[:_MAX_NAME_BYTES])
    suffix = target.suffix if len(target.suffix) <= 16 else ""
    # The replaced file may be private: its successor must not be readable by others meanwhile.
    mode = 0o600 if target.exists() else 0o666
    name = f".{stem}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}{suffix}"
    os.close(os.open(target.parent / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode))
    return target.parent / name


def remove_stale_temporaries(target: Path) -> None:
    """Removes temporary files of a target that killed processes of this host left behind."""
    stem = os.fsdecode(os.fsencode(target.name)[:_MAX_NAME_BYTES])
    with suppress(OSError):
        for entry in os.scandir(target.parent):
            match = _TEMPORARY.search(entry.name)
            if not match or entry.name[: match.start()] != f".{stem}" or match[1] != _host():
                continue
            if not process_exists(int(match[2])):
                Path(entry.path).unlink(missing_ok=True)


def process_exists(pid: int) -> bool:
    """Whether a process of this host exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _host() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _copy_permissions(temporary: Path, target: Path) -> None:
    """Copies the permissions and, if allowed, the owner of the replaced file to the new one."""
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
    """Flushes renames within a directory to disk, if the file system supports it."""
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
    """Calls `write` with a temporary path, then replaces `path` by it; raises OutputError."""
    with replacing(path) as temporary:
        try:
            write(temporary)
        except RuntimeError as error:  # raised by torch.save if the disk is full
            raise OutputError(f"{path}: cannot be written: {one_line(error)}") from None


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes an indented JSON file atomically; raises ValueError for NaN and Inf, which JSON cannot represent."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def reserve_disk_space(path: Path, start: int, size: int) -> None:
    """Allocates disk space for bytes [start, start + size) of a file; raises OSError if the disk is full.

    HDF5 must not run out of disk space: after a failed write, it crashes when the file is closed or the process ends.
    No effect on systems without posix_fallocate.
    """
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), start, size)


def check_writable(directory: Path) -> None:
    """Raises OutputError if no file can be created in the directory; removes directories created by the check."""
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
    # Messages of HDF5 are several lines long.
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else one_line(error)
