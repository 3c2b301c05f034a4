"""Finding and opening HDF5 files, with one-line error messages."""

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

import h5py

from spinlock_fast.data.natural_sort import natural_sort_key
from spinlock_fast.data.path_lists import read_path_lists
from spinlock_fast.data.remote_files import RemoteCache, fetch, is_remote, remote_file, version_number
from spinlock_fast.errors import DataError
from spinlock_fast.messages import one_line

log = logging.getLogger(__name__)

# Exceptions that h5py raises for damaged metadata.
H5PY_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError, AttributeError)

_GLOB = re.compile(r"[*?\[]")
_ERRNO = re.compile(r"errno = (\d+)")  # in messages of libhdf5

# Errors of the operating system, not of the file contents.
_SYSTEM_ERRORS = {errno.EMFILE, errno.ENFILE, errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ENOENT}

_logged_devices: set[int] = set()  # devices whose missing lock support has been logged


class TooManyOpenFilesError(DataError):
    """The limit of open files is reached."""


@dataclass(frozen=True)
class FileIdentity:
    """Identifies a file and its version; a difference means another file or changed contents."""

    device: int
    inode: int
    size: int
    mtime_ns: int


def identify(file: Path | int) -> FileIdentity:
    """Current identity of a path or an open descriptor; raises DataError if it cannot be read.

    The copy of a remote file has device and inode 0, and a number of its version instead of a time.
    """
    if (remote := remote_file(file)) is not None:
        return FileIdentity(0, 0, remote.size, version_number(remote))
    try:
        status = os.stat(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    return FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def find_files(
    paths: str | Sequence[str], remote: RemoteCache | None = None, *, of_generate: bool = True
) -> list[Path]:
    """Expands paths to files; raises DataError if a file is missing or not a regular file.

    Args:
        paths: a path, a glob, a text file with one of those per line (`@files.txt`, or a name that ends in .txt), an
            address of a remote store such as `s3://bucket/*.h5`, or a list of any of these.
        remote: where copies of remote files are stored; by default in the cache directory of the user.
        of_generate: whether `generate` can make such files, for the message about a missing one.

    Returns:
        The files. A remote file is represented by the path of its local copy, which `open_file` fetches.
    """
    files: list[Path] = []
    for pattern, origin in read_path_lists([paths] if isinstance(paths, str) else paths):
        try:
            if remote_file(Path(pattern)) is not None:  # a copy that may not exist yet
                files.append(Path(pattern))
            elif is_remote(pattern):
                remote = remote or RemoteCache()
                files += remote.find(pattern)
            else:
                files += _find_local(pattern, of_generate)
        except DataError as error:
            raise DataError(f"{origin}{error}") from None
    if not files:
        raise DataError("dataset_path is an empty list")
    duplicate = next((file for file, count in Counter(files).items() if count > 1), None)
    if duplicate is not None:
        raise DataError(f"dataset_path lists {duplicate} twice")
    return files


def _find_local(pattern: str, of_generate: bool) -> list[Path]:
    pattern = pattern.removeprefix("file://")
    if "\0" in pattern:
        raise DataError(f"{pattern!r}: a path cannot hold a NUL character")
    files = [Path(pattern)]
    if _GLOB.search(pattern) and not os.path.exists(pattern):
        files = [Path(match) for match in sorted(glob.glob(pattern, recursive=True), key=natural_sort_key)]
        if not files:
            raise DataError(f"{pattern}: no file matches{_generate_hint(pattern) * of_generate}")
    for file in files:
        try:
            mode = os.stat(file).st_mode
        except (OSError, ValueError):
            if not os.path.exists(file):  # unlike `Path.exists`, False for a name that is too long
                raise DataError(f"{file}: no such file{_generate_hint(str(file)) * of_generate}") from None
            mode = 0
        if stat.S_ISDIR(mode):
            raise DataError(f"{file}: is a directory; name the file, or a glob such as {file}/*.h5")
        if not stat.S_ISREG(mode):
            check_regular(file)
    return files


def check_regular(file: Path) -> None:
    """Raises DataError for a FIFO, socket or device: opening one may block, and it cannot be read twice."""
    try:
        mode = os.stat(file).st_mode
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "not a regular file")
        raise DataError(f"{file}: is {kind}; HDF5 is read from regular files only")


_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)

_TABLES = "h5py writes its columns as a dataset features/NAME [N, D], or Tokenizer.fit and encode take them as an array"
_ARRAYS = f"`extract` reads fields from .npy (--axes names its axes); of features, {_TABLES}"
# What to do with a file of another format, by its ending.
_OTHER_FORMATS = {
    ".npy": _ARRAYS,
    ".npz": f"np.save writes an array of it as .npy: {_ARRAYS}",
    **dict.fromkeys((".pt", ".pth"), f"np.save writes a tensor of it as .npy: {_ARRAYS}"),
    **dict.fromkeys((".csv", ".tsv", ".parquet"), _TABLES),
}


