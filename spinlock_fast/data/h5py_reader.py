"""Reading rows through h5py, for datasets that the native reader does not support."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
from h5py._objects import phil
from numpy.typing import NDArray

from spinlock_fast.data.input_files import H5PY_ERRORS, TooManyOpenFilesError, open_file
from spinlock_fast.data.shard_index import ShardIndex
from spinlock_fast.errors import DataError
from spinlock_fast.messages import one_line

_MAX_OPEN_FILES = 16
_SPARE_DESCRIPTORS = 4  # libhdf5 opens a file before it detects that it is already open


@dataclass
class _OpenDataset:
    id: h5py.h5d.DatasetID
    space: h5py.h5s.SpaceID
    memory_type: h5py.h5t.TypeID  # its type in native byte order
    fill: Any = None  # of a virtual dataset


@dataclass
class _OpenFile:
    handle: h5py.File
    datasets: dict[str, _OpenDataset] = field(default_factory=dict)

    def close(self) -> None:
        self.datasets.clear()
        self.handle.close()


class H5pyReader:
    """Reads rows through h5py; keeps the most recently used files and their datasets open. For one thread."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, _OpenFile] = OrderedDict()  # least recently used first

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def read(self, index: ShardIndex, low: int, high: int, out: NDArray[Any]) -> None:
        """Reads rows [low, high) of a shard.

        Args:
            index: the shard.
            low: first row within the shard.
            high: end of the rows.
            out: receives the rows [high - low, *row_shape]; C-contiguous, of the type of the shard.

        Raises:
            DataError: the rows cannot be read; names file, dataset and rows.
        """
        sources = sorted(
            {source.path for source in index.backing_files if source.opened_by_hdf5 and source.holds(low, high)}
        )
        if len(sources) > _MAX_OPEN_FILES and high - low > 1:  # in parts: not all sources may be open at a time
            middle = (low + high) // 2
            self.read(index, low, middle, out[: middle - low])
            self.read(index, middle, high, out[middle - low :])
            return
        error: BaseException | None = None
        try:
            self._read_with_sources(index, sources, low, high, out)
        except TooManyOpenFilesError as full:
            raise DataError(f"{_location(index, low, high)}: {full}") from None
        except H5PY_ERRORS as caught:
            error = caught
        try:
            index.check_unchanged(low, high)
        except DataError as changed:
            raise DataError(f"{_location(index, low, high)}: {changed}") from None
        if isinstance(error, DataError):
            raise error
        if error is not None:
            raise DataError(f"{_location(index, low, high)} cannot be read, the file is damaged: {one_line(error)}")

    def _read_with_sources(
        self, index: ShardIndex, sources: list[Path], low: int, high: int, out: NDArray[Any]
    ) -> None:
        """Reads rows through libhdf5, which returns fill values for a source that it cannot open.

        All sources of the rows are therefore opened first, and a few file descriptors are left free for libhdf5.
        """
        files = [index.file, *sources]
        for file in files:
            self._open(file, files)
        spare: list[int] = []
        try:
            while index.backing_files and len(spare) < _SPARE_DESCRIPTORS:
                try:
                    spare.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
                except OSError:
                    self._close_oldest(files)
        finally:
            for descriptor in spare:
                os.close(descriptor)
        with phil:  # a dataset that is open elsewhere in this process must not be refreshed in between
            self._read_rows(index, low, high, out)

    def _read_rows(self, index: ShardIndex, low: int, high: int, out: NDArray[Any]) -> None:
        dataset = self._dataset(index)
        if dataset.fill is not None:  # libhdf5 leaves rows without a source unset if others have two sources
            out[...] = dataset.fill
        dataset.space.select_hyperslab((low,) + (0,) * (out.ndim - 1), out.shape)
        dataset.id.read(h5py.h5s.create_simple(out.shape), dataset.space, out, dataset.memory_type)

    def _dataset(self, index: ShardIndex) -> _OpenDataset:
        opened = self._files[index.file]
        dataset = opened.datasets.get(index.path)
        if dataset is None:
            id = h5py.h5d.open(opened.handle.id, index.path.encode(errors="surrogateescape"), _access(index))
            node = h5py.Dataset(id)
            memory_type = h5py.h5t.py_create(node.dtype.newbyteorder("="))
            fill = node.fillvalue if node.is_virtual else None
            dataset = _OpenDataset(id, id.get_space(), memory_type, fill)
            if index.stays_open:
                opened.datasets[index.path] = dataset
        return dataset

    def _open(self, file: Path, kept: list[Path]) -> None:
        while file not in self._files:
            try:
                if len(self._files) >= max(_MAX_OPEN_FILES, len(kept)):
                    self._close_oldest(kept)
                self._files[file] = _OpenFile(open_file(file))
            except TooManyOpenFilesError:
                self._close_oldest(kept)
        self._files.move_to_end(file)

    def _close_oldest(self, kept: list[Path]) -> None:
        """Closes the least recently used file; raises TooManyOpenFilesError if all are sources."""
        oldest = next((file for file in self._files if file not in kept), None)
        if oldest is None:
            raise TooManyOpenFilesError(
                f"{kept[0]}: {len(kept) + _SPARE_DESCRIPTORS} files must be open at a time, but this process may not "
                "open more; raise the limit with `ulimit -n`"
            )
        self._files.pop(oldest).close()


def _access(index: ShardIndex) -> h5py.h5p.PropDAID:
    """Access properties: a cache of one decoded chunk if chunks hold whole rows.

    Consecutive chunks in the larger cache of libhdf5 would each occupy other memory, which is not in that of the CPU.
    """
    properties = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
    if index.chunk_bytes and index.stays_open and index.chunks_hold_rows:
        slots, _, _ = properties.get_chunk_cache()
        properties.set_chunk_cache(slots, index.chunk_bytes, 1.0)
    return properties


def _location(index: ShardIndex, low: int, high: int) -> str:
    return f"{index.file}: {index.path}: rows {low}..{high - 1}"
