"""Layout of a dataset in its file (offsets, chunks, filters) for the native reader."""

from __future__ import annotations

import contextlib
import importlib
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from spinlock_fast import _native
from spinlock_fast.data.input_files import H5PY_ERRORS, FileIdentity
from spinlock_fast.errors import DataError

_UNWRITTEN = np.iinfo(np.uint64).max
_FILTER_NAMES = {
    4: "szip",
    5: "nbit",
    6: "scaleoffset",
    307: "bzip2",
    32000: "lzf",
    32001: "blosc",
    32004: "lz4",
    32008: "bitshuffle",
    32013: "zfp",
    32015: "zstd",
    32026: "blosc2",
}
_BLOSC = (32001, 32026)
_MAX_CHUNKS = 1 << 24
_LISTED_CHUNKS = 1 << 16  # stored in the tables at a time
_CONTIGUOUS_BYTES = 1 << 20  # per read task
_COMPARED_CHUNKS = 4  # per dataset, compared with the chunks that libhdf5 finds
_MAX_COMPARED_BYTES = 16 << 20  # larger chunks are not compared


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive rows of a dataset, stored in one dataset of a file."""

    rows: int
    file: Path
    identity: FileIdentity
    layout: dict[str, Any] | None  # see `native_layout`; None if h5py must read
    unmapped: bool = False  # no source of a virtual dataset holds the rows


class NotNativeError(Exception):
    """The native reader does not support a dataset; the message completes "read through h5py because of"."""


def native_layout(handle: h5py.File, dataset: h5py.Dataset) -> dict[str, Any]:
    """Layout of a dataset as `_native.RowReader` expects it.

    Args:
        handle: the file that stores the dataset.
        dataset: a dataset of numbers.

    Raises:
        NotNativeError: the native reader could return other values than libhdf5.
    """
    plist = dataset.id.get_create_plist()
    if dataset.shape[0] == 0:
        return {"rows": 0, "swapped": False, "offset": 0, "chunk_rows": 1}  # an empty shard of any layout
    if handle.swmr_mode:
        raise NotNativeError("a writer that has the file open")
    if handle.driver not in ("sec2", "fileobj"):
        raise NotNativeError(f"the file driver {handle.driver}")  # offsets do not refer to a single file
    if handle.userblock_size and h5py.version.hdf5_version_tuple < (1, 14, 3):
        raise NotNativeError("the user block")  # older versions return offsets without the user block
    if dataset.is_virtual:
        raise NotNativeError("its virtual layout")
    if plist.get_external_count() > 0:
        raise NotNativeError("its external files")
    if not dataset.id.get_type().equal(h5py.h5t.py_create(dataset.dtype)):
        raise NotNativeError("its number type")  # libhdf5 converts the values
    common = {"rows": dataset.shape[0], "swapped": not dataset.dtype.isnative}
    layout = plist.get_layout()
    if layout == h5py.h5d.CONTIGUOUS:
        offset = dataset.id.get_offset()
        if offset is None or dataset.id.get_storage_size() != dataset.size * dataset.dtype.itemsize:
            raise NotNativeError("values that were never written")
        row_bytes = prod(dataset.shape[1:]) * dataset.dtype.itemsize
        return {**common, "offset": offset, "chunk_rows": max(1, _CONTIGUOUS_BYTES // row_bytes)}
    if layout == h5py.h5d.CHUNKED:
        return {**common, **_chunks(dataset, plist)}
    raise NotNativeError("its compact layout")


def _chunks(dataset: h5py.Dataset, plist: Any) -> dict[str, Any]:
    filters = _filter_pipeline(plist)
    grid = tuple(-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True))
    if prod(grid) > _MAX_CHUNKS:
        raise NotNativeError(f"a grid of {prod(grid):,} chunks")
    if dataset.maxshape[0] is not None and dataset.maxshape.count(None) == 1:
        # libhdf5 up to 2.0 lists such chunks with wrong coordinates: its index for one growing dimension (an extensible
        # array) stores that dimension first, and the listing does not restore the order.
        raise NotNativeError("one growing dimension that is not the first, where libhdf5 misplaces chunks")
    offsets, sizes, masks, partial = _list_chunks(dataset, grid)
    _check_offsets(dataset, offsets, grid)
    _check_blosc(dataset, filters, offsets, grid)
    fill = np.zeros((), dataset.dtype.newbyteorder("="))
    if (offsets == _UNWRITTEN).any():
        if plist.fill_value_defined() == h5py.h5d.FILL_VALUE_UNDEFINED or (
            plist.get_fill_time() == h5py.h5d.FILL_TIME_NEVER
        ):
            raise NotNativeError("chunks without values")
        plist.get_fill_value(fill)
    chunk_bytes = prod(dataset.chunks) * dataset.dtype.itemsize
    # Edge chunks may be stored unfiltered (H5D_CHUNK_DONT_FILTER_PARTIAL_CHUNKS), which h5py does not expose. All of
    # them then have the size of a raw chunk; a chunk of another size shows that they are filtered.
    if filters and partial.any() and (sizes[partial] == chunk_bytes).all():
        raise NotNativeError("edge chunks that may be stored unfiltered")
    return {
        "chunk_rows": dataset.chunks[0],
        "chunk_shape": list(dataset.chunks[1:]),
        "filters": filters,
        "fill": fill.tobytes(),
        "offsets": offsets,
        "sizes": sizes,
        "masks": masks,
    }


def _check_offsets(dataset: h5py.Dataset, offsets: NDArray[np.uint64], grid: tuple[int, ...]) -> None:
    """Raises NotNativeError if libhdf5 finds other bytes by the coordinates of a chunk than by its listed offset.

    Compares the stored bytes of the last chunk and of a few others: a listing with swapped dimensions is correct only
    for the first chunks.
    """
    chunk_bytes = prod(dataset.chunks) * dataset.dtype.itemsize
    if (offsets != _UNWRITTEN).sum() < 2 or chunk_bytes > _MAX_COMPARED_BYTES or dataset.file.driver != "sec2":
        return  # a remote file has another driver; its index is compared with that of its copy
    descriptor = dataset.file.id.get_vfd_handle()
    for cell, origin in _sampled_chunks(dataset, offsets, grid):
        try:
            stored = dataset.id.read_direct_chunk(origin)[1]
            listed = os.pread(descriptor, len(stored), int(offsets[cell]))
        except (*H5PY_ERRORS, OverflowError):
            continue  # damage is reported when the rows are read
        if len(listed) == len(stored) and listed != stored:
            raise NotNativeError("a listing of its chunks that contradicts libhdf5")


def _check_blosc(
    dataset: h5py.Dataset, filters: list[tuple[int, list[int]]], offsets: NDArray[np.uint64], grid: tuple[int, ...]
) -> None:
    """Raises NotNativeError if chunks use features of blosc that the native reader lacks; only the chunks tell."""
    chunk_bytes = prod(dataset.chunks) * dataset.dtype.itemsize
    if not any(code in _BLOSC for code, _ in filters) or chunk_bytes > _MAX_COMPARED_BYTES:
        return
    for _, origin in _sampled_chunks(dataset, offsets, grid):
        try:
            mask, stored = dataset.id.read_direct_chunk(origin)
            _native.decode_chunk(stored, mask, filters, chunk_bytes, False)
        except NotImplementedError as error:
            raise NotNativeError(str(error)) from None
        except (*H5PY_ERRORS, ValueError):
            continue  # damage is reported when the rows are read


def _sampled_chunks(
    dataset: h5py.Dataset, offsets: NDArray[np.uint64], grid: tuple[int, ...]
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Cell and origin of the last written chunk and of a few others."""
    present = np.flatnonzero(offsets != _UNWRITTEN)
    steps = range(1, _COMPARED_CHUNKS + 1) if len(present) else ()
    for cell in {int(present[i * (len(present) - 1) // _COMPARED_CHUNKS]) for i in steps}:
        yield cell, tuple(int(i) * size for i, size in zip(np.unravel_index(cell, grid), dataset.chunks, strict=True))


def check_filters(file: Path, dataset: h5py.Dataset) -> None:
    """Raises DataError if libhdf5 lacks a filter of the dataset and the package hdf5plugin does not provide it."""
    plist = dataset.id.get_create_plist()
    for i in range(plist.get_nfilters()):
        code = plist.get_filter(i)[0]
        if h5py.h5z.filter_avail(code):
            continue
        with contextlib.suppress(ImportError):
            importlib.import_module("hdf5plugin")
        if not h5py.h5z.filter_avail(code):
            name = _FILTER_NAMES.get(code, code)
            raise DataError(
                f"{file}: {dataset.name.lstrip('/')}: compressed with the filter {name}, which "
                "this installation of HDF5 lacks; pip install hdf5plugin may bring it"
            )


def _filter_pipeline(plist: Any) -> list[tuple[int, list[int]]]:
    """(registered number, client data) of each filter, in the order of writing."""
    filters: list[tuple[int, list[int]]] = []
    for i in range(plist.get_nfilters()):
        code, _, values, _ = plist.get_filter(i)
        filters.append((int(code), [int(value) for value in values]))
        if code not in _native.filter_numbers():
            raise NotNativeError(f"the filter {_FILTER_NAMES.get(code, code)}")
    if len({code for code, _ in filters}) < len(filters):
        raise NotNativeError("an unusual pipeline of filters")
    try:
        _native.check_filters(filters)
    except NotImplementedError as error:
        raise NotNativeError(str(error)) from None
    return filters


def _list_chunks(
    dataset: h5py.Dataset, grid: tuple[int, ...]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint32], NDArray[np.bool_]]:
    """Offset, stored size and filter mask of each chunk of the grid, and which are partial (edge chunks)."""
    cells = prod(grid)
    offsets = np.full(cells, _UNWRITTEN, np.uint64)
    sizes = np.zeros(cells, np.uint64)
    masks = np.zeros(cells, np.uint32)
    partial = np.zeros(cells, bool)
    # A tuple for each of millions of chunks takes a lot of memory, and time of the garbage collector: the numbers of
    # a block of chunks at a time are collected in arrays, and go to the tables.
    block = [array("Q") for _ in range(4)]
    add_origin, add_mask, add_offset, add_size = block[0].extend, block[1].append, block[2].append, block[3].append
    count = 0

    def record(info: Any) -> bool | None:
        origin, mask, offset, size = info
        add_origin(origin)
        add_mask(mask)
        add_offset(offset)
        add_size(size)
        if len(block[1]) < _LISTED_CHUNKS:
            return None
        store()
        return True if count > cells else None  # the index of a damaged file may contain a cycle

    def store() -> None:
        nonlocal count
        listed = [np.array(values, np.uint64) for values in block]
        origin = listed[0].astype(np.int64).reshape(-1, len(grid))  # [chunks, dimensions]
        if (origin % dataset.chunks).any() or (origin >= dataset.shape).any() or (origin < 0).any():
            raise ValueError("its index names chunks outside the dataset")
        cell = np.ravel_multi_index(tuple((origin // dataset.chunks).T), grid)
        masks[cell], offsets[cell], sizes[cell] = listed[1:]
        partial[cell] = (origin + dataset.chunks > dataset.shape).any(1)
        count += len(cell)
        for values in block:
            del values[:]

    if cells:
        dataset.id.chunk_iter(record)
    store()
    if count > cells:
        raise ValueError("its index names chunks outside the dataset")
    if np.count_nonzero(offsets != _UNWRITTEN) < count:
        raise ValueError("its index names a chunk twice")
    return offsets, sizes, masks, partial