def open_file(file: Path) -> h5py.File:
    """Opens a file for reading, without locks if the file system does not support them (logged once).

    A remote file is fetched first.

    Raises:
        TooManyOpenFilesError: the limit of open files is reached.
        DataError: the file cannot be read.
    """
    with fetched(file):
        return _open_local(file)  # libhdf5 holds a lock of its own afterwards


@contextmanager
def fetched(file: Path) -> Iterator[None]:
    """Fetches a remote file, and keeps the copy within the block; no effect for other files."""
    hold = fetch(file)
    try:
        yield
    finally:
        if hold is not None:
            hold.release()


def _open_local(file: Path) -> h5py.File:
    check_regular(file)
    try:
        try:
            return h5py.File(file, "r")
        except OSError as error:
            if _lock_errno(error) not in (None, errno.EAGAIN):
                return _open_without_locks(file, error)
            if "already open for write" not in str(error):
                raise
            return h5py.File(file, "r", swmr=True)  # its writer may be in SWMR mode
    except DataError:
        raise
    except H5PY_ERRORS as error:
        _check_format(file)
        raise _open_error(file, error) from None


def _check_format(file: Path) -> None:
    """Raises DataError if a file cannot be read or is not an HDF5 file."""
    try:
        with open(file, "rb"):
            pass
    except OSError as error:
        raise _os_error(file, error) from None
    if not h5py.is_hdf5(file):
        advice = _OTHER_FORMATS.get(file.suffix.lower())
        raise DataError(f"{file}: not an HDF5 file" + (f"; {advice}" if advice else ""))


def _open_without_locks(file: Path, lock_error: OSError) -> h5py.File:
    """Opens a file on a file system without locks, such as some network and container mounts.

    A file that is being written is still detected by the flag that its writer sets, and by its modification time.
    """
    try:
        handle = h5py.File(file, "r", locking=False)
    except OSError as error:
        if _lock_errno(error) is None:
            raise
        raise DataError(
            f"{file}: its file system does not support locks ({_reason(_lock_errno(lock_error))}); "
            "set HDF5_USE_FILE_LOCKING=FALSE to read without them"
        ) from None
    device = identify(file).device
    if device not in _logged_devices:
        _logged_devices.add(device)
        log.warning(
            "%s: its file system does not support locks (%s): reading without them; set HDF5_USE_FILE_LOCKING=FALSE "
            "to avoid this message",
            file,
            _reason(_lock_errno(lock_error)),
        )
    return handle


def _lock_errno(error: OSError) -> int | None:
    """The errno of a failed lock; None for other errors."""
    text = str(error)
    if "unable to lock" not in text and "unable to unlock" not in text:
        return None
    match = _ERRNO.search(text)
    return int(match[1]) if match else errno.EAGAIN


def _open_error(file: Path, error: BaseException) -> DataError:
    text = one_line(error)
    if isinstance(error, OSError) and (number := _lock_errno(error)) is not None:
        if number == errno.EAGAIN:
            return DataError(f"{file}: another program is writing to it")
        return DataError(f"{file}: cannot be locked: {_reason(number)}; see HDF5_USE_FILE_LOCKING")
    if (match := _ERRNO.search(text)) and (number := int(match[1])) in _SYSTEM_ERRORS:
        return _os_error(file, OSError(number, _reason(number)))
    what = "truncated" if "truncated" in text else "damaged, or its writer has not closed it"
    return DataError(f"{file}: the file is {what}: {text}")


def _os_error(file: Path, error: OSError) -> DataError:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return TooManyOpenFilesError(f"{file}: cannot be opened: {error.strerror}; raise the limit with `ulimit -n`")
    return DataError(f"{file}: cannot be read: {error.strerror}")


def _reason(number: int | None) -> str:
    return os.strerror(number) if number else "unknown reason"


@contextmanager
def reporting_damage(file: Path, path: str) -> Iterator[None]:
    """Converts exceptions of h5py in the block to a DataError that names file and dataset."""
    try:
        yield
    except DataError:
        raise
    except H5PY_ERRORS as error:
        raise DataError(f"{file}: {path}: the file is damaged: {one_line(error)}") from None


def _generate_hint(path: str) -> str:
    """How to obtain a missing data file."""
    if (size := re.fullmatch(r"(10k|100k)_full_features\.h5", Path(path).name)) is not None:
        return (
            f"; name your copy with `--set dataset_path=FILE.h5`, start small with `make train`, or simulate it with "
            f"`python -m spinlock_fast.generate --config configs/data/{size[1]}.yaml --output {path}`"
        )
    name = path if not _GLOB.search(path) else "FILE.h5"
    return f"; simulate one with `python -m spinlock_fast.generate --operators 512 --output {name}`"
