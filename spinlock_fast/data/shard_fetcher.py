"""Copies of remote shards for a pass: fetched before their rows are read, the next ones in the background."""

from __future__ import annotations

import logging
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spinlock_fast.data.file_cache import Hold
from spinlock_fast.data.remote_files import fetch, remote_file
from spinlock_fast.data.row_order import RowOrder
from spinlock_fast.data.shard_index import ShardIndex, index_copy
from spinlock_fast.data.sharded_dataset import ShardedDatasets
from spinlock_fast.data.window_sizes import WindowSizes
from spinlock_fast.errors import ConfigError, DataError, SpinlockFastError

log = logging.getLogger(__name__)


class ShardFetcher:
    """Fetches the shards of the windows of a pass. Does nothing for local files.

    Args:
        sharded: the shards.
        sequence: shards in the order in which they will be read, for fetching ahead; may be empty.
    """

    def __init__(self, sharded: ShardedDatasets, sequence: NDArray[np.int64]) -> None:
        self._sharded = sharded
        self._remote = any(remote_file(file) is not None for file in sharded.files)
        self._ends = np.cumsum(sharded.shard_rows)
        self._sequence = sequence if self._remote else np.empty(0, np.int64)
        self._place = {int(shard): place for place, shard in enumerate(self._sequence)}
        self._windows: deque[tuple[int, set[int]]] = deque()  # end position and shards of windows in flight
        self._holds: dict[int, Hold] = {}
        self._checked: set[int] = set()
        self._ahead: dict[int, Future[None]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def require(self, end: int, rows: NDArray[np.int64]) -> None:
        """Fetches the shards of a window that ends at a position, and holds them until `release`.

        Raises:
            ConfigError, DataError, OutputError: see `remote_files.fetch`.
        """
        if not self._remote:
            return
        shards = set(np.unique(np.searchsorted(self._ends, rows, side="right")).tolist())
        self._windows.append((end, shards))
        for shard in sorted(shards, key=lambda shard: self._place.get(shard, shard)):
            if shard not in self._holds:
                if (ahead := self._ahead.pop(shard, None)) is not None:
                    ahead.result()
                if (hold := fetch(self._sharded.files[shard])) is not None:
                    self._holds[shard] = hold
            if shard not in self._checked:
                self._check(shard)
        self._fetch_ahead(shards)

    def release(self, position: int) -> None:
        """Releases shards of windows that end at a position or before."""
        while self._windows and self._windows[0][0] <= position:
            self._windows.popleft()
        needed = set().union(*(shards for _, shards in self._windows))
        for shard in [shard for shard in self._holds if shard not in needed]:
            self._holds.pop(shard).release()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        while self._holds:
            self._holds.popitem()[1].release()

    def _fetch_ahead(self, shards: set[int]) -> None:
        """Fetches as many shards as are in use now, in a thread; without waiting for room in the cache."""
        last = max((self._place.get(shard, -1) for shard in shards), default=-1)
        for shard in self._sequence[last + 1 : last + 1 + len(shards)].tolist() if last >= 0 else ():
            if shard not in self._ahead and shard not in self._holds:
                self._pool = self._pool or ThreadPoolExecutor(1, "fetch-ahead")
                self._ahead[shard] = self._pool.submit(self._fetch_quietly, shard)

    def _fetch_quietly(self, shard: int) -> None:
        try:
            if (hold := fetch(self._sharded.files[shard], wait=False)) is not None:
                hold.release()
        except SpinlockFastError as error:  # raised again when its rows are needed
            log.debug("fetching ahead: %s", error)

    def _check(self, shard: int) -> None:
        """Raises DataError if a copy stores its values elsewhere than was found when it was indexed."""
        for dataset in self._sharded.datasets:
            index = dataset.shards[shard]
            if index.file == self._sharded.files[shard] and not _same_layout(index, index_copy(index)):
                raise DataError(f"{index.file}: {index.path}: the copy differs from the remote file; remove it")
        self._checked.add(shard)


def check_remote_shards(sharded: ShardedDatasets, order: RowOrder, windows: WindowSizes) -> None:
    """Raises ConfigError if the cache does not hold the remote shards that a pass reads at a time."""
    remote = [file for file in map(remote_file, sharded.files) if file is not None]
    if not remote:
        return
    scattered = order.shuffle and (order.shuffle == "exact" or order.shard_group is None)
    if scattered:
        count = len(remote)
    else:
        # Windows in flight lie in one group of shards, in two, or, if the shards are small, in several.
        group = (order.shard_group or 1) if order.shuffle else 1
        rows_in_flight = (windows.windows_ahead + 1) * windows.window_rows + order.batch_size
        smallest = max(1, min((rows for rows in sharded.shard_rows if rows), default=1) * group)
        count = group * (2 + rows_in_flight // smallest)
    largest = sorted((file.size for file in remote), reverse=True)[:count]
    if sum(largest) > (limit := min(file.cache_bytes for file in remote)):
        hint = ", or shard_group, which shuffles groups of shards one after the other" if scattered else ""
        raise ConfigError(
            f"remote_cache_size: {limit} bytes do not hold the {len(largest)} remote files that are read at a time, of "
            f"{sum(largest)} bytes; take a larger one{hint}"
        )


def _same_layout(a: ShardIndex, b: ShardIndex) -> bool:
    def comparable(layout: dict[str, Any] | None) -> Any:
        return layout and {key: value.tolist() if hasattr(value, "tolist") else value for key, value in layout.items()}

    layouts = ([comparable(segment.layout) for segment in shard.segments] for shard in (a, b))
    return (a.shape, a.dtype, next(layouts)) == (b.shape, b.dtype, next(layouts))
