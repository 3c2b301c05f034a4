"""Index of one dataset in one file: shape, type, and where its values are stored."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import h5py
import numpy as np

from spinlock_fast.data.backing_files import BackingFile, linked_files, sources_of
from spinlock_fast.data.hdf5_links import ExternalFilePolicy, LinkTrace, get_dataset
from spinlock_fast.data.input_files import FileIdentity, fetched, identify, open_file, reporting_damage
from spinlock_fast.data.native_layout import NotNativeError, Segment, check_filters, native_layout
from spinlock_fast.data.packing import Packing, read_packing
from spinlock_fast.data.remote_files import remote_file
from spinlock_fast.data.virtual_segments import virtual_segments
from spinlock_fast.errors import DataError
from spinlock_fast.interrupts import deferred_interrupts

log = logging.getLogger(__name__)

_ITEM_SIZES = {"f": (2, 4, 8), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "b": (1,)}
_CACHE_SIZE = 256


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """One dataset in one file."""

    file: Path
    identity: FileIdentity
    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]  # in native byte order; uint8 for booleans
    chunk_rows: int  # rows per chunk; 1 if not chunked
    chunk_bytes: int  # decoded size of a chunk; 0 if not chunked
    native_layout: dict[str, Any] | None  # for `_native.RowReader`; None if h5py must read
    h5py_reason: str  # why h5py must read some rows; empty otherwise
    swmr: bool  # a writer has the file open in SWMR mode: it may change
    storage_file: Path  # the file that stores the dataset; differs from `file` behind an external link
    storage_identity: FileIdentity
    backing_files: tuple[BackingFile, ...]  # other files reached through links and virtual or external sources
    packing: Packing | None  # of packed numbers
    matlab: bool  # written by MATLAB, which reverses the axes
    virtual_segments: tuple[Segment, ...] = ()  # of a virtual dataset that is read natively

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Its rows by the file that stores them."""
        return self.virtual_segments or (
            Segment(self.shape[0], self.storage_file, self.storage_identity, self.native_layout),
        )

    @property
    def identities(self) -> tuple[FileIdentity, ...]:
        """Identities of all files that hold its values."""
        return (self.identity, *(backing.identity for backing in self.backing_files))

    @property
    def stays_open(self) -> bool:
        """Whether h5py may keep the dataset open between reads.

        An open virtual dataset would keep its sources open. An open dataset that grows would become invalid when
        another identifier of it is refreshed: libhdf5 would then read other rows.
        """
        return not self.backing_files and not self.swmr

    @property
    def chunks_hold_rows(self) -> bool:
        """Whether chunks, if there are any, hold whole rows."""
        row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        return not self.chunk_bytes or self.chunk_bytes >= self.chunk_rows * row_bytes

    def check_unchanged(self, low: int = 0, high: int | None = None) -> None:
        """Raises DataError if a file that holds values of rows [low, high) has changed since it was indexed."""
        if self.swmr:
            return
        if identify(self.file) != self.identity:
            raise DataError("the file has changed since it was opened")
        for backing in self.backing_files:
            if (
                backing.holds(low, self.shape[0] if high is None else high)
                and identify(backing.path) != backing.identity
            ):
                raise DataError(f"{backing.path}, a source of its values, has changed since it was opened")


_cache: OrderedDict[tuple[str, FileIdentity, str, bool], ShardIndex] = OrderedDict()
_cache_lock = Lock()


def index_file(file: Path, paths: list[str], policy: ExternalFilePolicy | None = None) -> dict[str, ShardIndex]:
    """Indexes datasets of one file; results are cached while the files are unchanged.

    Returns:
        Index by dataset path.

    Raises:
        DataError: the file cannot be read, a dataset is missing or holds no rows of numbers, or a file that holds its
            values violates the policy.
    """
    policy = policy or ExternalFilePolicy()
    identity = identify(file)
    keys = {path: (str(file.absolute()), identity, path, policy.allow_external) for path in paths}
    with _cache_lock:
        indexes = {path: _cache[key] for path, key in keys.items() if key in _cache}
    missing = [path for path in paths if path not in indexes or not _is_current(indexes[path])]
    if missing:
        indexes.update(_index_remote(file, missing, policy) or _index_local(file, missing, policy))
    with _cache_lock:
        for path, key in keys.items():
            if not indexes[path].swmr:  # a flush of its writer may change neither size nor modification time
                _cache[key] = indexes[path]
                _cache.move_to_end(key)
        while len(_cache) > _CACHE_SIZE:
            _cache.popitem(last=False)
    return {path: indexes[path] for path in paths}


