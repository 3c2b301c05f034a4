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
from spinlock_fast.data.dataset_warnings import log_unusual_datasets, warn_once
from spinlock_fast.data.hdf5_links import ExternalFilePolicy, LinkTrace, find_dataset, get_dataset
from spinlock_fast.data.input_files import find_files, open_file, reporting_damage
from spinlock_fast.data.loader import HDF5Loader
from spinlock_fast.data.loader_pass import LoaderPass
from spinlock_fast.data.packing import read_packing
from spinlock_fast.data.remote_files import RemoteCache, remote_file
from spinlock_fast.data.row_order import SingleBatch
from spinlock_fast.data.sharded_dataset import ShardedDatasets
from spinlock_fast.data.shared_shards import open_once
from spinlock_fast.data.window_sizes import available_cpus
from spinlock_fast.distributed import SINGLE, Ranks
from spinlock_fast.errors import DataError
from spinlock_fast.messages import printable, shown

_COMPARED_FILES = 64


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
        paths: a file, a glob, a text file of paths, an address of a remote store, or a list of those; see
            `find_files`. Files of a glob are in natural order (shard_10 after shard_9).
        datasets: dataset path by family name; 2-D or 3-D, numeric. Packed numbers (CF conventions) are unpacked: fill
            values become NaN, scale and offset are applied.
        allow_external: False rejects links and virtual or external sources outside the directory of a file.
        manifest_dir: directory for a manifest of the shards; see `ShardManifest`.
        remote_cache: copies of remote files; by default in the cache directory of the user.
        ranks: processes of a distributed run that all create this source at the same time; rank 0 opens the files.

    Raises:
        DataError: a file or dataset cannot be read; one line that names both.
    """

    def __init__(
        self,
        paths: str | Sequence[str],
        datasets: Mapping[str, str],
        *,
        allow_external: bool = True,
        manifest_dir: str | None = None,
        remote_cache: RemoteCache | None = None,
        ranks: Ranks = SINGLE,
    ) -> None:
        self.allow_external = allow_external
        self._iterators: list[Generator[Any, None, None]] = []
        policy = ExternalFilePolicy(allow_external)

        def open_shards() -> ShardedDatasets:
            files = find_files(paths, remote_cache)
            _check_shapes(files[0], datasets, policy)
            unique = list(dict.fromkeys(datasets.values()))
            manifest = None if manifest_dir is None else Path(manifest_dir)
            return ShardedDatasets.open(files, unique, noun="families", policy=policy, manifest_dir=manifest)

        self._sharded = open_once(ranks, open_shards)
        self.files = list(self._sharded.files)
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
        if any(remote_file(file) is not None for file in self.files) and len(rows):
            shards = np.searchsorted(self._ends, rows, side="right")
            if shards.min() < shards.max():  # one at a time: the cache may not hold all of them
                values = np.empty((len(rows), *info.row_shape), np.float32)
                for shard in np.unique(shards):
                    values[shards == shard] = self.read_rows(family, rows[shards == shard])
                return values
        if not len(rows):
            return np.empty((0, *info.row_shape), np.float32)
        sharded = self._sharded.select(info.path)
        batches = LoaderPass(sharded, SingleBatch(rows), windows_ahead=1, threads=available_cpus())
        with closing(batches):
            unpacked = sharded.unpack(next(iter(batches)))[info.path]
        return as_float32(unpacked, lambda i: self.row_location(family, int(rows[i]))).numpy()

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
        paths = list(dict.fromkeys(self.datasets[family].path for family in families))
        sharded = self._sharded.select(*paths)
        sharded.check_unchanged()
        loader = _OpenedLoader(
            sharded, paths, batch_size=rows, memory_budget=memory_budget, pin_memory=device.type == "cuda"
        )
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
        return column_names(self.files, path, self.datasets[family].row_shape, groups=1)

    def series_names(self, family: str) -> list[str] | None:
        """As `feature_names`, for the last axis of a family of time series [N, T, D]."""
        info = self.datasets[family]
        return column_names(self.files, info.path, info.row_shape[-1:], groups=1)

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


class _OpenedLoader(HDF5Loader):
    """Reads shards that are already open, in sequence."""

    def __init__(self, sharded: ShardedDatasets, paths: list[str], **settings: Any) -> None:
        self._opened = sharded
        super().__init__([str(file) for file in sharded.files], paths, shuffle=False, **settings)

    def _open_shards(self) -> ShardedDatasets:
        return self._opened


def _check_shapes(file: Path, datasets: Mapping[str, str], policy: ExternalFilePolicy) -> None:
    """Raises DataError if the dataset of a family has another number of axes than 2 or 3."""
    with open_file(file) as handle:
        for family, path in datasets.items():
            with reporting_damage(file, path):
                shape = get_dataset(file, handle, path, policy).shape
            if shape is None or len(shape) not in (2, 3):
                raise DataError(f"{file}: {path}: family {family!r} needs a 2-D or 3-D dataset, got shape {shape}")


def column_names(files: Sequence[Path], path: str, shape: tuple[int, ...], groups: int) -> list[str] | None:
    """The attribute `feature_names` of a dataset or a parent group, if it has the expected shape; else None.

    Names of another shape on the dataset itself, and names that repeat, are logged.

    Args:
        files: HDF5 files of one data set. The names are those of the first; up to 64 others, evenly spaced, are
            compared with it. Files without names, and remote ones, are not compared.
        path: dataset path within the files.
        shape: expected shape of the attribute.
        groups: number of parent groups to search.

    Raises:
        DataError: files have different names, or one is damaged.
    """
    names = _names_in(files[0], path, shape, groups)
    others = [file for file in files[1:] if remote_file(file) is None] if names is not None else []
    for file in others[:: -(-len(others) // _COMPARED_FILES) or 1]:
        found = _names_in(file, path, shape, groups)
        if names is not None and found is not None and found != names:
            other, name = next((a, b) for a, b in zip(found, names, strict=True) if a != b)
            raise DataError(
                f"{file}: {path}: the columns differ from those of {files[0]}, in name or order: "
                f"{shown(other)} instead of {shown(name)}"
            )
    return names


def _names_in(file: Path, path: str, shape: tuple[int, ...], groups: int) -> list[str] | None:
    with open_file(file) as handle, reporting_damage(file, path):
        nodes = [get_dataset(file, handle, path)]
        parent = path.strip("/")
        for _ in range(groups):
            parent = parent.rpartition("/")[0]
            nodes.append(handle[parent or "/"])
        for node in nodes:
            names = node.attrs.get("feature_names")
            if isinstance(names, np.ndarray) and names.shape == shape:
                texts = [decode_text(name) for name in names]
                if len(set(texts)) < len(texts):
                    warn_once(file, f"{path}: attribute feature_names repeats names: tables cannot tell them apart")
                return texts
        names = nodes[0].attrs.get("feature_names")
        if names is not None and len(shape) == 1:
            found = f"shape {list(names.shape)}" if isinstance(names, np.ndarray) else "one value"
            warn_once(file, f"{path}: attribute feature_names is ignored: it has {found}, expected {list(shape)}")
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
