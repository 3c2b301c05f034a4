"""Datasets over all shards as one space of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spinlock_fast.data.files import Identity
from spinlock_fast.data.index import ShardIndex, file_description, index_file
from spinlock_fast.data.links import Boundary
from spinlock_fast.errors import DataError

_TRANSPOSED = (
    "; MATLAB stores arrays with their axes reversed: where the first axis here is not the rows, save the transposed "
    "array (x = permute(x, ndims(x):-1:1))"
)


@dataclass(frozen=True, eq=False)
class Table:
    """One dataset over all shards, which follow each other."""

    path: str
    row_shape: tuple[int, ...]
    dtype: np.dtype[Any]  # native byte order
    shards: tuple[ShardIndex, ...]

    @property
    def row_bytes(self) -> int:
        return prod(self.row_shape) * self.dtype.itemsize

    @property
    def reason(self) -> str:
        """Why h5py must read it; empty where the native reader does."""
        return next((shard.reason for shard in self.shards if shard.native is None), "")

    @property
    def packed(self) -> bool:
        """Whether stored numbers stand for others: fill values, scales."""
        return any(shard.packing is not None for shard in self.shards)

    @property
    def unpacked_dtype(self) -> np.dtype[Any]:
        """Of the values that stored numbers stand for."""
        packings = [shard.packing for shard in self.shards if shard.packing is not None]
        if not packings:
            return self.dtype
        kinds = [packing.dtype for packing in packings]
        if len(packings) < len(self.shards):
            kinds.append(self.dtype)
        return np.result_type(*kinds)

    @property
    def chunk_rows(self) -> int:
        """Rows that are decoded together."""
        return max(shard.chunk_rows for shard in self.shards)

    @property
    def chunk_bytes(self) -> int:
        return max(shard.chunk_bytes for shard in self.shards)


@dataclass(frozen=True)
class Tables:
    """Datasets with the same rows."""

    files: tuple[Path, ...]
    identities: tuple[Identity, ...]
    shard_rows: tuple[int, ...]
    tables: tuple[Table, ...]

    @classmethod
    def open(
        cls, files: Sequence[Path], paths: Sequence[str], called: str = "datasets", boundary: Boundary | None = None
    ) -> Tables:
        """Indexes every file; messages speak of `called`.

        Raises:
            DataError: one line naming the file, the dataset and what is wrong; also where shards or datasets do
                not fit together.
        """
        shards: list[dict[str, ShardIndex]] = []
        for file in files:
            shards.append(found := index_file(file, list(paths), boundary))
            rows = {path: index.shape[0] for path, index in found.items()}
            if len(set(rows.values())) > 1:
                listed = ", ".join(f"{path} has {count}" for path, count in rows.items())
                hint = _TRANSPOSED if any(index.matlab for index in found.values()) else ""
                raise DataError(f"{file}: {called} differ in their number of rows: {listed}{hint}")
        tables = []
        for path in paths:
            first = shards[0][path]
            for found in shards:
                index = found[path]
                if index.shape[1:] != first.shape[1:]:
                    raise DataError(
                        f"{index.file}: {path}: rows of shape {index.shape[1:]}, but {first.shape[1:]} in {first.file}"
                    )
                if index.dtype != first.dtype:
                    raise DataError(
                        f"{index.file}: {path}: numbers of type {index.dtype}, but {first.dtype} in {first.file}"
                    )
            tables.append(Table(path, first.shape[1:], first.dtype, tuple(found[path] for found in shards)))
        shard_rows = tuple(found[paths[0]].shape[0] for found in shards)
        if sum(shard_rows) == 0:
            raise DataError(f"{files[0]}: {paths[0]} has no rows")
        return cls(tuple(files), tuple(found[paths[0]].identity for found in shards), shard_rows, tuple(tables))

    @property
    def rows(self) -> int:
        return sum(self.shard_rows)

    @property
    def native(self) -> tuple[Table, ...]:
        """Those that the native reader reads, in order."""
        return tuple(table for table in self.tables if not table.reason)

    def unpacked(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch with what the stored numbers of packed datasets stand for; others are passed on as they are.

        Args:
            batch: tensors [b, ...] by dataset path, and "index": row numbers [b] over all shards.
        """
        for table in self.tables:
            if not table.packed:
                continue
            stored = batch[table.path]
            values = np.empty(stored.shape, table.unpacked_dtype)
            shard_of_row = np.searchsorted(np.cumsum(self.shard_rows), batch["index"].numpy(), side="right")
            for i in np.unique(shard_of_row):
                rows = shard_of_row == i
                packing = table.shards[int(i)].packing
                part = stored.numpy()[rows]
                values[rows] = part if packing is None else packing(part)
            unpacked = torch.from_numpy(values)
            batch[table.path] = unpacked.pin_memory() if stored.is_pinned() else unpacked
        return batch

    @property
    def origins(self) -> dict[str, tuple[Identity, ...]]:
        """Identities of all files that a dataset takes values from, by its path."""
        return {
            table.path: tuple(identity for shard in table.shards for identity in shard.identities)
            for table in self.tables
        }

    @property
    def all_files(self) -> tuple[Path, ...]:
        """Every file that values come from, linked and virtual ones included."""
        backing = (other.path for table in self.tables for shard in table.shards for other in shard.backing)
        return tuple(dict.fromkeys((*self.files, *backing)))

    def select(self, path: str) -> Tables:
        """One of the datasets, alone."""
        return replace(self, tables=tuple(table for table in self.tables if table.path == path))

    def descriptions(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Files and native datasets as `_native.RowReader` takes them."""
        files = list(dict.fromkeys(_home(shard) for table in self.native for shard in table.shards))
        numbers = {file: i for i, file in enumerate(files)}
        datasets = [
            {
                "name": table.path,
                "item_size": table.dtype.itemsize,
                "row_shape": list(table.row_shape),
                "shards": [{"file": numbers[_home(shard)], **(shard.native or {})} for shard in table.shards],
            }
            for table in self.native
        ]
        return [file_description(*file) for file in files], datasets


def _home(shard: ShardIndex) -> tuple[Path, Identity, str]:
    """The file that holds a dataset, and how messages call it."""
    label = str(shard.file) if shard.home == shard.file else f"{shard.file} (values in {shard.home})"
    return shard.home, shard.home_identity, label
