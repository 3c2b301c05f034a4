"""Cache of uncompressed copies: same batches; copies are written once and atomically."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import helpers
import numpy as np
import pytest
import torch

from spinlock_fast.data import HDF5Loader
from spinlock_fast.errors import DataError, OutputError

PATHS = [helpers.SUMMARY, helpers.TEMPORAL]


def load(file: Any, cache: Path | None, **settings: Any) -> HDF5Loader:
    defaults = {"batch_size": 16, "window_rows": 48, "num_threads": 2, "cache_dir": cache}
    return HDF5Loader(str(file), PATHS, **{**defaults, **settings})


def same(a: HDF5Loader, b: HDF5Loader) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        assert all(torch.equal(x[key].nan_to_num(7), y[key].nan_to_num(7)) for key in x)


@pytest.mark.parametrize("compression", ["gzip", "lzf"])
@pytest.mark.parametrize("shuffle", [True, False, "exact"])
def test_cached_batches_equal_the_originals(tmp_path: Path, shuffle: Any, compression: str) -> None:
    for i, rows in enumerate((45, 0, 30)):
        helpers.write_dataset(tmp_path / f"shard_{i}.h5", rows, seed=i, compression=compression)
    files, cache = tmp_path / "shard_*.h5", tmp_path / "cache"
    cached = load(files, cache, shuffle=shuffle)
    for epoch in range(2):
        reference = load(files, None, shuffle=shuffle)
        reference.set_epoch(epoch)
        same(cached, reference)
    assert len(list(cache.iterdir())) == 4
    stats = cached.stats()
    assert stats["stored_bytes"] == stats["decoded_bytes"] > 0


def test_copies_are_written_once(tmp_path: Path) -> None:
    file = helpers.write_dataset(tmp_path / "a.h5", 40, seed=0)
    list(load(file, tmp_path / "cache"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    list(load(file, tmp_path / "cache"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == before


def test_changed_file_gets_new_copies(tmp_path: Path) -> None:
    file = helpers.write_dataset(tmp_path / "a.h5", 40, seed=0)
    list(load(file, tmp_path / "cache"))
    os.unlink(file)
    helpers.write_dataset(file, 40, seed=1)
    same(load(file, tmp_path / "cache"), load(file, None))


@pytest.mark.parametrize("damage", ["short", "other", "empty"])
def test_incomplete_copy_is_rewritten(tmp_path: Path, damage: str) -> None:
    file = helpers.write_dataset(tmp_path / "a.h5", 40, seed=0)
    list(load(file, tmp_path / "cache"))
    for path in (tmp_path / "cache").iterdir():
        if damage == "short":
            os.truncate(path, path.stat().st_size // 2)
        elif damage == "empty":
            path.write_bytes(b"")
        else:
            with h5py.File(path, "w") as copy:
                copy["rows"] = np.zeros((3, 3))
    same(load(file, tmp_path / "cache"), load(file, None))


def test_contiguous_data_are_not_copied(tmp_path: Path) -> None:
    file = helpers.write_dataset(tmp_path / "a.h5", 40, seed=0, chunk_rows=None, compression=None)
    same(load(file, tmp_path / "cache"), load(file, None))
    assert not (tmp_path / "cache").exists()


def test_damaged_data_leave_no_copy(tmp_path: Path) -> None:
    file = helpers.write_dataset(tmp_path / "a.h5", 40, seed=0)
    with h5py.File(file) as handle:
        info = handle[helpers.SUMMARY].id.get_chunk_info(2)
    with open(file, "r+b") as raw:
        raw.seek(info.byte_offset + 9)
        raw.write(b"\xff" * 20)
    with helpers.raises_one_line(DataError, "a.h5", helpers.SUMMARY, "rows 16..23", "damaged"):
        list(load(file, tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_directory_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    file = helpers.write_dataset(tmp_path / "a.h5", 40, seed=0)
    (tmp_path / "cache").write_text("a file")
    with helpers.raises_one_line(OutputError, str(tmp_path / "cache")):
        list(load(file, tmp_path / "cache"))