def index_copy(index: ShardIndex) -> ShardIndex:
    """Indexes the local copy of a remote file."""
    return _index_local(index.file, [index.path], ExternalFilePolicy())[index.path]


def _index_local(file: Path, paths: list[str], policy: ExternalFilePolicy) -> dict[str, ShardIndex]:
    identity = identify(file)
    indexes = {}
    with fetched(file), deferred_interrupts(), open_file(file) as handle:
        for path in paths:
            with reporting_damage(file, path):
                indexes[path] = _index(file, identity, handle, path, policy)
        swmr = handle.swmr_mode
    if identify(file) != identity and not swmr:
        raise DataError(f"{file}: the file changed while it was opened")
    return indexes


def _index_remote(file: Path, paths: list[str], policy: ExternalFilePolicy) -> dict[str, ShardIndex] | None:
    """Indexes a remote file that has no copy yet, by reading parts of it; None if this is not possible."""
    if (remote := remote_file(file)) is None or file.exists():
        return None
    try:
        with remote.open() as stream, h5py.File(stream, "r") as handle:
            return {path: _index(file, identify(file), handle, path, policy) for path in paths}
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - each store has its own; downloading shows whether it can be read
        log.info("%s: cannot be read in parts (%s), downloading it", remote.name, type(error).__name__)
        return None


def _is_current(index: ShardIndex) -> bool:
    try:
        return all(identify(backing.path) == backing.identity for backing in index.backing_files)
    except DataError:
        return False


def _index(file: Path, identity: FileIdentity, handle: h5py.File, path: str, policy: ExternalFilePolicy) -> ShardIndex:
    trace = LinkTrace()
    dataset = get_dataset(file, handle, path, policy, trace)
    if dataset.file.swmr_mode:
        dataset.refresh()  # the file may be open in this process, which then keeps the shape that it has read
    storage_file = trace.files[-1] if trace.files else file
    backing_files = linked_files(trace) + sources_of(storage_file, dataset, policy)
    dtype, shape = dataset.dtype, dataset.shape
    if dtype.kind not in _ITEM_SIZES:
        raise DataError(f"{file}: {path}: expected numbers, got {dtype}")
    if dtype.itemsize not in _ITEM_SIZES[dtype.kind]:
        raise DataError(f"{file}: {path}: numbers of type {dtype} have no torch type")
    if not shape:
        raise DataError(f"{file}: {path}: no rows (shape {shape})")
    if 0 in shape[1:]:
        raise DataError(f"{file}: {path}: no columns (shape {shape})")
    chunks = dataset.chunks
    chunk_rows, chunk_bytes = chunks[0] if chunks else 1, prod(chunks) * dtype.itemsize if chunks else 0
    layout, h5py_reason = None, ""
    segments: tuple[Segment, ...] = ()
    try:
        if dataset.is_virtual and shape[0]:
            virtual = virtual_segments(storage_file, dataset, policy)
            segments, h5py_reason = virtual.segments, virtual.h5py_reason
            chunk_rows, chunk_bytes = virtual.chunk_rows, virtual.chunk_bytes
        else:
            layout = native_layout(dataset.file, dataset)
    except NotNativeError as error:
        h5py_reason = str(error)
        check_filters(file, dataset)
    return ShardIndex(
        file,
        identity,
        path,
        shape,
        np.dtype("u1" if dtype.kind == "b" else dtype.str).newbyteorder("="),  # drops the metadata of enumerations
        chunk_rows,
        chunk_bytes,
        layout,
        h5py_reason,
        dataset.file.swmr_mode,
        storage_file,
        identify(storage_file),
        tuple(backing_files),
        read_packing(dataset) if dtype.kind != "b" else None,
        "MATLAB_class" in dataset.attrs,
        segments,
    )


def file_description(file: Path, identity: FileIdentity, label: str) -> dict[str, Any]:
    """Description of a file for `_native.RowReader`; `label` is its name in error messages."""
    label = label.encode(errors="backslashreplace").decode()
    return {
        "path": os.fsencode(file),
        "label": label,
        "device": identity.device,
        "inode": identity.inode,
        "size": identity.size,
        "mtime_ns": identity.mtime_ns,
    }
