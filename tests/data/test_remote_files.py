"""Files of remote stores: copies in a cache of limited size, through fsspec's file system in memory."""

from __future__ import annotations

import builtins
import fcntl
import itertools
import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from remote_shards import ROWS, SHARDS, VALUES, assert_rows, copies, load, shard_bytes

from spinlock_fast.data import HDF5Loader, file_cache, remote_files, shard_index
from spinlock_fast.data.feature_source import FeatureSource
from spinlock_fast.data.input_files import FileIdentity
from spinlock_fast.data.remote_files import RemoteCache, shown_url
from spinlock_fast.data.shard_fetcher import ShardFetcher
from spinlock_fast.errors import ConfigError, DataError, OutputError
from spinlock_fast.trajectories.layouts import open_trajectories
from spinlock_fast.trajectories.options import Options


@pytest.mark.parametrize("settings", [{}, {"shuffle": True}, {"shuffle": "exact"}, {"shard_group": 2, "shuffle": True}])
def test_rows_are_those_of_the_local_files(local: Path, store: Any, cache: Path, settings: Any) -> None:
    remote = load(cache, **settings)
    assert store.downloads == []  # indexed by reading parts
    rows = assert_rows(remote)
    assert rows == assert_rows(load(cache, str(local / "s*.h5"), **settings))
    assert sorted(store.downloads) == copies(cache) == [f"s{i}.h5" for i in range(SHARDS)]
    assert_rows(remote)
    assert_rows(load(cache, **settings))
    assert len(store.downloads) == SHARDS


def test_index_of_a_remote_file_is_that_of_its_copy(local: Path, store: Any, cache: Path) -> None:
    loader = load(cache)
    for dataset in loader._sharded.datasets:
        for shard in dataset.shards:
            expected = shard_index.index_file(local / shard.file.name.partition("-")[2], [dataset.path])[dataset.path]
            for name, value in (expected.native_layout or {}).items():
                np.testing.assert_equal((shard.native_layout or {})[name], value, name)


