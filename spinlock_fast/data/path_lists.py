"""Text files that list the paths of a data set, one per line."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py

from spinlock_fast.data.remote_files import is_remote
from spinlock_fast.errors import DataError


def read_path_lists(patterns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Replaces text files of paths by their lines.

    A text file is written as `@files.txt`, or has a name that ends in .txt. Each line is a path, a glob or an address
    of a remote store; relative ones start at the directory of the text file. Empty lines and those that start with `#`
    are skipped.

    Yields:
        (path or glob, where it was listed): the second is empty, or "files.txt: line 3: " for messages.

    Raises:
        DataError: a text file is missing, empty or not text.
    """
    for pattern in patterns:
        if (file := _list_file(pattern)) is None:
            yield pattern, ""
            continue
        count = 0
        for number, line in enumerate(_lines(file), start=1):
            if not line or line.startswith("#"):
                continue
            count += 1
            origin = f"{file}: line {number}: "
            if line.startswith("@"):
                raise DataError(f"{origin}{line}: a list of paths cannot name another list")
            yield line if is_remote(line) else os.path.join(file.parent, line), origin
        if not count:
            raise DataError(f"{file}: lists no paths; expected one per line")


def _list_file(pattern: str) -> Path | None:
    """The text file of paths that a pattern names; None if it is something else."""
    if is_remote(pattern) or "\0" in pattern or os.path.isdir(pattern):
        return None
    if pattern.startswith("@") and not os.path.exists(pattern):
        return Path(pattern[1:])
    if pattern.lower().endswith(".txt") and os.path.isfile(pattern) and not h5py.is_hdf5(pattern):
        return Path(pattern)
    return None


def _lines(file: Path) -> list[str]:
    try:
        data = file.read_bytes() if file.is_file() or not file.exists() else None
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if data is None or b"\0" in data:
        raise DataError(f"{file}: is not a text file of paths, one per line")
    return [os.fsdecode(line).strip() for line in data.removeprefix(codecs.BOM_UTF8).splitlines()]
