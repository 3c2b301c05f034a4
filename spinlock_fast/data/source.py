"""Families of raw features: named datasets of one file or many shards, as float32."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.data.backing import sources_of
from spinlock_fast.data.files import find_files, naming_damage, open_file
from spinlock_fast.data.links import Boundary, Trace, find_dataset, get_dataset
from spinlock_fast.data.loader import HDF5Loader, log_peculiarities
from spinlock_fast.data.order import GivenRows
from spinlock_fast.data.packing import read_packing
from spinlock_fast.data.reading import LoaderPass, PassStats, batch_memory
from spinlock_fast.data.table import Tables
from spinlock_fast.data.windows import processors
from spinlock_fast.errors import DataError
from spinlock_fast.messages import printable


@dataclass(frozen=True)
class DatasetInfo:
    """One dataset over all shards."""

    path: str
    rows: int
    row_shape: tuple[int, ...]  # (D,) or (T, D)
    chunk_rows: int  # rows that are stored, and so decoded, together; 1 where not chunked
    item_size: int = 4  # bytes of a stored number

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as stored or as float32, whichever is more."""
        return max(4, self.item_size) * int(np.prod(self.row_shape))


class Source:
    """Named datasets with a common number of rows. Files are open while they are read, and not longer.

    A context manager, which ends the reading that is still under way.

    Args:
        paths: a file, a glob, or a list of those. The shards of a glob follow each other in natural
            order (shard_10 after shard_9).
        datasets: dataset path in the file by family name; 2-D or 3-D, numeric. Numbers that stand for others are
            unpacked: netCDF's fill values become NaN, scale and offset are applied.
        allow_external: False refuses links, virtual and external sources that lead out of the directory of a file.

    Raises:
        DataError: one line naming the file, the dataset and what is wrong.
    """

    def __init__(self, paths: str | Sequence[str], datasets: Mapping[str, str], *, allow_external: bool = True) -> None:
        self.files = find_files(paths)
        self.allow_external = allow_external
        self._running: list[Generator[Any, None, None]] = []
        boundary = Boundary(allow_external)
        with open_file(self.files[0]) as handle:
            for family, path in datasets.items():
                with naming_damage(self.files[0], path):
                    shape = get_dataset(self.files[0], handle, path, boundary).shape
                if shape is None or len(shape) not in (2, 3):
                    raise DataError(
                        f"{self.files[0]}: {path}: family {family!r} needs a 2-D or 3-D dataset, got shape {shape}"
                    )
        self._tables = Tables.open(
            self.files, list(dict.fromkeys(datasets.values())), called="families", boundary=boundary
        )
        log_peculiarities(self._tables)
        self._ends = np.cumsum(self._tables.shard_rows).tolist()
        tables = {table.path: table for table in self._tables.tables}
        self.datasets = {
            family: DatasetInfo(
                path, self.rows, tables[path].row_shape, tables[path].chunk_rows, tables[path].unpacked_dtype.itemsize
            )
            for family, path in datasets.items()
        }

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends every `batches` that is under way: joins its threads and closes its files."""
        while self._running:
            self._running.pop().close()

    @property
    def rows(self) -> int:
        return self._tables.rows

    def read(self, family: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) of a family as float32, across shards; DataError names a damaged place."""
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"rows {start}..{stop} of {self.rows}")
        return self.read_rows(family, np.arange(start, stop))

    def read_rows(self, family: str, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of a family in the given order as float32; every chunk is decoded once."""
        info = self.datasets[family]
        if not len(rows):
            return np.empty((0, *info.row_shape), np.float32)
        tables, order = self._tables.select(info.path), GivenRows(rows)
        batches = LoaderPass(
            tables,
            order,
            epoch=0,
            first_batch=0,
            ahead=1,
            threads=processors(),
            verify_checksums=True,
            memory=batch_memory(tables, order, 1, pin=False),
            stats=PassStats(),
        )
        with closing(batches):
            values = tables.unpacked(next(iter(batches)))[info.path]
        return as_float32(values, lambda i: self.place(family, int(rows[i]))).numpy()

    def batches(
        self, families: Sequence[str], rows: int, memory_budget: int, device: torch.device
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(first row, {family: float32 [B, *row_shape] on the device}) of all rows in order, read ahead.

        Args:
            rows: of a batch.
            memory_budget: bytes for the rows that are held and read ahead.

        Raises:
            DataError: rows cannot be read, or the files are not those that were opened.
        """
        self._running.append(running := self._read_ahead(families, rows, memory_budget, device))
        return running

    def _read_ahead(
        self, families: Sequence[str], rows: int, memory_budget: int, device: torch.device
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
        if any(self._tables.origins[path] != origin for path, origin in loader.origins.items()):
            raise DataError(f"{self.files[0]}: the data set has changed since it was opened")
        start = 0
        for batch in loader:
            raw = {family: batch[self.datasets[family].path] for family in families}
            yield (
                start,
                {
                    family: as_float32(x.to(device, non_blocking=True), self.placing(family, start))
                    for family, x in raw.items()
                },
            )
            start += len(batch["index"])

    def place(self, family: str, row: int) -> str:
        """Where a row lies, for messages: file, dataset, row in the file."""
        shard = int(np.searchsorted(self._ends, row, side="right"))
        first = self._ends[shard] - self._tables.shard_rows[shard]
        return f"{self.files[shard]}: {self.datasets[family].path}: row {row - first}"

    def placing(self, family: str, first: int) -> Callable[[int], str]:
        """`place` for rows counted from `first`."""
        return lambda row: self.place(family, first + row)

    def feature_names(self, family: str) -> list[str] | None:
        """Names of a family's columns, where the dataset or its group has an attribute `feature_names`."""
        path = self.datasets[family].path
        return column_names(self.files[0], path, self.datasets[family].row_shape, groups=1)

    def read_whole(self, path: str) -> NDArray[Any] | None:
        """Another dataset of all files, of any type; None where a file has none. Packed numbers are unpacked.

        Raises:
            DataError: a link leads nowhere, or the file is damaged.
        """
        parts = []
        boundary = Boundary(self.allow_external)
        for file in self.files:
            trace = Trace()
            with open_file(file) as handle, naming_damage(file, path):
                if (dataset := find_dataset(file, handle, path, boundary, trace)) is None:
                    return None
                sources_of(trace.passed[-1] if trace.passed else file, dataset, boundary)  # none may be missing
                packing = read_packing(dataset) if dataset.dtype.kind in "fiu" else None
                values = dataset[()]
                parts.append(np.atleast_1d(values if packing is None else packing(values)))
        return np.concatenate(parts)

    @property
    def all_files(self) -> tuple[Path, ...]:
        """Every file that values come from, linked and virtual ones included."""
        return self._tables.all_files


def column_names(file: Path, path: str, shape: tuple[int, ...], groups: int) -> list[str] | None:
    """The attribute `feature_names` of a dataset or of a group above it, where it has this shape.

    Args:
        groups: how many groups upwards are asked.
    """
    with open_file(file) as handle, naming_damage(file, path):
        nodes = [get_dataset(file, handle, path)]
        above = path.strip("/")
        for _ in range(groups):
            above = above.rpartition("/")[0]
            nodes.append(handle[above or "/"])
        for node in nodes:
            names = node.attrs.get("feature_names")
            if isinstance(names, np.ndarray) and names.shape == shape:
                return [text_of(name) for name in names]
    return None


def text_of(value: Any) -> str:
    """A text of a file, safe to be shown."""
    return printable(value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value))


def as_float32(values: Tensor, place: Callable[[int], str]) -> Tensor:
    """Values as float32; raises DataError for a finite one that does not fit, at `place` of its row."""
    if values.dtype != torch.float64:  # the only type with larger numbers
        return values.to(torch.float32)
    out = values.to(torch.float32)
    beyond = torch.isinf(out) & ~torch.isinf(values)
    if bool(beyond.any()):
        row, *position = (int(i) for i in beyond.nonzero()[0])
        where = ", ".join(map(str, position))
        raise DataError(f"{place(row)}, position [{where}]: {float(values[(row, *position)]):g} does not fit float32")
    return out
