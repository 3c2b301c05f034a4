"""Datasets of several files (shards) whose rows are numbered consecutively."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.data.hdf5_links import ExternalFilePolicy
from spinlock_fast.data.input_files import FileIdentity
from spinlock_fast.data.native_layout import Segment
from spinlock_fast.data.remote_files import remote_file
from spinlock_fast.data.shard_index import ShardIndex, file_description
from spinlock_fast.data.shard_manifest import ShardManifest
from spinlock_fast.errors import DataError

_TRANSPOSED = (
    "; MATLAB stores arrays with reversed axes: if the first axis does not hold the rows, save the transposed array "
    "(x = permute(x, ndims(x):-1:1))"
)


@dataclass(frozen=True, eq=False)
class ShardedDataset:
    """One dataset over all shards, concatenated along the rows."""

    path: str
    row_shape: tuple[int, ...]
    dtype: np.dtype[Any]  # native byte order
    shards: tuple[ShardIndex, ...]

    @property
    def row_bytes(self) -> int:
        return prod(self.row_shape) * self.dtype.itemsize

    @cached_property
    def h5py_reason(self) -> str:
        """Why h5py reads some of its rows; empty if the native reader reads all."""
        return next((shard.h5py_reason for shard in self.shards if shard.h5py_reason), "")

    @cached_property
    def reading(self) -> str:
        """Which rows h5py reads, and why."""
        if not self.h5py_reason:
            return "native"
        count = sum(bool(shard.h5py_reason) for shard in self.shards)
        part = "" if count == len(self.shards) else f" for {count} of {len(self.shards)} files"
        if any(shard.h5py_reason and shard.virtual_segments for shard in self.shards):
            part = " for some rows"
        return f"h5py{part}, because of {self.h5py_reason}"

    @cached_property
    def _segments(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """End of the rows of each segment, over all shards, and whether h5py reads it."""
        segments = [segment for shard in self.shards for segment in shard.segments]
        return (
            np.cumsum([segment.rows for segment in segments], dtype=np.int64),
            np.array([segment.layout is None for segment in segments]),
        )

    @property
    def read_natively(self) -> bool:
        """Whether the native reader reads some of its rows."""
        return not self._segments[1].all()

    @cached_property
    def read_in_parts(self) -> bool:
        """Whether h5py reads all rows, and consecutive ones in any parts without decoding a chunk twice."""
        return not self.read_natively and all(shard.stays_open and shard.chunks_hold_rows for shard in self.shards)

    def read_by_h5py(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether h5py reads each of the rows [n], numbered over all shards."""
        ends, by_h5py = self._segments
        return by_h5py[np.searchsorted(ends, rows, side="right")]

    @cached_property
    def has_packing(self) -> bool:
        """Whether stored numbers are packed (fill values, scale, offset)."""
        return any(shard.packing is not None for shard in self.shards)

    @cached_property
    def unpacked_dtype(self) -> np.dtype[Any]:
        """Type of the unpacked values."""
        packings = [shard.packing for shard in self.shards if shard.packing is not None]
        if not packings:
            return self.dtype
        dtypes = [packing.dtype for packing in packings]
        if len(packings) < len(self.shards):
            dtypes.append(self.dtype)
        return np.result_type(*dtypes)

    @cached_property
    def chunk_rows(self) -> int:
        """Largest number of rows per chunk; 1 if not chunked."""
        return max(shard.chunk_rows for shard in self.shards)

    @cached_property
    def chunk_bytes(self) -> int:
        return max(shard.chunk_bytes for shard in self.shards)


