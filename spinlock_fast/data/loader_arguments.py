"""Checks and conversions of the arguments of `HDF5Loader`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import h5py

from spinlock_fast.config.byte_sizes import parse_bytes
from spinlock_fast.errors import ConfigError


def path_strings(paths: Any) -> list[str]:
    """Converts paths to strings; raises ConfigError for other types."""
    items = [paths] if isinstance(paths, (str, bytes, os.PathLike, h5py.HLObject)) else paths
    strings = []
    for path in items if isinstance(items, Sequence) else [items]:
        if isinstance(path, h5py.HLObject):
            name = path.file.filename if path else "the path of its file"
            raise ConfigError(f"paths: got an open h5py {type(path).__name__}; close it and pass its path, {name!r}")
        if not isinstance(path, (str, bytes, os.PathLike)):
            raise ConfigError(f"paths: got {type(path).__name__}, expected a path, a glob, or a list of those")
        strings.append(os.fsdecode(path))
    return strings


def names(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else [str(name) for name in names]


def checked_bytes(name: str, value: str | int) -> int:
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}, got {value!r}") from None


def checked_int(name: str, value: int, minimum: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name}: {value!r}, expected a whole number of at least {minimum}")
    return value
