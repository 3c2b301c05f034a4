"""Fixtures of the tests of remote files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
from remote_shards import SHARDS, VALUES

from spinlock_fast.data import file_cache, remote_files, shard_index


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards")
    for i, part in enumerate(np.split(VALUES, SHARDS)):
        helpers.write_arrays(directory / f"s{i}.h5", {"x": part, "y": part[:, :3].copy()})
    return directory


@pytest.fixture
def store(local: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """fsspec's file system in memory, with the shards in memory://data; counts downloads."""
    fsspec = pytest.importorskip("fsspec", reason="the extra `remote` is not installed")
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
