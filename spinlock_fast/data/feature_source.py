"""Families of raw features: named datasets of one file or several shards, read as float32."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.data.backing_files import sources_of
from spinlock_fast.data.dataset_warnings import log_unusual_datasets
from spinlock_fast.data.hdf5_links import ExternalFilePolicy, LinkTrace, find_dataset, get_dataset
from spinlock_fast.data.input_files import find_files, open_file, reporting_damage
from spinlock_fast.data.loader import HDF5Loader
from spinlock_fast.data.loader_pass import LoaderPass
from spinlock_fast.data.packing import read_packing
from spinlock_fast.data.row_order import SingleBatch
from spinlock_fast.data.sharded_dataset import ShardedDatasets
from spinlock_fast.data.window_sizes import available_cpus
from spinlock_fast.errors import DataError
from spinlock_fast.messages import printable


@dataclass(frozen=True)
class DatasetInfo:
    """One dataset over all shards."""

    path: str
    rows: int
    row_shape: tuple[int, ...]  # (D,) or (T, D)
    chunk_rows: int  # rows per chunk; 1 if not chunked
    item_size: int = 4  # bytes of an unpacked number

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, unpacked or as float32, whichever is larger."""
        return max(4, self.item_size) * int(np.prod(self.row_shape))


class FeatureSource:
    """Named datasets with the same number of rows. Files are open only while they are read.

    A context manager; exiting it stops reading ahead.

    Args:
        paths: a file, a glob, or a list of those. Files of a glob are in natural order (shard_10 after shard_9).
        datasets: dataset path by family name; 2-D or 3-D, numeric. Packed numbers (CF conventions) are unpacked: fill
            values become NaN, scale and offset are applied.
        allow_external: False rejects links and virtual or external sources outside the directory of a file.

    Raises:
        DataError: a file or dataset cannot be read; one line that names both.
    """

    def __init__(self, paths: str | Sequence[str], datasets: Mapping[str, str], *, allow_external: bool = True) -> None:
        self.files = find_files(paths)
        self.allow_external = allow_external
        self._iterators: list[Generator[Any, None, None]] = []
        policy = ExternalFilePolicy(allow_external)
        with open_file(self.files[0]) as handle:
            for family, path in datasets.items():
                with reporting_damage(self.files[0], path):
                    shape = get_dataset(self.files[0], handle, path, policy).shape
                if shape is None or len(shape) not in (2, 3):
                    raise DataError(
                        f"{self.files[0]}: {path}: family {family!r} needs a 2-D or 3-D dataset, got shape {shape}"
                    )
        self._sharded = ShardedDatasets.open(
            self.files, list(dict.fromkeys(datasets.values())), noun="families", policy=policy
        )
        log_unusual_datasets(self._sharded)
        self._ends = np.cumsum(self._sharded.shard_rows).tolist()
        infos = {
            dataset.path: DatasetInfo(
                dataset.path, self.rows, dataset.row_shape, dataset.chunk_rows, dataset.unpacked_dtype.itemsize
            )
            for dataset in self._sharded.datasets
        }
        self.datasets = {family: infos[path] for family, path in datasets.items()}

    def __enter__(self) -> FeatureSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops all iterators of `batches`: joins their threads and closes their files."""
        while self._iterators:
            self._iterators.pop().close()

    @property
    def rows(self) -> int:
        return self._sharded.rows

    def read(self, family: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) of a family as float32; raises DataError that names damaged rows."""
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"rows {start}..{stop} of {self.rows}")
        return self.read_rows(family, np.arange(start, stop))

    def read_rows(self, family: str, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of a family in the given order as float32; each chunk is decoded once."""
        info = self.datasets[family]
        if not len(rows):
            return np.empty((0, *info.row_shape), np.float32)
        sharded = self._sharded.select(info.path)
        batches = LoaderPass(sharded, SingleBatch(rows), windows_ahead=1, threads=available_cpus())
        with closing(batches):
            values = sharded.unpack(next(iter(batches)))[info.path]
        return as_float32(values, lambda i: self.row_location(family, int(rows[i]))).numpy()

    def batches(
        self,
        families: Sequence[str],
        rows: int,
        memory_budget: int,
        device: torch.device,
        part: slice | None = None,
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Iterates over the rows in order, with read-ahead.

        Args:
            families: names of the families to read.
            rows: rows of a batch.
            memory_budget: bytes for decoded rows.
            device: device of the batches.
            part: numbers of the batches to read; all by default.

        Yields:
            (first row, {family: float32 [B, *row_shape] on the device}).

        Raises:
            DataError: rows cannot be read, or the files changed since they were opened.
        """
        self._iterators.append(iterator := self._read_ahead(families, rows, memory_budget, device, part))
        return iterator

    def _read_ahead(
        self, families: Sequence[str], rows: int, memory_budget: int, device: torch.device, part: slice | None
    ) -> Generator[tuple[int, dict[str, Tensor]], None, None]:
        loader = HDF5Loader(
            [str(file) for file in self.files],
            list(dict.fromkeys(self.datasets[family].path for family in families)),
            batch_size=rows,
            shuffle=False,
            memory_budget=memory_budget,
            pin_memory=device.type == "cuda",
            allow_external=self.allow_external,
        )
        if any(self._sharded.origins[path] != origin for path, origin in loader.origins.items()):
            raise DataError(f"{self.files[0]}: the data set has changed since it was opened")
        first, stop, _ = (part or slice(None)).indices(len(loader))
        if first >= stop:
            return
        loader.load_state_dict({**loader.state_dict(), "batch": first})
        start = first * rows
        with closing(iter(loader)) as batches:  # type: ignore[type-var]
            for batch in islice(batches, stop - first):
                on_device = {name: batch[self.datasets[name].path].to(device, non_blocking=True) for name in families}
                yield start, {name: as_float32(x, self.row_locator(name, start)) for name, x in on_device.items()}
                start += len(batch["index"])

    def row_location(self, family: str, row: int) -> str:
        """File, dataset and row number within the file, for messages."""
        shard = int(np.searchsorted(self._ends, row, side="right"))
        first = self._ends[shard] - self._sharded.shard_rows[shard]
        return f"{self.files[shard]}: {self.datasets[family].path}: row {row - first}"

    def row_locator(self, family: str, first: int) -> Callable[[int], str]:
        """`row_location` as a function of the row number minus `first`."""
        return lambda row: self.row_location(family, first + row)

    def feature_names(self, family: str) -> list[str] | None:
        """Column names of a family, if the dataset or its group has an attribute `feature_names`."""
        path = self.datasets[family].path
        return column_names(self.files[0], path, self.datasets[family].row_shape, groups=1)

    def series_names(self, family: str) -> list[str] | None:
        """As `feature_names`, for the last axis of a family of time series [N, T, D]."""
        info = self.datasets[family]
        return column_names(self.files[0], info.path, info.row_shape[-1:], groups=1)

    def read_whole(self, path: str) -> NDArray[Any] | None:
        """Reads another dataset of any type from all files; None if a file lacks it. Packed numbers are unpacked.

        Raises:
            DataError: a link is broken, or the file is damaged.
        """
        parts = []
        policy = ExternalFilePolicy(self.allow_external)
        for file in self.files:
            trace = LinkTrace()
            with open_file(file) as handle, reporting_damage(file, path):
                if (dataset := find_dataset(file, handle, path, policy, trace)) is None:
                    return None
                sources_of(trace.files[-1] if trace.files else file, dataset, policy)  # raises if one is missing
                packing = read_packing(dataset) if dataset.dtype.kind in "fiu" else None
                values = dataset[()]
                parts.append(np.atleast_1d(values if packing is None else packing(values)))
        return np.concatenate(parts)

    @property
    def all_files(self) -> tuple[Path, ...]:
        """All files that hold values, including linked and virtual sources."""
        return self._sharded.all_files


def column_names(file: Path, path: str, shape: tuple[int, ...], groups: int) -> list[str] | None:
    """The attribute `feature_names` of a dataset or a parent group, if it has the expected shape; else None.

    Args:
        file: HDF5 file.
        path: dataset path within the file.
        shape: expected shape of the attribute.
        groups: number of parent groups to search.
    """
    with open_file(file) as handle, reporting_damage(file, path):
        nodes = [get_dataset(file, handle, path)]
        parent = path.strip("/")
        for _ in range(groups):
            parent = parent.rpartition("/")[0]
            nodes.append(handle[parent or "/"])
        for node in nodes:
            names = node.attrs.get("feature_names")
            if isinstance(names, np.ndarray) and names.shape == shape:
                return [decode_text(name) for name in names]
    return None


def decode_text(value: Any) -> str:
    """Decodes a string attribute and escapes control characters."""
    return printable(value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value))


def as_float32(values: Tensor, row_location: Callable[[int], str]) -> Tensor:
    """Converts to float32.

    Raises:
        DataError: a finite value exceeds the range of float32; the message contains `row_location(row)`.
    """
    if values.dtype != torch.float64:  # other types cannot exceed float32
        return values.to(torch.float32)
    out = values.to(torch.float32)
    overflow = torch.isinf(out) & ~torch.isinf(values)
    if bool(overflow.any()):
        row, *position = (int(i) for i in overflow.nonzero()[0])
        where = ", ".join(map(str, position))
        raise DataError(
            f"{row_location(row)}, position [{where}]: {float(values[(row, *position)]):g} does not fit float32"
        )
    return out
