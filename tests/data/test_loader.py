"""HDF5Loader: order, resuming, ranks, memory, threads and errors. `test_layouts` compares the values."""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import h5py
import helpers
import numpy as np
import pytest
import torch
from hdf5_layouts import NOT_NATIVE
from processes import forkserver
from torch.utils.data import DataLoader

from spinlock_fast import _native
from spinlock_fast.data import HDF5Loader
from spinlock_fast.data import loader as loader_module
from spinlock_fast.errors import ConfigError, DataError

PATHS = [helpers.SUMMARY, helpers.TEMPORAL]
ROWS = 203


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(helpers.write_dataset(tmp_path_factory.mktemp("data") / "a.h5", ROWS, seed=0))


def load(file: Any, paths: Any = PATHS, **settings: Any) -> HDF5Loader:
    return HDF5Loader(file, paths, **{"batch_size": 16, "window_rows": 48, "num_threads": 2, **settings})


def rows_of(batches: Any) -> list[int]:
    return [row for batch in batches for row in batch["index"].tolist()]


def resources() -> tuple[int, int]:
    """Threads and open descriptors of this process."""
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def test_batch_holds_tensors_by_dataset_and_row_numbers(file: str) -> None:
    batch = next(iter(load(file)))
    assert list(batch) == [*PATHS, "index"]
    assert batch[helpers.TEMPORAL].shape == (16, 32, 7)
    assert batch[helpers.TEMPORAL].dtype == torch.float32
    assert batch["index"].dtype == torch.int64


def test_single_path_and_dataset_are_accepted(file: str) -> None:
    batch = next(iter(HDF5Loader(Path(file), helpers.SUMMARY)))
    assert batch[helpers.SUMMARY].shape == (ROWS, 36)


@pytest.mark.parametrize("shuffle", [True, "exact"])
def test_order_does_not_depend_on_threads_budget_or_batch(file: str, shuffle: Any) -> None:
    expected = rows_of(load(file, shuffle=shuffle))
    assert sorted(expected) == list(range(ROWS))
    assert expected != sorted(expected)
    for change in ({"num_threads": 1}, {"num_threads": 5}, {"memory_budget": 300_000}, {"batch_size": 3}):
        assert rows_of(load(file, shuffle=shuffle, **change)) == expected


def test_each_iteration_is_the_next_epoch(file: str) -> None:
    loader = load(file)
    first, second = rows_of(loader), rows_of(loader)
    assert first != second
    again = load(file)
    again.set_epoch(1)
    assert rows_of(again) == second
    again.set_epoch(0)
    assert rows_of(again) == first


def test_incomplete_epoch_starts_again(file: str) -> None:
    loader = load(file)
    expected = rows_of(load(file))
    taken = [batch for batch, _ in zip(loader, range(3), strict=False)]
    assert rows_of(taken) == expected[:48]
    assert rows_of(loader) == expected


@pytest.mark.parametrize("shuffle", [True, False, "exact"])
@pytest.mark.parametrize("stop", [0, 1, 4, 12, 13])
def test_state_resumes_after_the_last_batch(file: str, shuffle: Any, stop: int) -> None:
    whole = load(file, shuffle=shuffle)
    expected = rows_of(whole) + rows_of(whole)
    loader = load(file, shuffle=shuffle)
    taken = []
    for _, batch in zip(range(stop), loader, strict=False):
        taken.append(batch)
    state = pickle.loads(pickle.dumps(loader.state_dict()))
    other = load(file, shuffle=shuffle, num_threads=1)
    other.load_state_dict(state)
    rest = list(other)
    if stop < 13:
        rest += list(other)
    assert rows_of(taken + rest) == expected
    for batch in rest[:2]:
        assert torch.isfinite(batch[helpers.TEMPORAL].nan_to_num()).all()


def test_resuming_decodes_only_the_remaining_chunks(file: str) -> None:
    loader = load(file)
    whole = len(rows_of(loader)) and loader.stats()["chunks"]
    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "batch": 12})
    assert len(rows_of(loader)) == ROWS - 12 * 16
    assert loader.stats()["chunks"] < whole / 3


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"batch_size": 8}, {"window_rows": 16}, {"shuffle": False}, {"drop_last": True}]
)
def test_state_of_other_settings_is_an_error(file: str, change: dict[str, Any]) -> None:
    with helpers.raises_one_line(ConfigError, next(iter(change))):
        load(file, **change).load_state_dict(load(file).state_dict())


def test_ranks_partition_the_rows(file: str) -> None:
    parts = [list(load(file, rank=rank, world_size=3)) for rank in range(3)]
    assert sorted(itertools.chain(*map(rows_of, parts))) == list(range(ROWS))
    assert len({len(part) for part in parts}) == 1
    assert len(parts[0]) == len(load(file, rank=0, world_size=3))


def test_drop_last_drops_partial_batches(file: str) -> None:
    batches = list(load(file, drop_last=True))
    assert [len(batch["index"]) for batch in batches] == [16] * 12
    assert list(load(file, drop_last=True, batch_size=1000)) == []


