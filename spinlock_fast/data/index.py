"""What is known of one dataset in one file: shape, type, where its values lie."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import h5py
import numpy as np

from spinlock_fast.data.backing import BackingFile, passed_files, sources_of
from spinlock_fast.data.files import Identity, identify, naming_damage, open_file
from spinlock_fast.data.links import Boundary, Trace, get_dataset
from spinlock_fast.data.native_layout import NotNativeError, check_filters, native_layout
from spinlock_fast.data.packing import Packing, read_packing
from spinlock_fast.errors import DataError

_ITEM_SIZES = {"f": (2, 4, 8), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "b": (1,)}
_REMEMBERED = 256


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """One dataset in one file."""

    file: Path
    identity: Identity
    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]  # in native byte order; uint8 for booleans
    chunk_rows: int  # rows that are decoded together; 1 where not chunked
    chunk_bytes: int  # decoded size of a chunk; 0 where not chunked
    native: dict[str, Any] | None  # for `_native.RowReader`; None where h5py must read
    reason: str  # why h5py must read
    growing: bool  # a writer has it open for others to read: it may change
    home: Path  # the file that holds the dataset: another one behind an external link
    home_identity: Identity
    backing: tuple[BackingFile, ...]  # other files that links and sources lead to
    packing: Packing | None  # what stored numbers stand for
    matlab: bool  # written by MATLAB, which reverses the axes

    @property
    def identities(self) -> tuple[Identity, ...]:
        """Of all files that it takes values from."""
        return (self.identity, *(other.identity for other in self.backing))

    def check_unchanged(self, low: int = 0, high: int | None = None) -> None:
        """Raises DataError where a file that holds values of rows [low, high) is not what it was."""
        if self.growing:
            return
        if identify(self.file) != self.identity:
            raise DataError("the file has changed since it was opened")
        for other in self.backing:
            if other.holds(low, self.shape[0] if high is None else high) and identify(other.path) != other.identity:
                raise DataError(f"{other.path}, which it takes values from, has changed since it was opened")


_known: OrderedDict[tuple[str, Identity, str, bool], ShardIndex] = OrderedDict()
_known_lock = Lock()


def index_file(file: Path, paths: list[str], boundary: Boundary | None = None) -> dict[str, ShardIndex]:
    """Indexes of datasets of one file, by path; remembered while the files stay as they are.

    Raises:
        DataError: the file cannot be read, a dataset is missing or holds no rows of numbers, or takes values from
            outside of the boundary.
    """
    boundary = boundary or Boundary()
    identity = identify(file)
    keys = {path: (str(file.absolute()), identity, path, boundary.external) for path in paths}
    with _known_lock:
        found = {path: _known[key] for path, key in keys.items() if key in _known}
    missing = [path for path in paths if path not in found or not _up_to_date(found[path])]
    if missing:
        with open_file(file) as handle:
            for path in missing:
                with naming_damage(file, path):
                    found[path] = _index(file, identity, handle, path, boundary)
            growing = handle.swmr_mode
        if identify(file) != identity and not growing:
            raise DataError(f"{file}: the file changed while it was opened")
    with _known_lock:
        for path, key in keys.items():
            _known[key] = found[path]
            _known.move_to_end(key)
        while len(_known) > _REMEMBERED:
            _known.popitem(last=False)
    return {path: found[path] for path in paths}


def _up_to_date(index: ShardIndex) -> bool:
    try:
        return all(identify(other.path) == other.identity for other in index.backing)
    except DataError:
        return False


def _index(file: Path, identity: Identity, handle: h5py.File, path: str, boundary: Boundary) -> ShardIndex:
    trace = Trace()
    dataset = get_dataset(file, handle, path, boundary, trace)
    home = trace.passed[-1] if trace.passed else file
    backing = passed_files(trace) + sources_of(home, dataset, boundary)
    dtype, shape = dataset.dtype, dataset.shape
    if dtype.kind not in _ITEM_SIZES:
        raise DataError(f"{file}: {path}: expected numbers, got {dtype}")
    if dtype.itemsize not in _ITEM_SIZES[dtype.kind]:
        raise DataError(f"{file}: {path}: numbers of type {dtype} have no torch type")
    if not shape:
        raise DataError(f"{file}: {path}: no rows (shape {shape})")
    if 0 in shape[1:]:
        raise DataError(f"{file}: {path}: no columns (shape {shape})")
    check_filters(file, dataset)
    chunks = dataset.chunks
    native, reason = None, ""
    try:
        native = native_layout(dataset.file, dataset)
    except NotNativeError as why:
        reason = str(why)
    return ShardIndex(
        file,
        identity,
        path,
        shape,
        np.dtype("u1" if dtype.kind == "b" else dtype.str).newbyteorder("="),  # without the metadata of enumerations
        chunks[0] if chunks else 1,
        prod(chunks) * dtype.itemsize if chunks else 0,
        native,
        reason,
        dataset.file.swmr_mode,
        home,
        identify(home),
        tuple(backing),
        read_packing(dataset) if dtype.kind != "b" else None,
        "MATLAB_class" in dataset.attrs,
    )


def file_description(file: Path, identity: Identity, label: str) -> dict[str, Any]:
    """A file as `_native.RowReader` takes it; messages call it `label`."""
    label = label.encode(errors="backslashreplace").decode()
    return {
        "path": os.fsencode(file),
        "label": label,
        "device": identity.device,
        "inode": identity.inode,
        "size": identity.size,
        "mtime_ns": identity.mtime_ns,
    }
