"""Datasets that h5py reads: on a thread of their own, ahead, and without slowing shards that are read natively."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import helpers
import numpy as np
import pytest
from hdf5_layouts import NOT_NATIVE, check
from numpy.typing import NDArray

from spinlock_fast.data import HDF5Loader, h5py_reader
from spinlock_fast.data.h5py_reader import H5pyReader
from spinlock_fast.data.shard_index import ShardIndex
from spinlock_fast.errors import DataError

Shards = Callable[..., list[str]]


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    """Writes shards of 60 rows; `storages` are the settings of their dataset x."""

    def write(*storages: dict[str, Any], row: tuple[int, ...] = (5, 2)) -> list[str]:
        files = []
        for i, storage in enumerate(storages):
            files.append(str(tmp_path / f"{i}.h5"))
            with h5py.File(files[-1], "w") as file:
                values = np.random.default_rng(i).normal(size=(60, *row))
                file.create_dataset("x", data=values, chunks=(8, *row), **storage)
        return files

    return write


@pytest.mark.parametrize("shuffle", [True, False, "exact"])
@pytest.mark.parametrize("row", [(5, 2), (300,)])  # small rows are gathered by chunk, large ones copied one at a time
def test_only_shards_that_need_h5py_are_read_through_it(shards: Shards, shuffle: Any, row: tuple[int, ...]) -> None:
    files = shards({"compression": "gzip"}, NOT_NATIVE, {}, row=row)
    stats = check(files, ["x"], "h5py for 1 of 3 files, because of the filter bzip2", shuffle=shuffle)
    assert stats["decoded_bytes"] >= 2 * 60 * 8 * np.prod(row)
    if shuffle != "exact":
        assert stats["chunks"] < 60


@pytest.mark.parametrize("batch_size", [1, 7, 8, 64, 200])
@pytest.mark.parametrize("shuffle", [True, False])
def test_any_batch_size(shards: Shards, batch_size: int, shuffle: bool) -> None:
    check(shards(NOT_NATIVE, NOT_NATIVE), ["x"], "h5py, because", batch_size=batch_size, shuffle=shuffle)


def test_datasets_stay_open_within_a_pass(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    files = shards(NOT_NATIVE, NOT_NATIVE)
    loader = HDF5Loader(files, "x", batch_size=8, window_rows=16)
    opened: list[str] = []
    original = h5py.h5d.open
    monkeypatch.setattr(
        h5py.h5d, "open", lambda file, name, access: opened.append(name) or original(file, name, access)
    )
    assert sum(len(batch["x"]) for batch in loader) == 120
    assert opened == [b"x", b"x"]


def test_rows_are_read_ahead_on_another_thread(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, read = set(), []
    original = H5pyReader.read

    def record(reader: H5pyReader, index: ShardIndex, low: int, high: int, out: NDArray[Any]) -> None:
        threads.add(threading.current_thread())
        read.extend(range(low, high))
        original(reader, index, low, high, out)

    monkeypatch.setattr(H5pyReader, "read", record)
    loader = HDF5Loader(shards(NOT_NATIVE), "x", batch_size=8, shuffle=False)
    batches = iter(loader)
    next(batches)
    deadline = time.monotonic() + 20.0
    while len(read) <= 8 and time.monotonic() < deadline:  # the caller processes its batch
        time.sleep(0.01)
    assert len(read) > 8
    assert threading.main_thread() not in threads
    del batches
    assert not any(thread.is_alive() for thread in threads)


def test_consecutive_chunks_are_read_together(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = H5pyReader.read
    monkeypatch.setattr(
        H5pyReader,
        "read",
        lambda reader, index, low, high, out: sizes.append(high - low) or original(reader, index, low, high, out),
    )
    list(HDF5Loader(shards(NOT_NATIVE), "x", batch_size=30, shuffle=False))
    assert sizes == [30, 2, 28]  # libhdf5 keeps the rows 24..31 of a chunk that belong to two batches


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes read by Linux")
def test_chunks_that_batches_divide_are_decoded_once(tmp_path: Path) -> None:
    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    path, shape = tmp_path / "large.h5", (16, 350_000)
    with h5py.File(path, "w") as file:  # decoded chunks of 11 MB, more than the default cache of libhdf5 holds
        values = np.random.default_rng(0).integers(0, 200, shape, np.int32)
        stored = file.create_dataset("x", data=values, chunks=(8, shape[1]), scaleoffset=0).id.get_storage_size()
    loader = HDF5Loader(path, "x", batch_size=3, shuffle=False)
    before = bytes_read()
    rows = np.concatenate([batch["x"].numpy() for batch in loader])
    assert bytes_read() - before < 1.5 * stored
    np.testing.assert_array_equal(rows, values)


def test_an_error_belongs_to_the_batch_of_its_rows(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    original = H5pyReader.read

    def fail(reader: H5pyReader, index: ShardIndex, low: int, high: int, out: NDArray[Any]) -> None:
        if low >= 32:
            raise DataError(f"rows {low}")
        original(reader, index, low, high, out)

    monkeypatch.setattr(H5pyReader, "read", fail)
    batches = iter(HDF5Loader(shards(NOT_NATIVE), "x", batch_size=8, shuffle=False))
    for _ in range(4):
        next(batches)
    with helpers.raises_one_line(DataError, "rows 32"):
        next(batches)


def test_files_are_closed_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h5py_reader, "_MAX_OPEN_FILES", 3)
    files = []
    for i in range(8):
        files.append(str(tmp_path / f"{i}.h5"))
        with h5py.File(files[-1], "w") as file:
            file.create_dataset("x", data=np.arange(40.0).reshape(20, 2) + i, chunks=(4, 2), **NOT_NATIVE)
    check(files, ["x"], "h5py, because")