@pytest.mark.parametrize("keep", ["all", "views", "none"])
def test_memory_of_referenced_batches_is_not_reused(file: str, keep: str) -> None:
    """Memory is reused, but not while a tensor, slice or array refers to it."""
    kept, copies = [], []
    for batch in load(file, shuffle="exact", window_rows=16):
        part = batch[helpers.TEMPORAL]
        copies.append(part.clone())
        if keep == "all":
            kept.append(part)
        elif keep == "views":
            kept.append(part[2:].numpy() if len(kept) % 2 else part[2:])
        del part, batch
    for found, copy in zip(kept, copies, strict=False):
        np.testing.assert_array_equal(np.asarray(found), copy if keep == "all" else copy[2:])


def test_memory_is_reused(file: str) -> None:
    addresses = []
    for batch in load(file, batch_size=8, window_rows=16, shuffle=False):
        addresses.append(batch[helpers.TEMPORAL].data_ptr())
        del batch
    assert len(set(addresses)) < len(addresses) / 2


def test_closing_ends_threads_and_closes_files(file: str) -> None:
    list(load(file))  # starts threads that torch creates on first use
    before = resources()
    loader = load(file, num_threads=3, memory_budget=300_000)
    iterator = iter(loader)
    next(iterator)
    assert resources()[0] == before[0] + 3
    assert resources()[1] > before[1]
    del iterator
    assert resources() == before
    assert len(list(loader)) == 13
    assert resources() == before


def test_hundred_shards_need_few_descriptors(tmp_path: Path) -> None:
    for i in range(100):
        helpers.write_arrays(tmp_path / f"shard_{i}.h5", {"x": np.full((3, 2), i, np.float32)})
    loader = load(f"{tmp_path}/*.h5", "x", batch_size=50)
    before = resources()
    most = 0
    for batch in loader:
        most = max(most, resources()[1])
        torch.testing.assert_close(batch["x"][:, 0], (batch["index"] // 3).float())
    assert most <= before[1] + 40


def test_loader_can_be_pickled_during_iteration(file: str) -> None:
    loader = load(file)
    iterator = iter(loader)
    next(iterator)
    other = pickle.loads(pickle.dumps(loader))
    assert other.state_dict() == loader.state_dict()
    assert len(rows_of(other)) == ROWS
    assert len(rows_of(iterator)) == ROWS - 16


def test_fork_during_iteration(file: str) -> None:
    """The child can start its own pass, cannot continue that of its parent, and exits cleanly."""
    loader = load(file)
    iterator = iter(loader)
    next(iterator)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            try:
                next(iterator)
            except RuntimeError as error:
                if "forked" in str(error) and len(rows_of(loader)) == ROWS:
                    status = 0
            del iterator
        finally:
            os._exit(status)
    alarm = threading.Timer(60, lambda: os.kill(child, 9))
    alarm.start()
    assert os.waitpid(child, 0)[1] == 0
    alarm.cancel()
    assert len(rows_of(iterator)) == ROWS - 16


@pytest.mark.parametrize(("workers", "method"), [(0, None), (2, "fork"), (2, "forkserver")])
def test_dataloader_wraps_the_loader(file: str, workers: int, method: str | None) -> None:
    context = forkserver() if method == "forkserver" else method  # sends the loader to the workers, as "spawn" does
    batches = list(DataLoader(load(file), batch_size=None, num_workers=workers, multiprocessing_context=context))
    assert sorted(rows_of(batches)) == list(range(ROWS))


def test_h5py_and_native_datasets_stay_aligned(tmp_path: Path) -> None:
    path = str(tmp_path / "a.h5")
    with h5py.File(path, "w") as file:
        number = np.arange(100, dtype=np.int64)
        file.create_dataset("slow", data=number, chunks=(7,), **NOT_NATIVE)
        file.create_dataset("fast", data=np.stack([number] * 5, 1), chunks=(9, 2), compression="gzip")
    for batch in load(path, ["slow", "fast"], window_rows=30):
        assert torch.equal(batch["slow"], batch["index"])
        assert torch.equal(batch["fast"], batch["index"][:, None].expand(-1, 5))


def test_reading_through_h5py_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = str(helpers.write_dataset(tmp_path / "b.h5", 20, seed=0, compression=NOT_NATIVE["compression"]))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert load(file).stats()["paths"][helpers.SUMMARY] == "h5py, because of the filter bzip2"
    assert sum("bzip2" in message and helpers.SUMMARY in message for message in caplog.messages) == 1


def test_stats_count_batches_rows_and_bytes(file: str) -> None:
    loader = load(file, shuffle=False)
    list(loader)
    stats = loader.stats()
    assert stats["batches"] == 13
    assert stats["rows"] == ROWS
    assert stats["chunks"] == 2 * 26
    assert stats["decoded_bytes"] == 2 * 26 * 8 * 4 * (36 + 32 * 7) // 2
    assert 0 < stats["stored_bytes"] < 1.2 * stats["decoded_bytes"]
    assert 0 < stats["seconds_waited"] <= stats["seconds"] < 60
    assert stats["decoded_mb_per_second"] > 0
    assert stats["cpu_seconds"] > 0
    assert stats["inflate"] == _native.inflate_library()
    assert stats["threads"] == 2


def test_too_small_budget_names_a_sufficient_one(file: str) -> None:
    row = 4 * (36 + 32 * 7) + 8
    needed = 2 * 48 * row + 2 * 16 * row
    with helpers.raises_one_line(ConfigError, "memory_budget", f"at least {needed} bytes", "window_rows"):
        load(file, memory_budget=needed - 1)
    assert sorted(rows_of(load(file, memory_budget=needed))) == list(range(ROWS))


def test_too_small_sequential_budget_names_a_sufficient_one(file: str) -> None:
    needed = 3 * 16 * (4 * (36 + 32 * 7) + 8)
    with helpers.raises_one_line(ConfigError, "memory_budget", f"at least {needed} bytes", "batch_size"):
        load(file, shuffle=False, memory_budget=needed - 1)
    assert rows_of(load(file, shuffle=False, memory_budget=needed)) == list(range(ROWS))


def test_budget_counts_large_chunks(tmp_path: Path) -> None:
    file = str(helpers.write_arrays(tmp_path / "a.h5", {"x": np.zeros((20_000, 100), np.float32)}, chunk_rows=20_000))
    with helpers.raises_one_line(ConfigError, "memory_budget", "at least"):
        load(file, "x", memory_budget="8MB")
    assert sorted(rows_of(load(file, "x", memory_budget="30MB"))) == list(range(20_000))


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 0},
        {"batch_size": 2.5},
        {"shuffle": "yes"},
        {"seed": -1},
        {"num_threads": -1},
        {"rank": 1},
        {"world_size": 0},
        {"window_rows": 0},
        {"memory_budget": "much"},
        {"world_size": ROWS + 1},
        {"batch_size": 1, "world_size": 2},
    ],
    ids=repr,
)
def test_invalid_settings_are_named(file: str, settings: dict[str, Any]) -> None:
    with helpers.raises_one_line(ConfigError, next(iter(settings))):
        load(file, **settings)


