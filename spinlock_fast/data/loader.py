"""Batches of aligned rows of HDF5 datasets, decoded ahead by native threads."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import h5py
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from spinlock_fast import _native
from spinlock_fast.config.byte_sizes import parse_bytes
from spinlock_fast.data.backing import descriptor_limit
from spinlock_fast.data.cache import decoded_once
from spinlock_fast.data.epochs import SharedPosition
from spinlock_fast.data.files import Identity, find_files
from spinlock_fast.data.links import Boundary
from spinlock_fast.data.memory import BatchMemory
from spinlock_fast.data.order import RowOrder
from spinlock_fast.data.reading import LoaderPass, PassStats, batch_memory
from spinlock_fast.data.table import Tables
from spinlock_fast.data.windows import Windows, processors, sequential_windows, shuffled_windows
from spinlock_fast.errors import ConfigError

log = logging.getLogger(__name__)

_said: set[tuple[Path, str, str]] = set()


class HDF5Loader(IterableDataset[dict[str, Tensor]]):
    """Iterates over rows of one or more datasets in HDF5 files, batch by batch.

    Chunks are read and decoded by threads of its own, without the GIL and without libhdf5, at least one window of
    rows ahead. What that reader does not know (other compressions, virtual layouts, ...) is read through h5py: the
    same values, slower; `stats()["paths"]` tells.

    A pass is one epoch. The order of rows depends on the data, seed, epoch, rank, world_size and window_rows alone.

    Use it as it is, or in a `DataLoader(loader, batch_size=None)`. Worker processes add no speed. With them a pass has
    the same batches, and each worker gives a run of them. `set_epoch` and `load_state_dict` reach the workers, also
    persistent ones. Every pass is the next epoch, also after one that was left early. The main process cannot know the
    position of the workers, so `state_dict` raises ConfigError there; torchdata's StatefulDataLoader asks the workers.
    One loader serves one DataLoader at a time.

    Args:
        paths: a file, a glob, or a list of those: shards whose rows follow each other.
        datasets: dataset paths in the files, with the same number of rows; any shape [N, ...] of numbers.
        batch_size: rows of a batch.
        shuffle: True mixes rows within windows of `window_rows` from all over the data and decodes every chunk
            once; "exact" is a permutation of all rows that decodes nearly a chunk for every row (5 to 8 times the
            work at 8 rows a chunk); False keeps the order of the files.
        seed: of the order; not negative.
        num_threads: 0 takes one for every processor that the process may use.
        rank, world_size: which part of the rows, of how many. Parts are disjoint, cover all rows, and have the
            same number of batches.
        window_rows: rows that are mixed with each other, and decoded together.
        memory_budget: bytes, or text such as "1.25GB"; for decoded rows, not counting batches that the caller
            keeps. What a pass took of it is kept for the next one.
        pin_memory: batches in page-locked memory, where there is a CUDA device.
        drop_last: leaves out the last batch of a rank where it is not full.
        verify_checksums: whether fletcher32 checksums are compared; deflate's always are.
        cache_dir: a directory for uncompressed copies of what is stored compressed or in chunks. The first pass writes
            them and takes longer; later ones read as fast as memory or disk allow. A file that changes gets new
            copies; old ones are for the user to delete.
        unpack: whether numbers that stand for others are replaced (the CF conventions of netCDF): those equal to the
            attributes `_FillValue` or `missing_value` by NaN, others by number * `scale_factor` + `add_offset`; such a
            dataset becomes float32 or float64. False gives the numbers as they are stored.
        allow_external: False refuses links, virtual and external sources that lead out of the directory of the file
            that names them.

    Yields:
        {dataset path: tensor [b, ...] of the dataset's type (booleans: uint8), "index": [b] int64 row numbers over
        all shards}. Batches are the caller's: their memory is not used again while a tensor of it exists.

    Raises:
        ConfigError: an impossible setting; a memory_budget that does not hold two windows, naming the one that does.
        OutputError: an uncompressed copy cannot be written.
        DataError: a file is missing, unreadable or damaged; datasets or shards do not fit together. While
            iterating: rows of this batch cannot be read, naming file, dataset, chunk and byte.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        datasets: str | Sequence[str],
        batch_size: int = 512,
        shuffle: bool | Literal["exact"] = True,
        seed: int = 0,
        num_threads: int = 0,
        rank: int = 0,
        world_size: int = 1,
        window_rows: int = 8192,
        memory_budget: str | int = "1.25GB",
        pin_memory: bool = False,
        drop_last: bool = False,
        verify_checksums: bool = True,
        cache_dir: str | os.PathLike[str] | None = None,
        unpack: bool = True,
        allow_external: bool = True,
    ) -> None:
        self.paths = _paths(paths)
        self.datasets = _names(datasets)
        self.batch_size = _count("batch_size", batch_size)
        if shuffle not in (True, False, "exact"):
            raise ConfigError(f"shuffle: {shuffle!r}, expected True, False or 'exact'")
        self.shuffle: bool | Literal["exact"] = shuffle
        self.seed = _count("seed", seed, least=0)
        self.num_threads = _count("num_threads", num_threads, least=0) or processors()
        self.world_size = _count("world_size", world_size)
        self.rank = _count("rank", rank, least=0)
        if self.rank >= self.world_size:
            raise ConfigError(f"rank: {rank}, but world_size is {world_size}")
        self.window_rows = _count("window_rows", window_rows)
        try:
            self.memory_budget = parse_bytes(memory_budget)
        except ValueError as error:
            raise ConfigError(f"memory_budget: {error}, got {memory_budget!r}") from None
        self.pin_memory = pin_memory
        self.drop_last = drop_last
        self.verify_checksums = verify_checksums
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        if not self.datasets or len(set(self.datasets)) < len(self.datasets) or "index" in self.datasets:
            raise ConfigError(f"datasets: {self.datasets}, expected different names, none of them 'index'")
        self.unpack = unpack
        self.allow_external = allow_external
        self._epoch = 0
        self._batch = 0  # delivered of this epoch
        self._resume_at: int | None = None
        self._shared = SharedPosition()
        self._end: int | None = None  # in a DataLoader worker: the first batch that is not its own
        self._open()

    def _open(self) -> None:
        self._stats = PassStats()
        self._memory: list[BatchMemory] = []  # of the first pass, and of all that follow
        boundary = Boundary(self.allow_external)
        self._tables = Tables.open(find_files(self.paths), self.datasets, boundary=boundary)
        self._plan()
        if self.unpack:
            log_peculiarities(self._tables)
        for table in self._tables.tables:
            said = (self._tables.files[0], table.path, table.reason)
            if table.reason and said not in _said:
                _said.add(said)
                log.warning("%s: %s is read through h5py, which is slower, because of %s", *said)
            if self.shuffle and table.chunk_rows > self.window_rows:
                log.warning(
                    "%s: %s: chunks of %d rows are decoded for every window of %d rows that they reach into: a larger "
                    "window_rows saves time",
                    self._tables.files[0],
                    table.path,
                    table.chunk_rows,
                    self.window_rows,
                )

    def _plan(self) -> tuple[RowOrder, Windows]:
        """Order and sizes of a pass; raises ConfigError where the budget or the rows do not suffice."""
        tables = self._tables
        if tables.rows < self.world_size:
            raise ConfigError(f"world_size: {self.world_size} parts, but there are {tables.rows} rows")
        if self.batch_size == 1 and not self.drop_last and tables.rows % self.world_size:
            raise ConfigError(
                f"batch_size: with 1, {tables.rows} rows on {self.world_size} ranks make different numbers of batches; "
                "take 2 or drop_last"
            )
        rows = -(-tables.rows // self.world_size)
        if self.shuffle:
            windows = shuffled_windows(
                tables, self.batch_size, self.window_rows, rows, self.num_threads, self.memory_budget
            )
        else:
            windows = sequential_windows(tables, self.batch_size, rows, self.num_threads, self.memory_budget)
        order = RowOrder(
            tables.shard_rows,
            windows.unit_rows,
            windows.window_rows,
            self.batch_size,
            self.shuffle,
            self.seed,
            self.rank,
            self.world_size,
            self.drop_last,
        )
        if (needed := order.bytes) > self.memory_budget:
            raise ConfigError(
                f"memory_budget {self.memory_budget} does not hold the order of {tables.rows} rows: at least {needed} "
                "bytes are needed"
            )
        return order, windows

    # What an iteration needs is made when it begins, so that a loader can be pickled and forked at any time.
    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_tables", "_stats", "_memory")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    @property
    def rows(self) -> int:
        """Rows of all ranks."""
        return self._tables.rows

    @property
    def identities(self) -> tuple[Identity, ...]:
        """Of the files, as they were when the loader opened them; they must not change afterwards."""
        return self._tables.identities

    @property
    def origins(self) -> dict[str, tuple[Identity, ...]]:
        """Of all files that a dataset takes values from, linked and virtual ones included, by its path."""
        return self._tables.origins

    @property
    def epoch(self) -> int:
        """The pass that is under way, or the next one."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """The next pass is this one, from its beginning; in DataLoader workers as well."""
        self._epoch, self._batch, self._resume_at = _count("epoch", epoch, least=0), 0, None
        self._shared.set(self._epoch)

    def __len__(self) -> int:
        """Batches of a pass."""
        return len(self._plan()[0].batch_ends)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """One epoch, or what `load_state_dict` left of it. A pass that was left early is begun anew."""
        worker = get_worker_info()
        if worker is not None:
            return self._worker_pass(worker.id, worker.num_workers)
        if self._shared.workers_began:
            self.set_epoch(self._shared.next_epoch)
        epoch, first, self._resume_at = self._epoch, self._resume_at or 0, None
        self._batch = first
        self._shared.set(epoch)
        return self._main_pass(epoch, first)

    def _main_pass(self, epoch: int, first: int) -> Iterator[dict[str, Tensor]]:
        yield from self._pass(epoch, first, len(self))
        self._epoch, self._batch = epoch + 1, 0
        self._shared.set(self._epoch)

    def _worker_pass(self, worker: int, workers: int) -> Iterator[dict[str, Tensor]]:
        """The worker's run of the batches of the next epoch, or what `load_state_dict` left of it."""
        epoch, first = self._shared.begin(worker, workers)
        left = len(self) - first
        first, stop = (first + left * i // workers for i in (worker, worker + 1))
        if self._resume_at is not None and self._end is not None:  # a state of this worker
            first, stop = self._resume_at, self._end
        self._epoch, self._batch, self._end, self._resume_at = epoch, first, stop, None
        return self._pass(epoch, first, stop)

    def _pass(self, epoch: int, first: int, stop: int) -> Iterator[dict[str, Tensor]]:
        order, windows = self._plan()
        tables = self._tables
        if self.cache_dir is not None:  # the order is still that of the files
            tables = decoded_once(tables, self.cache_dir, windows.threads, self.verify_checksums)
        pin = self.pin_memory and torch.cuda.is_available()
        self._memory = self._memory or batch_memory(tables, order, windows.ahead, pin)
        self._stats = stats = PassStats()
        batches = LoaderPass(
            tables,
            order,
            epoch,
            first,
            stop,
            ahead=windows.ahead,
            threads=windows.threads,
            verify_checksums=self.verify_checksums,
            memory=self._memory,
            stats=stats,
        )
        with closing(batches):
            for number, batch in enumerate(batches, start=first + 1):
                self._epoch, self._batch = epoch, number
                yield tables.unpacked(batch) if self.unpack else batch

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which a loader of the same data and settings goes on after the last batch it gave.

        Raises:
            ConfigError: DataLoader workers gave batches since the last `set_epoch` or `load_state_dict`.
        """
        if get_worker_info() is None and self._shared.workers_began:
            raise ConfigError(
                "state_dict: DataLoader workers gave the batches, and the main process does not know their position: "
                "use num_workers=0 or torchdata's StatefulDataLoader, or call set_epoch between epochs"
            )
        state = {"epoch": self._epoch, "batch": self._batch, **self._settings()}
        if (share := _worker_share()) is not None:
            state |= {"worker": share, "end": self._end}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next pass goes on where `state` was taken; raises ConfigError where a setting differs."""
        expected = {**self._settings(), "worker": _worker_share()}
        for name, value in expected.items():
            if (given := state.get(name)) != value:
                raise ConfigError(f"{name}: {value!r}, but the state to go on from has {given!r}")
        epoch, batch = _count("epoch", state["epoch"], least=0), _count("batch", state["batch"], least=0)
        if (worker := get_worker_info()) is not None:
            self._end = _count("end", state["end"], least=0)
            self._shared.resume(worker.id, worker.num_workers, epoch)
        elif batch >= len(self):
            epoch, batch = epoch + 1, 0
        self._epoch, self._batch, self._resume_at = epoch, batch, batch
        if worker is None:
            self._shared.set(epoch, batch)

    def _settings(self) -> dict[str, Any]:
        """What the order of rows depends on."""
        names = ("seed", "shuffle", "rank", "world_size", "window_rows", "batch_size", "drop_last", "rows")
        return {name: getattr(self, name) for name in names}

    def stats(self) -> dict[str, Any]:
        """The pass that began last: batches, rows, chunks, bytes, seconds, decoded MB/s; how datasets are read."""
        return {
            **self._stats.summary(),
            "threads": self.num_threads,
            "inflate": _native.inflate_library(),
            "paths": {
                table.path: f"h5py, because of {table.reason}" if table.reason else "native"
                for table in self._tables.tables
            },
        }


def _worker_share() -> list[int] | None:
    """In a DataLoader worker: its number, and of how many."""
    worker = get_worker_info()
    return None if worker is None else [worker.id, worker.num_workers]


def log_peculiarities(tables: Tables) -> None:
    """Logs once what a user would not expect of the numbers of a dataset, or of the files that hold them."""
    for table in tables.tables:
        for shard in table.shards:
            found = []
            if shard.packing is not None:
                found.append(str(shard.packing))
            if shard.matlab and len(shard.shape) > 1 and shard.shape[0] < shard.shape[-1]:
                found.append(
                    f"written by MATLAB, which reverses axes: shape {shard.shape} is read as {shard.shape[0]} rows; "
                    "where these are the columns, save the transposed array"
                )
            sources = len({other.path for other in shard.backing if other.opened})
            if 2 * sources > (limit := descriptor_limit()):
                found.append(
                    f"takes values from {sources} files, but this process may have {limit} open; `ulimit -n` raises "
                    "the limit"
                )
            for text in found:
                key = (shard.file, table.path, text)
                # Shards mostly say the same: the first speaks for all.
                if (shard is table.shards[0] or shard.packing != table.shards[0].packing) and key not in _said:
                    _said.add(key)
                    log.warning("%s: %s: %s", shard.file, table.path, text)


def _paths(paths: Any) -> list[str]:
    """Paths as texts; raises ConfigError for what is no path."""
    given = [paths] if isinstance(paths, (str, bytes, os.PathLike, h5py.HLObject)) else paths
    found = []
    for path in given if isinstance(given, Sequence) else [given]:
        if isinstance(path, h5py.HLObject):
            name = path.file.filename if path else "the path of its file"
            raise ConfigError(
                f"paths: an open h5py {type(path).__name__} was given; close it and pass its path, {name!r}"
            )
        if not isinstance(path, (str, bytes, os.PathLike)):
            raise ConfigError(f"paths: {type(path).__name__} was given, expected a path, a glob, or a list of those")
        found.append(os.fsdecode(path))
    return found


def _names(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else [str(name) for name in names]


def _count(name: str, value: int, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}: {value!r}, expected a whole number of at least {least}")
    return value
