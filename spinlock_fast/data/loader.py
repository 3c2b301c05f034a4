"""Batches of aligned rows of HDF5 datasets, decoded ahead by native threads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from spinlock_fast import _native
from spinlock_fast.data.batch_memory import BatchMemory
from spinlock_fast.data.dataset_warnings import log_slow_reading, log_unusual_datasets
from spinlock_fast.data.direct_reading import CallerTime
from spinlock_fast.data.hdf5_links import ExternalFilePolicy
from spinlock_fast.data.input_files import FileIdentity, find_files
from spinlock_fast.data.loader_arguments import checked_bytes, checked_int, names, path_strings
from spinlock_fast.data.loader_pass import LoaderPass, PassStats, batch_memory
from spinlock_fast.data.remote_files import RemoteCache
from spinlock_fast.data.row_order import RowOrder
from spinlock_fast.data.shard_fetcher import check_remote_shards
from spinlock_fast.data.sharded_dataset import ShardedDatasets
from spinlock_fast.data.shared_position import SharedPosition
from spinlock_fast.data.shared_shards import open_once, ranks_of_share
from spinlock_fast.data.uncompressed_copies import uncompressed_copies
from spinlock_fast.data.window_sizes import WindowSizes, available_cpus, sequential_windows, shuffled_windows
from spinlock_fast.distributed import SINGLE, Ranks
from spinlock_fast.errors import ConfigError, SpinlockFastError
from spinlock_fast.interrupts import deferred_interrupts


class HDF5Loader(IterableDataset[dict[str, Tensor]]):
    """Iterates over batches of rows of one or more datasets in HDF5 files.

    Native threads read and decode chunks without the GIL and without libhdf5, at least one window of rows ahead.
    Datasets that the native reader does not support (other compression filters, external files, ...) are read through
    h5py, with the same values but slower; `stats()["paths"]` shows how each dataset is read.

    In a distributed run whose ranks read one part each (rank and world_size are those of torch.distributed), rank 0
    opens the files for all of them, so all ranks must create their loader together.

    One iteration is one epoch. The order of rows depends only on the data, seed, epoch, rank, world_size and
    window_rows.

    Use it directly, or in a `DataLoader(loader, batch_size=None)`. Worker processes do not make it faster. With them an
    epoch has the same batches, and each worker yields a contiguous part of them. `set_epoch` and `load_state_dict` also
    reach the workers, including persistent ones. Each iteration is the next epoch, even if the previous one was not
    completed. The main process does not know the position of the workers, so `state_dict` raises ConfigError there; use
    torchdata's StatefulDataLoader, which queries the workers. A loader must not be used by two DataLoaders at a time.

    Args:
        paths: shards, whose rows are concatenated: a file, a glob, a text file with one path per line (`@files.txt` or
            a name that ends in .txt), an address that fsspec supports (`s3://`, `gs://`, `hf://`, `https://`, ...), or
            a list of those.
        datasets: dataset paths in the files, with the same number of rows; any shape [N, ...] of numbers.
        batch_size: rows per batch.
        shuffle: True shuffles chunks over all data and rows within windows of `window_rows`, and decodes each chunk
            once. "exact" permutes all rows and decodes about one chunk per row (5 to 8 times the work at 8 rows per
            chunk). False keeps the order of the files.
        seed: seed of the order; not negative.
        num_threads: decoding threads; 0 for one per available CPU.
        rank: part of the rows to read, of `world_size` parts.
        world_size: number of parts. They are disjoint, cover all rows, and have the same number of batches.
        window_rows: rows that are shuffled and decoded together.
        memory_budget: bytes, or a string such as "1.25GB", for decoded rows, without batches that the caller keeps.
            The memory is reused by later epochs.
        pin_memory: return batches in pinned memory, if there is a CUDA device.
        drop_last: drop the last batch of a rank if it is not full.
        verify_checksums: verify fletcher32 checksums; those of deflate are always verified.
        cache_dir: directory for uncompressed copies of compressed or chunked datasets. The first epoch writes them and
            takes longer; later ones read at the speed of memory or disk. A changed file gets new copies; delete old
            ones manually.
        unpack: unpack numbers by the CF conventions of netCDF: values equal to the attributes `_FillValue` or
            `missing_value` become NaN, others number * `scale_factor` + `add_offset`; the result is float32 or float64.
            False returns the stored numbers.
        allow_external: False rejects links and virtual or external sources outside the directory of the file that
            refers to them.
        shard_group: number of shards whose chunks `shuffle=True` permutes together: shards are permuted first, and read
            group by group, so that an epoch reads each of them once. None permutes the chunks of all shards.
        manifest_dir: directory for a manifest of the shards (sizes, times, shapes, places of chunks), with which later
            runs open only shards that have changed. It may be the directory of the data.
        remote_cache_dir: directory for copies of remote files; by default SPINLOCK_FAST_REMOTE_CACHE, or in the cache
            directory of the user.
        remote_cache_size: size limit of that directory, in bytes or as "20GB" (the default).

    Yields:
        {dataset path: tensor [b, ...] of the dataset's type (uint8 for booleans), "index": [b] int64 row numbers over
        all shards}. The memory of a batch is not reused while a tensor refers to it.

    Raises:
        ConfigError: a setting is invalid, or memory_budget is too small (the message names a sufficient one).
        OutputError: an uncompressed copy cannot be written.
        DataError: a file is missing, unreadable or damaged, or datasets or shards do not match. While iterating: rows
            of this batch cannot be read; the message names file, dataset, chunk and byte.
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
        shard_group: int | None = None,
        manifest_dir: str | os.PathLike[str] | None = None,
        remote_cache_dir: str | os.PathLike[str] | None = None,
        remote_cache_size: str | int | None = None,
    ) -> None:
        self.paths = path_strings(paths)
        self.datasets = names(datasets)
        self.batch_size = checked_int("batch_size", batch_size)
        if shuffle not in (True, False, "exact"):
            raise ConfigError(f"shuffle: {shuffle!r}, expected True, False or 'exact'")
        self.shuffle: bool | Literal["exact"] = shuffle
        self.seed = checked_int("seed", seed, minimum=0)
        self.num_threads = checked_int("num_threads", num_threads, minimum=0) or available_cpus()
        self.world_size = checked_int("world_size", world_size)
        self.rank = checked_int("rank", rank, minimum=0)
        if self.rank >= self.world_size:
            raise ConfigError(f"rank: {rank}, but world_size is {world_size}")
        self.window_rows = checked_int("window_rows", window_rows)
        self.memory_budget = checked_bytes("memory_budget", memory_budget)
        self.pin_memory = pin_memory
        self.drop_last = drop_last
        self.verify_checksums = verify_checksums
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        if not self.datasets or len(set(self.datasets)) < len(self.datasets) or "index" in self.datasets:
            raise ConfigError(f"datasets: {self.datasets}, expected different names, none of them 'index'")
        self.unpack = unpack
        self.allow_external = allow_external
        self.shard_group = None if shard_group is None else checked_int("shard_group", shard_group)
        self.manifest_dir = None if manifest_dir is None else Path(manifest_dir)
        self._remote_cache = RemoteCache(
            None if remote_cache_dir is None else Path(remote_cache_dir),
            None if remote_cache_size is None else checked_bytes("remote_cache_size", remote_cache_size),
        )
        self._epoch = 0
        self._batch = 0  # batches delivered in this epoch
        self._resume_at: int | None = None
        self._shared = SharedPosition()
        self._caller = CallerTime()
        self._end: int | None = None  # in a DataLoader worker: end of its range of batches
        self._open(ranks_of_share(self.rank, self.world_size))

    def _open(self, ranks: Ranks) -> None:
        self._stats = PassStats()
        self._memory: list[BatchMemory] = []  # allocated by the first pass, reused by later ones
        self._sharded = open_once(ranks, self._open_shards)
        self._plan()
        if self.unpack:
            log_unusual_datasets(self._sharded)
        log_slow_reading(self._sharded, self.window_rows if self.shuffle else None)

    def refresh(self) -> int:
        """Opens the files again, to follow a writer: rows appended since, files that a glob matches now.

        The next iteration reads them; one that has begun continues with the rows that it had. Another process may
        append to a file that it has opened in SWMR mode (single writer, multiple readers), if it flushes the datasets.
        All datasets that the loader reads must have the same number of rows when this is called.

        In a distributed run whose ranks read one part each, all ranks must call it together. DataLoader workers that
        start afterwards follow, persistent ones do not. `load_state_dict` rejects a state from before rows were added.

        Returns:
            Number of rows of all ranks.

        Raises:
            ConfigError, DataError: as the constructor. The loader then continues with the rows that it had.
        """
        before = self._stats, self._memory, self._sharded
        try:
            self._open(ranks_of_share(self.rank, self.world_size))
        except SpinlockFastError:
            self._stats, self._memory, self._sharded = before
            raise
        return self.rows

    def _open_shards(self) -> ShardedDatasets:
        policy = ExternalFilePolicy(self.allow_external)
        files = find_files(self.paths, self._remote_cache)
        return ShardedDatasets.open(files, self.datasets, policy=policy, manifest_dir=self.manifest_dir)

    def _plan(self) -> tuple[RowOrder, WindowSizes]:
        """Order and window sizes of a pass; raises ConfigError if the budget or the number of rows is too small."""
        sharded = self._sharded
        if sharded.rows < self.world_size:
            raise ConfigError(f"world_size: {self.world_size} parts, but there are {sharded.rows} rows")
        if self.batch_size == 1 and not self.drop_last and sharded.rows % self.world_size:
            raise ConfigError(
                f"batch_size: with 1, {sharded.rows} rows on {self.world_size} ranks make different numbers of "
                "batches; take 2 or drop_last"
            )
        rows = -(-sharded.rows // self.world_size)
        if self.shuffle:
            windows = shuffled_windows(
                sharded, self.batch_size, self.window_rows, rows, self.num_threads, self.memory_budget
            )
        else:
            windows = sequential_windows(sharded, self.batch_size, rows, self.num_threads, self.memory_budget)
        order = RowOrder(
            sharded.shard_rows,
            windows.unit_rows,
            windows.window_rows,
            self.batch_size,
            self.shuffle,
            self.seed,
            self.rank,
            self.world_size,
            self.drop_last,
            self.shard_group,
        )
        if (needed := order.nbytes) > self.memory_budget:
            raise ConfigError(
                f"memory_budget {self.memory_budget} does not hold the order of {sharded.rows} rows: at least {needed} "
                "bytes are needed"
            )
        check_remote_shards(sharded, order, windows)
        return order, windows

    def __getstate__(self) -> dict[str, Any]:
        # Threads and open files belong to an iteration, so that a loader can be pickled and forked at any time.
        return {key: value for key, value in vars(self).items() if key not in ("_sharded", "_stats", "_memory")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open(SINGLE)

    @property
    def rows(self) -> int:
        """Number of rows of all ranks."""
        return self._sharded.rows

    @property
    def identities(self) -> tuple[FileIdentity, ...]:
        """Identities of the files when the loader opened them; the files must not change afterwards."""
        return self._sharded.identities

    @property
    def origins(self) -> dict[str, tuple[FileIdentity, ...]]:
        """Identities of all files that hold values of a dataset, including linked and virtual sources, by its path."""
        return self._sharded.origins

    @property
    def epoch(self) -> int:
        """The current epoch, or the next one between iterations."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration, also in DataLoader workers."""
        self._epoch, self._batch, self._resume_at = checked_int("epoch", epoch, minimum=0), 0, None
        self._shared.set(self._epoch)

    def __len__(self) -> int:
        """Number of batches of an epoch."""
        return self._plan()[0].batch_count

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Iterates over one epoch, or its rest after `load_state_dict`. An epoch that was left early starts again."""
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
        yield from self._pass(epoch, first, None)
        self._epoch, self._batch = epoch + 1, 0
        self._shared.set(self._epoch)

    def _worker_pass(self, worker: int, workers: int) -> Iterator[dict[str, Tensor]]:
        """The worker's part of the batches of the next epoch, or its rest after `load_state_dict`."""
        epoch, first = self._shared.begin(worker, workers)
        remaining = len(self) - first
        first, stop = (first + remaining * i // workers for i in (worker, worker + 1))
        if self._resume_at is not None and self._end is not None:  # resumed by `load_state_dict` in this worker
            first, stop = self._resume_at, self._end
        self._epoch, self._batch, self._end, self._resume_at = epoch, first, stop, None
        return self._pass(epoch, first, stop)

    def _pass(self, epoch: int, first: int, stop: int | None) -> Iterator[dict[str, Tensor]]:
        order, windows = self._plan()
        sharded = self._sharded
        if self.cache_dir is not None:  # the order is still that of the original files
            sharded = uncompressed_copies(sharded, self.cache_dir, windows.threads, self.verify_checksums)
        pin = self.pin_memory and torch.cuda.is_available()
        self._memory = self._memory or batch_memory(sharded, order, windows.windows_ahead, pin)
        self._stats = stats = PassStats()
        batches = LoaderPass(
            sharded,
            order,
            epoch,
            first,
            stop,
            windows_ahead=windows.windows_ahead,
            threads=windows.threads,
            verify_checksums=self.verify_checksums,
            memory=self._memory,
            stats=stats,
            caller=self._caller,
        )
        try:
            for number, batch in enumerate(batches, start=first + 1):
                self._epoch, self._batch = epoch, number
                yield sharded.unpack(batch) if self.unpack else batch
        finally:
            with deferred_interrupts(finalizing=True):  # a caller that leaves its loop early drops the generator
                batches.close()

    def state_dict(self) -> dict[str, Any]:
        """State from which a loader with the same data and settings resumes after the last delivered batch.

        Raises:
            ConfigError: DataLoader workers delivered batches since the last `set_epoch` or `load_state_dict`.
        """
        if get_worker_info() is None and self._shared.workers_began:
            raise ConfigError(
                "state_dict: DataLoader workers delivered the batches, and the main process does not know their "
                "position; use num_workers=0 or torchdata's StatefulDataLoader, or call set_epoch between epochs"
            )
        state = {"epoch": self._epoch, "batch": self._batch, **self._settings()}
        if (share := _worker_position()) is not None:
            state |= {"worker": share, "end": self._end}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes the next iteration at `state`; raises ConfigError if a setting differs."""
        expected = {**self._settings(), "worker": _worker_position()}
        for name, value in expected.items():
            if (saved := state.get(name)) != value:
                raise ConfigError(f"{name}: {value!r}, but the state to resume from has {saved!r}")
        epoch, batch = (
            checked_int("epoch", state["epoch"], minimum=0),
            checked_int("batch", state["batch"], minimum=0),
        )
        if (worker := get_worker_info()) is not None:
            self._end = checked_int("end", state["end"], minimum=0)
            self._shared.resume(worker.id, worker.num_workers, epoch)
        elif batch >= len(self):
            epoch, batch = epoch + 1, 0
        self._epoch, self._batch, self._resume_at = epoch, batch, batch
        if worker is None:
            self._shared.set(epoch, batch)

    def _settings(self) -> dict[str, Any]:
        """Settings that determine the order of rows and batches."""
        names = "seed shuffle rank world_size window_rows batch_size drop_last rows shard_group"
        return {name: getattr(self, name) for name in names.split()}

    def stats(self) -> dict[str, Any]:
        """Statistics of the last pass (batches, rows, chunks, bytes, seconds, MB/s) and how datasets are read."""
        return {
            **self._stats.summary(),
            "threads": self.num_threads,
            "inflate": _native.inflate_library(),
            "codecs": _native.codec_libraries(),
            "paths": {dataset.path: dataset.reading for dataset in self._sharded.datasets},
        }


def _worker_position() -> list[int] | None:
    """[worker number, number of workers] in a DataLoader worker; else None."""
    worker = get_worker_info()
    return None if worker is None else [worker.id, worker.num_workers]
