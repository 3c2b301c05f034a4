"""HDF5 files written block by block into disk space that is reserved first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from spinlock_fast.output.atomic_files import replacing, reserve_disk_space

METADATA_BYTES = 2**16  # headers and attributes
_CHUNK_OVERHEAD = 256  # bytes per chunk: index entry and growth by filters


def create_hdf5_file(path: Path, size: int = METADATA_BYTES, libver: Any = None) -> h5py.File:
    """Creates an HDF5 file and opens it for writing, with disk space for `size` bytes beyond its header.

    The header is created in memory, because HDF5 must not run out of disk space while it creates the file.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    with h5py.File(path, "w", driver="core", backing_store=False, libver=libver) as empty:
        empty.flush()
        header = empty.id.get_file_image()
    path.write_bytes(header)
    file = h5py.File(path, "r+", libver=libver)
    try:
        # Only after opening: HDF5 would count reserved space as part of the file.
        reserve_disk_space(path, 0, len(header) + size)
    except OSError:
        file.close()
        raise
    return file


class BlockWriter:
    """Writes blocks of rows into an HDF5 file; created by `replacing_hdf5`.

    Attributes:
        file: the open file; datasets and attributes created directly must take less than 64 KiB.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.file = create_hdf5_file(path)

    def write(self, dataset: h5py.Dataset, start: int, values: NDArray[Any]) -> None:
        """Writes rows of a dataset from `start` on; raises OSError if the disk is full."""
        if dataset.chunks:
            rows = dataset.chunks[0]
            chunks = len(values) // rows + 2  # the first and last chunk may be partial
            size = chunks * (rows * int(np.prod(values.shape[1:])) * values.dtype.itemsize + _CHUNK_OVERHEAD)
        else:  # the first write allocates the whole dataset
            size = dataset.size * dataset.dtype.itemsize
        reserve_disk_space(self._path, self.file.id.get_filesize(), size + METADATA_BYTES)
        dataset[start : start + len(values)] = values
        dataset.flush()

    def finish(self) -> None:
        """Closes the file."""
        self.file.flush()
        size = self.file.id.get_filesize()
        self.file.close()
        os.truncate(self._path, size)  # releases reserved disk space that was not needed


@contextmanager
def replacing_hdf5(path: Path) -> Iterator[BlockWriter]:
    """Writes an HDF5 file that replaces `path` if the block does not raise; see `replacing`.

    Raises:
        OutputError: the file cannot be written, for example because the disk is full; `path` is unchanged.
    """
    with replacing(path) as temporary:
        writer = BlockWriter(temporary)
        try:
            yield writer
            writer.finish()
        finally:
            writer.file.close()
