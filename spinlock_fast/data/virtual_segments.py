"""Where the sources of a virtual dataset store its rows, for the native reader."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import h5py

from spinlock_fast.data.backing_files import source_file
from spinlock_fast.data.hdf5_links import ExternalFilePolicy, LinkTrace, get_dataset
from spinlock_fast.data.input_files import H5PY_ERRORS, FileIdentity, identify, open_file
from spinlock_fast.data.native_layout import NotNativeError, Segment, check_filters, native_layout

_Box = tuple[tuple[int, int], ...]  # [start, stop) in each dimension


@dataclass
class VirtualSegments:
    """Segments of a virtual dataset, and the largest chunks of its sources."""

    segments: tuple[Segment, ...] = ()
    h5py_reason: str = ""  # why h5py reads some of them; empty if none
    chunk_rows: int = 1
    chunk_bytes: int = 0


@dataclass
class _Source:
    shape: tuple[int, ...]
    chunks: tuple[int, ...] | None
    item_size: int
    file: Path
    identity: FileIdentity
    layout: dict[str, Any] | None  # None if h5py must read
    h5py_reason: str = ""


def virtual_segments(file: Path, dataset: h5py.Dataset, policy: ExternalFilePolicy) -> VirtualSegments:
    """Finds the stored rows of a virtual dataset whose sources hold whole rows: `native_layout` of each source.

    h5py reads the rows of a source that the native reader does not support, and rows without a source, which have the
    fill value.

    Args:
        file: the file that stores the dataset.
        dataset: a virtual dataset; all its sources exist, see `backing_files.sources_of`.
        policy: files that are allowed.

    Raises:
        NotNativeError: h5py must read all rows: a source holds parts of rows, or an unlimited or strided selection.
        DataError: a source cannot be read.
    """
    if dataset.file.swmr_mode:
        raise NotNativeError("a writer that has the file open")
    found = VirtualSegments()
    row_shape, segments, end = dataset.shape[1:], [], 0
    with ExitStack() as stack:
        sources = _Sources(file, dataset, policy, stack)
        for (low, high), mapping in sorted(_mapped_rows(dataset), key=lambda entry: entry[0]):
            if low < end:
                raise NotNativeError("its virtual sources, which overlap")
            if low > end:
                segments.append(sources.without_source(low - end))
            source = sources.open(mapping)
            segments.append(_segment(source, mapping.src_space, high - low, row_shape))
            if source.chunks is not None:
                stacked = source.shape == row_shape
                found.chunk_rows = max(found.chunk_rows, 1 if stacked else source.chunks[0])
                found.chunk_bytes = max(found.chunk_bytes, prod(source.chunks) * source.item_size)
            found.h5py_reason = found.h5py_reason or source.h5py_reason
            end = high
        if end < dataset.shape[0]:
            segments.append(sources.without_source(dataset.shape[0] - end))
    missing = sum(segment.rows for segment in segments if segment.layout is None and segment.unmapped)
    if missing:
        found.h5py_reason = f"{missing} rows without a virtual source, which have the fill value"
    if all(segment.layout is None for segment in segments):
        raise NotNativeError(found.h5py_reason)
    found.segments = tuple(segments)
    return found


def _mapped_rows(dataset: h5py.Dataset) -> Iterator[tuple[tuple[int, int], Any]]:
    """Rows of the virtual dataset that each mapping fills, and the mapping."""
    for mapping in dataset.virtual_sources():
        if any("%b" in name.replace("%%", "") for name in (mapping.file_name, mapping.dset_name)):
            raise NotNativeError("its numbered virtual sources")
        rows, *rest = _box(mapping.vspace, dataset.shape)
        if tuple(rest) != tuple((0, size) for size in dataset.shape[1:]):
            raise NotNativeError("its virtual sources, which hold parts of rows")
        yield rows, mapping


def _box(space: h5py.h5s.SpaceID, shape: tuple[int, ...]) -> _Box:
    """The selected box of a dataset of a shape; raises NotNativeError if the selection is not a box."""
    if space.get_select_type() == h5py.h5s.SEL_ALL:
        return tuple((0, size) for size in shape)
    try:
        low, high = space.get_select_bounds()
    except H5PY_ERRORS:
        raise NotNativeError("an unlimited virtual source") from None
    box = tuple((int(start), int(last) + 1) for start, last in zip(low, high, strict=True))
    if prod(stop - start for start, stop in box) != space.get_select_npoints():
        raise NotNativeError("a virtual source with gaps")
    return box


@dataclass
class _Sources:
    """Opens the sources of a virtual dataset, each once."""

    file: Path
    dataset: h5py.Dataset
    policy: ExternalFilePolicy
    stack: ExitStack
    opened: dict[Path, h5py.File] = field(default_factory=dict)  # the last one
    known: dict[tuple[Path, str], _Source] = field(default_factory=dict)

    def open(self, mapping: Any) -> _Source:
        file = source_file(self.file, mapping.file_name.replace("%%", "%"), self.dataset, self.policy)
        path = mapping.dset_name.replace("%%", "%")
        if file is None:
            raise NotNativeError("its virtual sources")
        if (file, path) not in self.known:
            self.known[file, path] = self._read(file, path)
        return self.known[file, path]

    def _read(self, file: Path, path: str) -> _Source:
        if file not in self.opened:
            self.stack.close()
            self.opened = {file: self.stack.enter_context(open_file(file))}
        trace = LinkTrace()
        inner = get_dataset(file, self.opened[file], path, self.policy, trace)
        stored = trace.files[-1] if trace.files else file
        layout, reason = None, ""
        try:
            if inner.dtype.newbyteorder("=") != self.dataset.dtype.newbyteorder("="):
                raise NotNativeError("another type of numbers")
            layout = native_layout(inner.file, inner)
        except NotNativeError as error:
            reason = f"{error} of a virtual source"
            check_filters(stored, inner)
        return _Source(inner.shape, inner.chunks, inner.dtype.itemsize, stored, identify(stored), layout, reason)

    def without_source(self, rows: int) -> Segment:
        return Segment(rows, self.file, identify(self.file), None, unmapped=True)


def _segment(source: _Source, space: h5py.h5s.SpaceID, rows: int, row_shape: tuple[int, ...]) -> Segment:
    """The rows of a mapping; raises NotNativeError if its source does not hold whole rows."""
    (first, stop), *rest = box = _box(space, source.shape)
    stacked = source.shape == row_shape  # the whole source is one row
    if stacked:
        whole = rows == 1 and box == tuple((0, size) for size in row_shape)
    else:
        whole = stop - first == rows and source.shape[1:] == row_shape and rest == [(0, size) for size in row_shape]
    if not whole:
        raise NotNativeError("its virtual sources, which hold parts of rows")
    if source.layout is None:
        return Segment(rows, source.file, source.identity, None)
    layout = _one_row(source) if stacked else _row_range(source, source.layout, first, stop)
    return Segment(rows, source.file, source.identity, layout)


def _one_row(source: _Source) -> dict[str, Any]:
    layout = {**(source.layout or {}), "rows": 1, "chunk_rows": 1}
    return layout if source.chunks is None else {**layout, "chunk_shape": list(source.chunks)}


def _row_range(source: _Source, layout: dict[str, Any], first: int, stop: int) -> dict[str, Any]:
    part = {**layout, "rows": stop - first}
    if source.chunks is None:
        row_bytes = prod(source.shape[1:]) * source.item_size
        return {**part, "offset": layout["offset"] + first * row_bytes, "preceding": first}
    step = source.chunks[0]
    columns = prod(-(-size // chunk) for size, chunk in zip(source.shape[1:], source.chunks[1:], strict=True))
    chunk_rows = slice(first // step * columns, -(-stop // step) * columns)
    tables = {name: layout[name][chunk_rows] for name in ("offsets", "sizes", "masks")}
    return {**part, **tables, "skipped": first % step, "preceding": first // step * step}
