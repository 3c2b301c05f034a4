"""Contiguous data in order, which the caller of a loader reads itself if it takes little time for each batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from spinlock_fast.data import HDF5Loader
from spinlock_fast.data.batch_memory import BatchMemory
from spinlock_fast.data.direct_reading import CallerTime
from spinlock_fast.data.loader_pass import LoaderPass
from spinlock_fast.errors import DataError

ROWS = (37, 0, 50)  # of the shards
Batches = list[dict[str, torch.Tensor]]


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    paths = []
    first = 0
    for number, rows in enumerate(ROWS):
        paths.append(str(tmp_path / f"{number}.h5"))
        x = np.arange(first * 60, (first + rows) * 60, dtype="f4").reshape(rows, 60)
        with h5py.File(paths[-1], "w") as file:
            file.create_dataset("x", data=x)
            file.create_dataset("y", data=x[:, :3].astype(">i8" if number else "<i8"))
        first += rows
    return paths


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Lets all callers read directly; filled with whether each batch was."""
    found: list[bool] = []
    read = LoaderPass._read_directly

    def recorded(self: LoaderPass, end: int) -> dict[str, torch.Tensor] | None:
        batch = read(self, end)
        found.append(batch is not None)
        return batch

    monkeypatch.setattr(LoaderPass, "_read_directly", recorded)
    monkeypatch.setattr(CallerTime, "shorter_than", lambda self, seconds: seconds > 0)
    return found


def load(paths: Any, **settings: Any) -> HDF5Loader:
    return HDF5Loader(paths, ["x", "y"], 8, **{"shuffle": False, "num_threads": 1, **settings})


def check(batches: Batches, rows: list[int]) -> None:
    assert torch.cat([batch["index"] for batch in batches]).tolist() == rows
    for batch in batches:
        assert list(batch) == ["x", "y", "index"]
        assert batch["index"].dtype == torch.int64
        values = batch["index"][:, None] * 60 + torch.arange(60)
        assert torch.equal(batch["x"], values.float())
        assert torch.equal(batch["y"], values[:, :3])


def test_batches_of_several_datasets_and_shards(shards: list[str], direct: list[bool]) -> None:
    loader = load(shards)
    for _ in range(2):
        batches = list(loader)
        assert [len(batch["x"]) for batch in batches] == [8] * 10 + [7]
        check(batches, list(range(87)))
    assert direct == [True] * 22
    stats = loader.stats()
    assert (stats["batches"], stats["rows"], stats["decoded_bytes"]) == (11, 87, 87 * (240 + 24))


def test_no_thread_starts(shards: list[str], direct: list[bool]) -> None:
    batches = iter(load(shards))
    next(batches)
    before = len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 0
    next(batches)
    assert before == (len(os.listdir("/proc/self/task")) if before else 0)


