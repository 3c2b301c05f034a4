"""Files of remote stores: copies in a cache of limited size, through fsspec's memory and HTTP file systems."""

from __future__ import annotations

import builtins
import fcntl
import functools
import http.server
import itertools
import logging
import os
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from processes import forkserver
from torch.utils.data import DataLoader

from spinlock_fast.data import HDF5Loader, file_cache, remote_files, shard_index
from spinlock_fast.data.feature_source import FeatureSource
from spinlock_fast.data.input_files import FileIdentity
from spinlock_fast.data.remote_files import RemoteCache, shown_url
from spinlock_fast.data.shard_fetcher import ShardFetcher
from spinlock_fast.errors import ConfigError, DataError, OutputError

fsspec = pytest.importorskip("fsspec", reason="the extra `remote` is not installed")

SHARDS, ROWS = 8, 96
VALUES = np.random.default_rng(0).normal(size=(SHARDS * ROWS, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards")
    for i, part in enumerate(np.split(VALUES, SHARDS)):
        helpers.write_arrays(directory / f"s{i}.h5", {"x": part, "y": part[:, :3].copy()})
    return directory


@pytest.fixture
def store(local: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """fsspec's file system in memory, with the shards in memory://data; counts downloads."""
    memory = fsspec.filesystem("memory")
    for file in local.iterdir():
        memory.pipe_file(f"/data/{file.name}", file.read_bytes())
    memory.downloads = []
    original = type(memory).get_file

    def get_file(self: Any, path: str, target: str, **options: Any) -> None:
        memory.downloads.append(path.rpartition("/")[2])
        original(self, path, target, **options)

    monkeypatch.setattr(type(memory), "get_file", get_file)
    shard_index._cache.clear()
    yield memory
    memory.store.clear()
    remote_files._remote_files.clear()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(file_cache, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(file_cache, "_ROOM_SECONDS", 0.5)
    return tmp_path / "cache"


def load(cache: Path, paths: Any = "memory://data/s*.h5", **settings: Any) -> HDF5Loader:
    defaults = {"batch_size": 40, "window_rows": 64, "shuffle": False, "num_threads": 1}
    return HDF5Loader(paths, ["x", "y"], **{**defaults, "remote_cache_dir": cache, **settings})


def assert_rows(batches: Any, rows: int = SHARDS * ROWS) -> list[int]:
    found = []
    for batch in batches:
        assert torch.equal(batch["x"], torch.from_numpy(VALUES)[batch["index"]])
        assert torch.equal(batch["y"], batch["x"][:, :3])
        found += batch["index"].tolist()
    assert sorted(found) == list(range(rows))
    return found


def copies(cache: Path) -> list[str]:
    names = os.listdir(cache) if cache.exists() else []
    return sorted(name.partition("-")[2] for name in names if not name.startswith("."))


def shard_bytes(local: Path) -> int:
    return max(file.stat().st_size for file in local.iterdir())


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
                assert np.array_equal((shard.native_layout or {})[name], value), name


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


class Server(http.server.SimpleHTTPRequestHandler):
    """Counts complete downloads; supports ranges unless `ranges` is False."""

    downloads: list[str] = []  # noqa: RUF012
    ranges = True

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        given = self.headers.get("Range")
        if given is None or not self.ranges:
            if self.path.endswith(".h5"):
                self.downloads.append(self.path)
                time.sleep(0.02)
            super().do_GET()
            return
        data = Path(self.translate_path(self.path)).read_bytes()
        first, last = (int(text) for text in given.removeprefix("bytes=").split("-"))
        part = data[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture
def server(local: Path) -> Iterator[str]:
    pytest.importorskip("aiohttp", reason="fsspec's HTTP file system needs aiohttp")
    Server.downloads.clear()
    Server.ranges = True
    handler = functools.partial(Server, directory=str(local))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        shard_index._cache.clear()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()
    remote_files._remote_files.clear()


@pytest.mark.parametrize("ranges", [True, False])
def test_files_of_an_http_server(server: str, cache: Path, ranges: bool) -> None:
    Server.ranges = ranges
    loader = load(cache, f"{server}/s*.h5", shuffle=True, shard_group=2)
    assert copies(cache) == []
    with warnings.catch_warnings(action="ignore"):  # about the number of processors
        in_workers = DataLoader(loader, batch_size=None, num_workers=2)
    assert_rows(in_workers)
    assert_rows(loader)
    Server.downloads.clear()
    assert_rows(load(cache, [f"{server}/s{i}.h5" for i in range(SHARDS)]))
    assert Server.downloads == []


def test_http_errors_name_the_address(server: str, cache: Path) -> None:
    with helpers.raises_one_line(DataError, f"{server}/none.h5: no such file"):
        load(cache, f"{server}/none.h5?signature=secret")
    with helpers.raises_one_line(DataError, "http://127.0.0.1:9/a.h5", "cannot be read"):
        load(cache, "http://127.0.0.1:9/a.h5")


def read_epochs(url: str, cache: str, limit: int, seed: int, output: str) -> None:
    settings = {"shuffle": True, "shard_group": 1, "window_rows": 64, "batch_size": 40, "seed": seed}
    loader = HDF5Loader(f"{url}/s*.h5", "x", remote_cache_dir=cache, remote_cache_size=limit, **settings)
    rows = sum(len(batch["index"]) for _ in range(3) for batch in loader)
    Path(output).write_text(str(rows))


@pytest.mark.dist
@pytest.mark.parametrize("small", [False, True])
def test_processes_share_the_cache(server: str, cache: Path, local: Path, tmp_path: Path, small: bool) -> None:
    limit = (6 if small else SHARDS) * shard_bytes(local)
    outputs = [tmp_path / f"rows{seed}" for seed in range(2)]
    processes = [
        forkserver().Process(target=read_epochs, args=(server, str(cache), limit, seed, str(output)))
        for seed, output in enumerate(outputs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [output.read_text() for output in outputs] == [str(3 * SHARDS * ROWS)] * 2
    if small:
        assert len(Server.downloads) > SHARDS
    else:
        assert sorted(Server.downloads) == [f"/s{i}.h5" for i in range(SHARDS)]
