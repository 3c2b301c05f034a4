"""Rows compressed into chunks of HDF5 by the ranks that simulate them, so that rank 0 only copies bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import h5py
from numpy.typing import NDArray

Chunk = tuple[int, bytes]  # mask of the filters that were left out, and the stored bytes


@dataclass(frozen=True)
class PackedRows:
    """Consecutive rows of several datasets, as stored chunks.

    Args:
        rows: number of rows.
        chunks: by dataset path, in order of the rows.
    """

    rows: int
    chunks: dict[str, list[Chunk]]

    @property
    def nbytes(self) -> int:
        return sum(len(data) for chunks in self.chunks.values() for _, data in chunks)


def pack_rows(
    values: Mapping[str, NDArray[Any]], rows: int, chunk_rows: int, options: Mapping[str, Mapping[str, Any]]
) -> PackedRows:
    """Compresses rows that start at a chunk of their datasets.

    Args:
        values: [rows, ...] by dataset path.
        rows: number of rows.
        chunk_rows: rows of a chunk; the last one is filled up with the fill value.
        options: arguments of `h5py.Group.create_dataset` by dataset path: type, filters, fill value.
    """
    chunks = {}
    with h5py.File("packed", "w", driver="core", backing_store=False) as file:
        for number, (path, array) in enumerate(values.items()):
            shape = chunk_rows, *array.shape[1:]
            # More rows than there are: HDF5 may store a chunk that covers the whole dataset without filters.
            dataset = file.create_dataset(str(number), (rows + chunk_rows, *shape[1:]), chunks=shape, **options[path])
            dataset[:rows] = array
            dataset.flush()
            offset = (0,) * (array.ndim - 1)
            chunks[path] = [dataset.id.read_direct_chunk((row, *offset)) for row in range(0, rows, chunk_rows)]
    return PackedRows(rows, chunks)


def write_packed(dataset: h5py.Dataset, first_row: int, chunks: list[Chunk]) -> None:
    """Writes stored chunks from a row on, which is the first row of a chunk."""
    offset = (0,) * (dataset.ndim - 1)
    for number, (mask, data) in enumerate(chunks):
        dataset.id.write_direct_chunk((first_row + number * dataset.chunks[0], *offset), data, mask)