def test_ranks_and_resuming(shards: list[str], direct: list[bool]) -> None:
    loaders = [load(shards, rank=rank, world_size=4) for rank in range(4)]
    ends = [87 * rank // 4 for rank in range(5)]
    for rank, loader in enumerate(loaders):
        iterator = iter(loader)
        begun = [next(iterator)]
        resumed = load(shards, rank=rank, world_size=4)
        resumed.load_state_dict(loader.state_dict())
        check([*begun, *resumed], list(range(ends[rank], ends[rank + 1])))
    assert all(direct)


@pytest.mark.parametrize("seed", range(5))
def test_callers_that_become_slower_and_faster(
    shards: list[str], direct: list[bool], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are the same in any mixture of direct reading and reading ahead."""
    random = np.random.default_rng(seed)
    fast = [False]

    def caller(loader: HDF5Loader) -> Iterator[dict[str, torch.Tensor]]:
        for batch in loader:
            yield batch
            fast[0] = bool(random.random() < (0.95 if fast[0] else 0.3))

    monkeypatch.setattr(CallerTime, "shorter_than", lambda self, seconds: seconds > 0 and fast[0])
    loader = HDF5Loader(shards, ["x", "y"], 2, shuffle=False, num_threads=2)
    for _ in range(2):
        check(list(caller(loader)), list(range(87)))
    assert len(set(direct)) == 2


def test_caller_that_becomes_faster_reads_directly_again(
    shards: list[str], direct: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = [False]
    monkeypatch.setattr(CallerTime, "shorter_than", lambda self, seconds: seconds > 0 and fast[0])
    batches = []
    for number, batch in enumerate(HDF5Loader(shards, ["x", "y"], 2, shuffle=False, num_threads=1)):
        batches.append(batch)
        fast[0] = number >= 4
    check(batches, list(range(87)))
    assert direct == sorted(direct)
    assert 5 <= direct.index(True) < 5 + 10  # after the windows that were submitted


def test_data_contiguous_in_some_shards(tmp_path: Path, direct: list[bool]) -> None:
    x = np.arange(80 * 60, dtype="f4").reshape(80, 60)
    for number, storage in enumerate(({}, {"chunks": True, "compression": "gzip"})):
        with h5py.File(tmp_path / f"{number}.h5", "w") as file:
            file.create_dataset("x", data=x[40 * number :][:40], **storage)
            file.create_dataset("y", data=x[40 * number :][:40, :3].astype("i8"), **storage)
    check(list(load(str(tmp_path / "*.h5"))), list(range(80)))
    assert not any(direct)


def test_times_of_the_last_batches_decide() -> None:
    caller = CallerTime()
    for seconds in (1.0, 1e-6, 1.0):
        assert not caller.shorter_than(1e-3)  # too few
        caller.add(seconds)
    caller.add(1.0)
    assert caller.shorter_than(1e-3)  # the others may be interruptions
    caller.add(1.0)
    caller.add(1.0)
    assert not caller.shorter_than(1e-3)


@pytest.mark.parametrize(
    ("settings", "storage"),
    [({"shuffle": True}, {}), ({"shuffle": "exact"}, {}), ({"num_threads": 3}, {}), ({}, {"chunks": (4, 60)})],
)
def test_other_orders_layouts_and_more_threads_are_read_ahead(
    tmp_path: Path, direct: list[bool], settings: dict[str, Any], storage: dict[str, Any]
) -> None:
    x = np.arange(87 * 60, dtype="f4").reshape(87, 60)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=x, **storage)
        file.create_dataset("y", data=x[:, :3].astype("i8"))
    batches = list(load(str(tmp_path / "a.h5"), **settings))
    check(batches, torch.cat([batch["index"] for batch in batches]).tolist())
    assert not any(direct)


@pytest.mark.parametrize("change", ["shorter", "touched"])
def test_changed_file_is_the_error_of_the_threads(shards: list[str], direct: list[bool], change: str) -> None:
    messages = []
    for threads in (1, 3):
        batches = iter(load(shards, num_threads=threads, memory_budget=10_000))
        next(batches)
        size = os.path.getsize(shards[2])
        if change == "shorter":
            os.truncate(shards[2], size - 5000)
        else:
            os.utime(shards[2], ns=(threads, threads))
        with pytest.raises(DataError, match=r"2\.h5: x: rows 0\.\.49 at byte 2048: the file has changed") as error:
            list(batches)
        messages.append(str(error.value))
        os.truncate(shards[2], size)
        os.utime(shards[2], ns=(9, 9))
    assert messages[0] == messages[1]
    assert direct[0]


def test_referenced_batches_are_not_overwritten(shards: list[str], direct: list[bool]) -> None:
    loader = load(shards)
    kept = [batch["x"][3:] for batch in loader]
    assert all(direct)
    expected = torch.arange(87 * 60.0).reshape(87, 60).split(8)
    assert all(torch.equal(part, batch[3:]) for part, batch in zip(kept, expected, strict=True))


def test_large_memory_begins_at_a_page() -> None:
    memory = BatchMemory((3, 5), np.dtype("f8"), 3000, 4, pin=False)
    addresses = set()
    for rows in (3000, 7, 3000):
        tensor, array = memory.allocate(rows)
        assert tensor.shape == array.shape == (rows, 3, 5)
        assert tensor.dtype == torch.float64
        assert tensor.data_ptr() == array.ctypes.data
        assert array.ctypes.data % 4096 == 0
        addresses.add(tensor.data_ptr())
        tensor[:] = 1.0
        del tensor, array
    assert len(addresses) == 1
