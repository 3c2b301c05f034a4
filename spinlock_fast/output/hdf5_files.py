"""HDF5 files that are written block by block, on disk space that was taken before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from spinlock_fast.output.atomic_files import replacing, reserve

METADATA_BYTES = 2**16  # headers and attributes
_CHUNK_BYTES = 256  # of a chunk in the index, and what a filter may add to its values


def new_file(path: Path, size: int = METADATA_BYTES, libver: Any = None) -> h5py.File:
    """A new HDF5 file, open for writing, with disk space for its first `size` bytes.

    HDF5 would meet a full disk when it creates the file: its first bytes are made in memory.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    with h5py.File(path, "w", driver="core", backing_store=False, libver=libver) as empty:
        empty.flush()
        first = empty.id.get_file_image()
    path.write_bytes(first)
    file = h5py.File(path, "r+", libver=libver)
    try:
        reserve(path, 0, len(first) + size)  # after it was opened: HDF5 counts what is there as its own
    except OSError:
        file.close()
        raise
    return file


def cut(path: Path, size: int) -> None:
    """Gives back the disk space behind the first `size` bytes, which was reserved and not needed."""
    with open(path, "r+b") as file:
        file.truncate(size)


class BlockWriter:
    """Writes blocks of rows into an HDF5 file; made by `replacing_hdf5`.

    Attributes:
        file: the open file, for datasets and attributes that take less than 64 KiB.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.file = new_file(path)

    def write(self, dataset: h5py.Dataset, start: int, values: NDArray[Any]) -> None:
        """Sets rows of a dataset from `start` on; raises OSError where the disk is full."""
        if dataset.chunks:
            rows = dataset.chunks[0]
            chunks = len(values) // rows + 2  # the first and the last may be parts of chunks
            size = chunks * (rows * int(np.prod(values.shape[1:])) * values.dtype.itemsize + _CHUNK_BYTES)
        else:  # the first block takes the space of all
            size = dataset.size * dataset.dtype.itemsize
        reserve(self._path, self.file.id.get_filesize(), size + METADATA_BYTES)
        dataset[start : start + len(values)] = values
        dataset.flush()

    def finish(self) -> None:
        """Closes the file."""
        self.file.flush()
        size = self.file.id.get_filesize()
        self.file.close()
        cut(self._path, size)


@contextmanager
def replacing_hdf5(path: Path) -> Iterator[BlockWriter]:
    """An HDF5 file that takes the place of `path` when the block ends well; see `replacing`.

    Raises:
        OutputError: the file cannot be written, for instance because the disk is full; `path` stays as it was.
    """
    with replacing(path) as temporary:
        writer = BlockWriter(temporary)
        try:
            yield writer
            writer.finish()
        finally:
            writer.file.close()