def test_file_that_cannot_be_read_in_parts_is_downloaded(
    store: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_ranges(*_: Any) -> None:
        raise ValueError("The HTTP server doesn't appear to support range requests")

    monkeypatch.setattr(remote_files.RemoteFile, "open", no_ranges)
    loader = load(cache)
    assert len(store.downloads) == SHARDS
    assert_rows(loader)
    assert len(store.downloads) == SHARDS


@pytest.mark.parametrize("settings", [{}, {"shuffle": True, "shard_group": 1}])
def test_cache_stays_below_its_limit(local: Path, store: Any, cache: Path, settings: Any) -> None:
    limit = 5 * shard_bytes(local) + 100
    loader = load(cache, remote_cache_size=limit, **settings)
    for _ in range(2):
        batches, rows = iter(loader), []
        for batch in batches:
            rows.append(batch)
            sizes = [status.st_size for status in file_cache.FileCache(cache, limit)._copies().values()]
            assert sum(sizes) <= limit
        assert_rows(rows)
    assert len(store.downloads) > SHARDS
    assert len(copies(cache)) == 5


def test_next_shards_are_fetched_ahead(store: Any, cache: Path) -> None:
    """As many as are in use, in the given order."""
    sharded = load(cache)._sharded
    fetcher = ShardFetcher(sharded, np.array([5, 2, 0, 1, 3, 4, 6, 7]))
    fetcher.require(2 * ROWS, np.array([5 * ROWS, 2 * ROWS + 1]))
    while len(copies(cache)) < 4:
        time.sleep(0.01)
    fetcher.close()
    assert copies(cache) == ["s0.h5", "s1.h5", "s2.h5", "s5.h5"]
    assert set(store.downloads[:2]) == {"s2.h5", "s5.h5"}


def test_too_small_caches_are_errors(local: Path, store: Any, cache: Path) -> None:
    size = (local / "s0.h5").stat().st_size
    with helpers.raises_one_line(ConfigError, "remote_cache_size: 1000 bytes", "memory://", f"s0.h5 of {size} bytes"):
        load(cache, remote_cache_size=1000)
    with helpers.raises_one_line(ConfigError, f"remote_cache_size: {size + 100} bytes", "remote files that are read"):
        load(cache, remote_cache_size=size + 100)
    with helpers.raises_one_line(ConfigError, "remote_cache_size", f"{SHARDS} remote files", "shard_group"):
        load(cache, remote_cache_size=4 * size, shuffle=True)
    with helpers.raises_one_line(ConfigError, "remote_cache_size", "much"):
        load(cache, remote_cache_size="much")


def test_changed_remote_file_is_fetched_again(local: Path, store: Any, cache: Path) -> None:
    assert_rows(load(cache))
    store.pipe_file("/data/s3.h5", (local / "s4.h5").read_bytes())
    with pytest.raises(AssertionError):
        assert_rows(load(cache))
    assert store.downloads.count("s3.h5") == 2
    assert len(store.downloads) == SHARDS + 1


def test_file_that_changes_after_it_was_opened_is_an_error(local: Path, store: Any, cache: Path) -> None:
    loader = load(cache)
    store.pipe_file("/data/s0.h5", (local / "s0.h5").read_bytes())
    with helpers.raises_one_line(DataError, "s0.h5", "has changed since it was opened"):
        next(iter(loader))
    assert copies(cache) == []


def test_failed_and_partial_downloads_are_repeated(
    store: Any, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original, calls = type(store).get_file, itertools.count()

    def get_file(self: Any, path: str, target: str, **options: Any) -> None:
        original(self, path, target, **options)
        match next(calls) % 3:
            case 0:
                os.truncate(target, 100)
            case 1:
                raise ConnectionError("reset by peer")

    monkeypatch.setattr(type(store), "get_file", get_file)
    with caplog.at_level(logging.WARNING):
        assert_rows(load(cache))
    assert "100 of " in caplog.text
    assert "reset by peer" in caplog.text


def test_download_that_always_fails_is_an_error(store: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = load(cache)
    monkeypatch.setattr(type(store), "get_file", lambda *_, **__: (_ for _ in ()).throw(TimeoutError("too slow")))
    with helpers.raises_one_line(DataError, "s0.h5", "cannot be downloaded, after 5 attempts", "too slow"):
        next(iter(loader))
    assert [name for name in os.listdir(cache) if not name.endswith(".lock")] == []


def test_truncated_copy_is_fetched_again(store: Any, cache: Path) -> None:
    assert_rows(load(cache))
    for name in os.listdir(cache):
        os.truncate(cache / name, 500)
    assert_rows(load(cache))
    assert len(store.downloads) == 2 * SHARDS


def test_families_and_names_of_remote_files(store: Any, cache: Path, local: Path) -> None:
    remote_cache = RemoteCache(cache, 7 * shard_bytes(local))
    with FeatureSource("memory://data/s*.h5", {"x": "x"}, remote_cache=remote_cache) as source:
        rows = np.arange(0, source.rows, 50)[::-1].copy()
        assert np.array_equal(source.read_rows("x", rows), VALUES[rows])
        for start, block in source.batches(["x"], 100, 10**6, torch.device("cpu")):
            assert np.array_equal(block["x"].numpy(), VALUES[start : start + 100])
        whole = source.read_whole("y")
    assert whole is not None
    assert np.array_equal(whole, VALUES[:, :3])


def test_manifest_of_remote_files(store: Any, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_rows(load(cache, manifest_dir=tmp_path / "manifest"))
    shard_index._cache.clear()
    monkeypatch.setattr(shard_index, "_index_remote", lambda *_: pytest.fail("read again"))
    load(cache, manifest_dir=tmp_path / "manifest")


def test_lists_may_name_remote_files(store: Any, cache: Path, tmp_path: Path, local: Path) -> None:
    (tmp_path / "files.txt").write_text(f"memory://data/s0.h5\n{local}/s1.h5\nmemory://data/s[23].h5")
    assert_rows(load(cache, str(tmp_path / "files.txt")), 4 * ROWS)


@pytest.mark.parametrize(
    ("path", "texts"),
    [
        ("memory://data/none.h5", ("memory://data/none.h5: no such file",)),
        ("memory://data/n*.h5", ("no file matches",)),
        ("memory://data", ("is a directory",)),
        ("abc://data/a.h5", ("abc://data/a.h5", "abc")),
        ("s3://bucket/a.h5", ("s3://bucket/a.h5", "s3fs", "pip")),
    ],
)
def test_addresses_that_cannot_be_read(store: Any, cache: Path, path: str, texts: tuple[str, ...]) -> None:
    if path.startswith("s3") and __import__("importlib.util").util.find_spec("s3fs"):
        pytest.skip("s3fs is installed")
    with helpers.raises_one_line(DataError, *texts):
        load(cache, path)


def test_missing_fsspec_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def no_fsspec(name: str, *rest: Any, **options: Any) -> Any:
        if name.startswith("fsspec"):
            raise ImportError(name)
        return original(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", no_fsspec)
    with helpers.raises_one_line(DataError, "gs://a/b.h5", "fsspec", "pip install 'spinlock-fast[remote]'"):
        load(cache, "gs://a/b.h5")


def test_cache_directory_that_cannot_be_written_is_an_error(store: Any, cache: Path) -> None:
    cache.write_text("a file")
    with helpers.raises_one_line(OutputError, str(cache), "cannot be written"):
        next(iter(load(cache)))


def test_passwords_and_signatures_are_not_shown() -> None:
    assert shown_url("https://me:secret@host/a.h5?X-Signature=secret#x") == "https://host/a.h5"


def test_copies_in_use_are_not_removed(local: Path, store: Any, cache: Path) -> None:
    size = shard_bytes(local)
    (path,) = RemoteCache(cache, 2 * size).find("memory://data/s0.h5")
    others = RemoteCache(cache, 2 * size).find("memory://data/s[1-3].h5")
    hold = remote_files.fetch(path)
    for other in others:
        kept = remote_files.fetch(other)
        assert kept is not None
        kept.release()
        assert path.exists()
    first, second = remote_files.fetch(others[2]), remote_files.fetch(others[0], wait=False)
    assert (first is not None, second) == (True, None)
    with helpers.raises_one_line(ConfigError, "remote_cache_size", "of other files in use"):
        remote_files.fetch(others[0])
    assert hold is not None
    hold.release()
    assert remote_files.fetch(others[0]) is not None
    assert not path.exists()


def test_copies_that_another_process_uses_are_not_removed(local: Path, store: Any, cache: Path) -> None:
    paths = RemoteCache(cache, 2 * shard_bytes(local)).find("memory://data/s[0-2].h5")
    for path in paths[:2]:
        hold = remote_files.fetch(path)
        assert hold is not None
        hold.release()
    with open(paths[0], "rb") as in_use:  # the lock belongs to this open file, as in another process
        fcntl.flock(in_use, fcntl.LOCK_SH)
        assert remote_files.fetch(paths[2]) is not None
        assert [path.exists() for path in paths] == [True, False, True]


def test_copy_with_another_layout_is_an_error(store: Any, cache: Path) -> None:
    loader = load(cache)
    shard = loader._sharded.datasets[0].shards[0]
    assert shard.native_layout is not None
    shard.native_layout["offsets"][0] += 1
    with helpers.raises_one_line(DataError, "s0.h5: x: the copy differs from the remote file"):
        next(iter(loader))


def test_native_reader_checks_the_size_of_a_copy(local: Path) -> None:
    loader = HDF5Loader(str(local / "s0.h5"), "x")
    (dataset,) = loader._sharded.datasets
    size = dataset.shards[0].identity.size
    for expected in (size, size + 1):
        identity = FileIdentity(0, 0, expected, 0)
        shard = replace(dataset.shards[0], identity=identity, storage_identity=identity)
        loader._sharded = replace(loader._sharded, datasets=(replace(dataset, shards=(shard,)),))
        if expected == size:
            assert sum(len(batch["x"]) for batch in loader) == ROWS
    with helpers.raises_one_line(DataError, f"holds {size} bytes, expected {size + 1}"):
        list(loader)


def test_variables_set_the_defaults_of_the_cache(
    store: Any, cache: Path, monkeypatch: pytest.MonkeyPatch, local: Path
) -> None:
    monkeypatch.setenv(remote_files.DIRECTORY_VARIABLE, str(cache / "sub"))
    assert_rows(HDF5Loader("memory://data/s*.h5", ["x", "y"], shuffle=False))
    assert len(copies(cache / "sub")) == SHARDS
    monkeypatch.setenv(remote_files.SIZE_VARIABLE, "1kB")
    with helpers.raises_one_line(ConfigError, "remote_cache_size: 1000 bytes"):
        HDF5Loader("memory://data/s*.h5", "x")
    monkeypatch.setenv(remote_files.SIZE_VARIABLE, "big")
    with helpers.raises_one_line(ConfigError, "SPINLOCK_FAST_REMOTE_CACHE_SIZE", "big"):
        HDF5Loader("memory://data/s*.h5", "x")


def test_file_systems_without_locks(store: Any, cache: Path, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy is removed only if it was not used for an hour."""

    def no_lock(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(file_cache.fcntl, "flock", no_lock)
    paths = RemoteCache(cache, 2 * shard_bytes(local)).find("memory://data/s[0-2].h5")
    for path in paths[:2]:
        hold = remote_files.fetch(path)
        assert hold is not None
        hold.release()
    assert remote_files.fetch(paths[2], wait=False) is None
    in_use = remote_files.fetch(paths[0])
    os.utime(paths[0], ns=(0, 0))
    assert remote_files.fetch(paths[2], wait=False) is None
    assert in_use is not None
    in_use.release()
    assert remote_files.fetch(paths[2], wait=False) is not None
    assert [path.exists() for path in paths] == [False, True, True]


def test_trajectories_of_remote_files(store: Any, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(remote_files.DIRECTORY_VARIABLE, str(cache))
    fields = np.random.default_rng(0).normal(size=(3, 5, 1, 8, 8)).astype(np.float32)
    np.save(tmp_path / "a.npy", fields)
    helpers.write_arrays(tmp_path / "a.h5", {"u": fields}, chunk_rows=1)
    for name in ("a.npy", "a.h5"):
        store.pipe_file(f"/data/{name}", (tmp_path / name).read_bytes())
        remote, local = (
            open_trajectories(path, "array", Options(axes="n t c y x"))
            for path in (f"memory://data/{name}", str(tmp_path / name))
        )
        assert name in copies(cache)
        for copy in cache.iterdir():
            copy.unlink()  # as if another process needed the room
        pairs = zip(remote.files[0].read(0), local.files[0].read(0), strict=True)
        assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