@pytest.mark.parametrize("datasets", [[], [helpers.SUMMARY] * 2, ["index"]])
def test_invalid_dataset_lists_are_errors(file: str, datasets: list[str]) -> None:
    with helpers.raises_one_line(ConfigError, "datasets"):
        load(file, datasets)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("metadata/ic_types", "expected numbers"),
        ("features", "is a group"),
        ("features/temporal/feature", "nearest is features/temporal/features"),
    ],
)
def test_unusable_datasets_are_errors(file: str, path: str, words: str) -> None:
    with helpers.raises_one_line(DataError, file, path, words):
        load(file, path)


def test_dataset_without_rows_is_an_error(tmp_path: Path) -> None:
    file = str(helpers.write_arrays(tmp_path / "a.h5", {"x": np.zeros((0, 4), np.float32)}))
    with helpers.raises_one_line(DataError, "a.h5", "x has no rows"):
        load(file, "x")


def test_shards_of_different_types_are_errors(tmp_path: Path) -> None:
    for i, dtype in enumerate((np.float32, np.float64)):
        helpers.write_arrays(tmp_path / f"shard_{i}.h5", {"x": np.zeros((3, 4), dtype)})
    with helpers.raises_one_line(DataError, "shard_1.h5", "x", "float64", "float32", "shard_0.h5"):
        load(f"{tmp_path}/*.h5", "x")


def test_empty_shard_is_read_natively(tmp_path: Path) -> None:
    for i, rows in enumerate((0, 5)):
        helpers.write_arrays(tmp_path / f"shard_{i}.h5", {"x": np.zeros((rows, 4), np.float32)}, chunk_rows=None)
    assert load(f"{tmp_path}/*.h5", "x").stats()["paths"] == {"x": "native"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA device")
@pytest.mark.gpu
def test_pin_memory_returns_pinned_batches(file: str) -> None:
    for batch in load(file, pin_memory=True):
        assert batch[helpers.SUMMARY].is_pinned()


def test_pin_memory_without_a_device_is_ignored(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module.torch.cuda, "is_available", lambda: False)
    assert len(rows_of(load(file, pin_memory=True))) == ROWS


@pytest.mark.parametrize("shuffle", [True, False, "exact"])
def test_impossible_row_count_takes_no_memory(tmp_path: Path, shuffle: Any) -> None:
    """A damaged file may state any size; never-written rows are fill values."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", (10**15, 2), np.float32, chunks=(8, 2))
        file.create_dataset("y", (10**15, 2), np.float32)
    for path in ("x", "y"):
        loader = load(str(tmp_path / "a.h5"), path, shuffle=shuffle, world_size=2, rank=1)
        batches = iter(loader)
        rows = next(batches)["index"]
        assert len(loader) == 10**15 // 2 // 16
        assert len(set(rows.tolist())) == 16
        assert 0 <= int(rows.min()) <= int(rows.max()) < 10**15
        batches.close()  # type: ignore[attr-defined]
