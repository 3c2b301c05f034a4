"""Finding and opening HDF5 files, with one line for whatever is wrong with them."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py

from spinlock_fast.errors import DataError

# What h5py raises where metadata are damaged: whatever the bytes happen to suggest.
H5PY_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError, AttributeError)

_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Identity:
    """What tells a file from another, and from its own later state."""

    device: int
    inode: int
    size: int
    mtime_ns: int


def identify(file: Path) -> Identity:
    """The identity of a file as it is now; raises DataError where it cannot be had."""
    try:
        found = os.stat(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    return Identity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def find_files(paths: str | Sequence[str]) -> list[Path]:
    """The files of a path, a glob, or a list of those; raises DataError where one is missing."""
    found: list[Path] = []
    for pattern in [paths] if isinstance(paths, str) else paths:
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
    return found


def open_file(file: Path) -> h5py.File:
    """The file, open for reading; raises DataError."""
    try:
        with open(file, "rb"):
            pass
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    if not h5py.is_hdf5(file):
        raise DataError(f"{file}: not an HDF5 file")
    try:
        try:
            return h5py.File(file, "r")
        except OSError as error:
            if "already open for write" not in str(error):
                raise
            return h5py.File(file, "r", swmr=True)  # its writer may have asked for readers
    except H5PY_ERRORS as error:
        text = one_line(error)
        if "unable to lock" in text:
            raise DataError(f"{file}: another program is writing to it") from None
        what = "truncated" if "truncated" in text else "damaged, or its writer has not closed it"
        raise DataError(f"{file}: the file is {what}: {text}") from None


@contextmanager
def naming_damage(file: Path, path: str) -> Iterator[None]:
    """What h5py raises in the block becomes a DataError that names file and dataset."""
    try:
        yield
    except DataError:
        raise
    except H5PY_ERRORS as error:
        raise DataError(f"{file}: {path}: the file is damaged: {one_line(error)}") from None


def get_dataset(file: Path, handle: h5py.File, path: str) -> h5py.Dataset:
    """A dataset by its path; raises DataError that names the nearest one."""
    try:
        node = handle[path]
    except H5PY_ERRORS as error:
        names: list[str] = []
        with naming_damage(file, path):
            handle.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
            if path in names:
                raise error
        close = difflib.get_close_matches(path, names, 1, cutoff=0.4)
        hint = f"; nearest is {close[0]}" if close else f"; it holds {', '.join(names[:6]) or 'no dataset'}"
        raise DataError(f"{file}: no dataset {path}{hint}") from None
    if not isinstance(node, h5py.Dataset):
        raise DataError(f"{file}: {path} is a group, not a dataset")
    return node


def one_line(error: BaseException) -> str:
    """The text of an error without line breaks."""
    return " ".join(str(error).split())


def _how_to_make(path: str) -> str:
    name = path if not _GLOB.search(path) else "FILE.h5"
    return f"; simulate one with `python -m spinlock_fast.generate --operators 512 --output {name}`"


def _natural(text: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]