@dataclass(frozen=True)
class ShardedDatasets:
    """Datasets with the same rows in the same files."""

    files: tuple[Path, ...]
    identities: tuple[FileIdentity, ...]
    shard_rows: tuple[int, ...]
    datasets: tuple[ShardedDataset, ...]

    @classmethod
    def open(
        cls,
        files: Sequence[Path],
        paths: Sequence[str],
        noun: str = "datasets",
        policy: ExternalFilePolicy | None = None,
        manifest_dir: Path | None = None,
    ) -> ShardedDatasets:
        """Indexes every file.

        Args:
            files: the shards.
            paths: dataset paths within each file.
            noun: what error messages call the datasets.
            policy: files from which linked and virtual datasets may take values.
            manifest_dir: directory of the manifest, which makes it unnecessary to open files that have not changed.

        Raises:
            DataError: a file or dataset cannot be read, or the shapes or types of shards or datasets differ.
            OutputError: the manifest cannot be written.
        """
        shards: list[dict[str, ShardIndex]] = []
        manifest = ShardManifest(manifest_dir, files, paths, policy)
        for file in files:
            shards.append(indexes := manifest.index(file))
            rows = {path: index.shape[0] for path, index in indexes.items()}
            if len(set(rows.values())) > 1:
                listed = ", ".join(f"{path} has {count}" for path, count in rows.items())
                hint = _TRANSPOSED if any(index.matlab for index in indexes.values()) else ""
                raise DataError(f"{file}: {noun} differ in their number of rows: {listed}{hint}")
        manifest.save()
        datasets = []
        for path in paths:
            first = shards[0][path]
            for indexes in shards:
                index = indexes[path]
                if index.shape[1:] != first.shape[1:]:
                    raise DataError(
                        f"{index.file}: {path}: rows of shape {index.shape[1:]}, but {first.shape[1:]} in {first.file}"
                    )
                if index.dtype != first.dtype:
                    raise DataError(
                        f"{index.file}: {path}: numbers of type {index.dtype}, but {first.dtype} in {first.file}"
                    )
            datasets.append(
                ShardedDataset(path, first.shape[1:], first.dtype, tuple(indexes[path] for indexes in shards))
            )
        shard_rows = tuple(indexes[paths[0]].shape[0] for indexes in shards)
        if sum(shard_rows) == 0:
            raise DataError(f"{files[0]}: {paths[0]} has no rows")
        return cls(tuple(files), tuple(indexes[paths[0]].identity for indexes in shards), shard_rows, tuple(datasets))

    @property
    def rows(self) -> int:
        return sum(self.shard_rows)

    def unpack(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replaces the stored numbers of packed datasets in a batch by their values; see `Packing`.

        Args:
            batch: tensors [b, ...] by dataset path, and "index": row numbers [b] over all shards.
        """
        for dataset in self.datasets:
            if not dataset.has_packing:
                continue
            stored = batch[dataset.path]
            values = np.empty(stored.shape, dataset.unpacked_dtype)
            shard_of_row = np.searchsorted(np.cumsum(self.shard_rows), batch["index"].numpy(), side="right")
            for i in np.unique(shard_of_row):
                rows = shard_of_row == i
                packing = dataset.shards[int(i)].packing
                part = stored.numpy()[rows]
                values[rows] = part if packing is None else packing(part)
            unpack = torch.from_numpy(values)
            batch[dataset.path] = unpack.pin_memory() if stored.is_pinned() else unpack
        return batch

    @property
    def origins(self) -> dict[str, tuple[FileIdentity, ...]]:
        """Identities of all files that hold values of a dataset, by its path."""
        return {
            dataset.path: tuple(identity for shard in dataset.shards for identity in shard.identities)
            for dataset in self.datasets
        }

    @property
    def all_files(self) -> tuple[Path, ...]:
        """All files that hold values, including linked and virtual sources."""
        paths = (source.path for dataset in self.datasets for shard in dataset.shards for source in shard.backing_files)
        return tuple(dict.fromkeys((*self.files, *paths)))

    def select(self, *paths: str) -> ShardedDatasets:
        """Only the datasets with these paths, in this order."""
        by_path = {dataset.path: dataset for dataset in self.datasets}
        return replace(self, datasets=tuple(by_path[path] for path in paths))

    def check_unchanged(self) -> None:
        """Raises DataError if a file that holds values has changed since it was indexed."""
        checked: set[FileIdentity] = set()
        for dataset in self.datasets:
            for shard in dataset.shards:
                if not checked.issuperset(shard.identities):
                    try:
                        shard.check_unchanged()
                    except DataError as error:
                        raise DataError(f"{shard.file}: {error}") from None
                    checked.update(shard.identities)

    def native_descriptions(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Arguments `files` and `datasets` of `_native.RowReader`."""
        numbers: dict[tuple[Path, FileIdentity, str], int] = {}
        datasets = [
            {
                "name": dataset.path,
                "item_size": dataset.dtype.itemsize,
                "row_shape": list(dataset.row_shape),
                "shards": [
                    {"file": numbers.setdefault(_storage(shard, segment), len(numbers))}
                    | (segment.layout or {"rows": segment.rows})
                    for shard in dataset.shards
                    for segment in shard.segments
                ],
            }
            for dataset in self.datasets
        ]
        return [file_description(*file) for file in numbers], datasets


def _storage(shard: ShardIndex, segment: Segment) -> tuple[Path, FileIdentity, str]:
    """The file that stores a segment, its identity, and its name in error messages."""
    label = str(shard.file) if segment.file == shard.file else f"{shard.file} (values in {segment.file})"
    if (remote := remote_file(shard.file)) is not None:
        label = f"{remote.name} (copy in {shard.file})"
    return segment.file, segment.identity, label
