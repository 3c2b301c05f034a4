"""Finding and opening HDF5 files, with one line for whatever is wrong with them."""

from __future__ import annotations

import errno
import glob
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py

from spinlock_fast.errors import DataError
from spinlock_fast.messages import printable

log = logging.getLogger(__name__)

# What h5py raises where metadata are damaged: whatever the bytes happen to suggest.
H5PY_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError, AttributeError)

_GLOB = re.compile(r"[*?\[]")
_REMOTE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_ERRNO = re.compile(r"errno = (\d+)")  # as libhdf5 writes it into its messages

# Of the system, not of what the file holds.
_SYSTEM_ERRORS = {errno.EMFILE, errno.ENFILE, errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ENOENT}

_said_unlocked: set[int] = set()  # devices whose lack of locks has been logged


class TooManyOpenFilesError(DataError):
    """The process may not open another file."""


@dataclass(frozen=True)
class Identity:
    """What tells a file from another, and from its own later state."""

    device: int
    inode: int
    size: int
    mtime_ns: int


def identify(file: Path | int) -> Identity:
    """The identity of a file, or of an open descriptor, as it is now; raises DataError where it cannot be had."""
    try:
        found = os.stat(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    return Identity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def find_files(paths: str | Sequence[str]) -> list[Path]:
    """The files of a path, a glob, or a list of those; raises DataError where one is missing or not a regular file."""
    found: list[Path] = []
    for pattern in [paths] if isinstance(paths, str) else paths:
        if (scheme := _REMOTE.match(pattern)) and not Path(pattern).exists():
            raise DataError(
                f"{pattern}: {scheme[1]}:// addresses are not read; copy the file to a local disk, or mount "
                "the store and name the mounted path"
            )
        if "\0" in pattern:
            raise DataError(f"{pattern!r}: a path cannot hold a NUL character")
        if _GLOB.search(pattern) and not Path(pattern).exists():
            matches = sorted(glob.glob(pattern, recursive=True), key=_natural)
            if not matches:
                raise DataError(f"{pattern}: no file matches{_how_to_make(pattern)}")
            found += [Path(match) for match in matches]
        else:
            found.append(Path(pattern))
    if not found:
        raise DataError("dataset_path is an empty list")
    twice = next((file for file, count in Counter(found).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"dataset_path names {twice} twice: its rows would count double")
    for file in found:
        if file.is_dir():
            raise DataError(f"{file}: is a directory; name the file, or a glob such as {file}/*.h5")
        if not file.exists():
            raise DataError(f"{file}: no such file{_how_to_make(str(file))}")
        check_regular(file)
    return found


def check_regular(file: Path) -> None:
    """Raises DataError for a FIFO, a socket or a device: opening one may wait forever, and it cannot be read twice."""
    try:
        mode = os.stat(file).st_mode
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(mode):
        kind = next(
            (name for test, name in _KINDS if test(mode)),
            "not a regular file",
        )
        raise DataError(f"{file}: is {kind}; HDF5 is read from regular files only")


_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def open_file(file: Path) -> h5py.File:
    """The file, open for reading.

    A file system that has no locks is read without them; that is logged once.

    Raises:
        TooManyOpenFilesError: the limit of open files is reached.
        DataError: the file cannot be read.
    """
    check_regular(file)
    try:
        with open(file, "rb"):
            pass
    except OSError as error:
        raise _unreadable(file, error) from None
    if not h5py.is_hdf5(file):
        raise DataError(f"{file}: not an HDF5 file")
    try:
        try:
            return h5py.File(file, "r")
        except OSError as error:
            if _lock_error(error) not in (None, errno.EAGAIN):
                return _open_without_locks(file, error)
            if "already open for write" not in str(error):
                raise
            return h5py.File(file, "r", swmr=True)  # its writer may have asked for readers
    except DataError:
        raise
    except H5PY_ERRORS as error:
        raise _not_opened(file, error) from None


def _open_without_locks(file: Path, refused: OSError) -> h5py.File:
    """For file systems without locks (some network and container mounts). A file that is being written is still
    recognised: by the mark that its writer sets in it, and by its time of change.
    """
    try:
        handle = h5py.File(file, "r", locking=False)
    except OSError as error:
        if _lock_error(error) is None:
            raise
        raise DataError(
            f"{file}: its file system refuses locks ({_reason(_lock_error(refused))}); "
            "set HDF5_USE_FILE_LOCKING=FALSE to read without them"
        ) from None
    device = identify(file).device
    if device not in _said_unlocked:
        _said_unlocked.add(device)
        log.warning(
            "%s: its file system refuses locks (%s): it is read without; HDF5_USE_FILE_LOCKING=FALSE does so from the "
            "start",
            file,
            _reason(_lock_error(refused)),
        )
    return handle


def _lock_error(error: OSError) -> int | None:
    """The errno of a failed lock; None for another error."""
    text = str(error)
    if "unable to lock" not in text and "unable to unlock" not in text:
        return None
    found = _ERRNO.search(text)
    return int(found[1]) if found else errno.EAGAIN


def _not_opened(file: Path, error: BaseException) -> DataError:
    text = one_line(error)
    if isinstance(error, OSError) and (number := _lock_error(error)) is not None:
        if number == errno.EAGAIN:
            return DataError(f"{file}: another program is writing to it")
        return DataError(f"{file}: cannot be locked: {_reason(number)}; see HDF5_USE_FILE_LOCKING")
    if (found := _ERRNO.search(text)) and (number := int(found[1])) in _SYSTEM_ERRORS:
        return _unreadable(file, OSError(number, _reason(number)))
    what = "truncated" if "truncated" in text else "damaged, or its writer has not closed it"
    return DataError(f"{file}: the file is {what}: {text}")


def _unreadable(file: Path, error: OSError) -> DataError:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return TooManyOpenFilesError(
            f"{file}: cannot be opened: {error.strerror}; `ulimit -n` tells and raises the limit"
        )
    return DataError(f"{file}: cannot be read: {error.strerror}")


def _reason(number: int | None) -> str:
    return os.strerror(number) if number else "unknown reason"


@contextmanager
def naming_damage(file: Path, path: str) -> Iterator[None]:
    """What h5py raises in the block becomes a DataError that names file and dataset."""
    try:
        yield
    except DataError:
        raise
    except H5PY_ERRORS as error:
        raise DataError(f"{file}: {path}: the file is damaged: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    """The text of an error without line breaks."""
    return printable(" ".join(str(error).split()))


def _how_to_make(path: str) -> str:
    """How to obtain a missing data file."""
    if (size := re.fullmatch(r"(10k|100k)_full_features\.h5", Path(path).name)) is not None:
        return (
            f"; name your copy with `--set dataset_path=FILE.h5`, start small with `make train`, or simulate it with "
            f"`python -m spinlock_fast.generate --config configs/data/{size[1]}.yaml --output {path}`"
        )
    name = path if not _GLOB.search(path) else "FILE.h5"
    return f"; simulate one with `python -m spinlock_fast.generate --operators 512 --output {name}`"


def _natural(text: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]
