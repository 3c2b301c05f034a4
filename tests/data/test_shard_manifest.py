"""Manifest of shards: files are opened once, by one process, and again only if they change."""

from __future__ import annotations

import itertools
import logging
import os
from pathlib import Path
from typing import Any

import h5py
import helpers
import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import run_ranks

from spinlock_fast.data import HDF5Loader, input_files, shard_index
from spinlock_fast.data.feature_source import FeatureSource
from spinlock_fast.distributed import current_ranks
from spinlock_fast.errors import DataError

SHARDS = 6


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for i in range(SHARDS):
        arrays = {"x": random.normal(size=(20, 3)).astype(np.float32), "y": random.integers(0, 9, (20, 2, 2))}
        helpers.write_arrays(tmp_path / f"s{i}.h5", arrays, fletcher32=i == 1, shuffle=True)
    with h5py.File(tmp_path / "s3.h5", "r+") as file:
        file["x"].attrs["scale_factor"] = 2.0
        file["x"].attrs["missing_value"] = np.inf
        del file["y"]
        file.create_dataset("y", data=np.arange(80).reshape(20, 2, 2), dtype=np.int64)  # contiguous
    return tmp_path


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are opened to be indexed."""
    names: list[str] = []
    original = input_files.open_file

    def open_file(file: Path) -> h5py.File:
        names.append(file.name)
        return original(file)

    monkeypatch.setattr(shard_index, "open_file", open_file)
    return names


def load(directory: Path, **settings: Any) -> list[dict[str, torch.Tensor]]:
    shard_index._cache.clear()
    loader = HDF5Loader(f"{directory}/s*.h5", ["x", "y"], batch_size=50, manifest_dir=directory / "cache", **settings)
    return list(loader)


def assert_same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> None:
    for batch, other in zip(a, b, strict=True):
        assert all(torch.equal(batch[name].nan_to_num(), other[name].nan_to_num()) for name in batch)


def manifest(directory: Path) -> Path:
    (file,) = (directory / "cache").iterdir()
    return file


def test_unchanged_shards_are_not_opened_again(directory: Path, opened: list[str]) -> None:
    first = load(directory)
    assert opened == [f"s{i}.h5" for i in range(SHARDS)]
    opened.clear()
    assert_same(load(directory), first)
    assert opened == []


def test_changed_and_new_shards_are_opened(directory: Path, opened: list[str]) -> None:
    load(directory)
    helpers.write_arrays(directory / "s2.h5", {"x": np.ones((20, 3), np.float32), "y": np.ones((20, 2, 2), np.int64)})
    os.utime(directory / "s4.h5", ns=(0, 1))
    (directory / "s6.h5").write_bytes((directory / "s0.h5").read_bytes())
    opened.clear()
    rows = load(directory, shuffle=False)
    assert opened == ["s2.h5", "s4.h5", "s6.h5"]
    assert (torch.cat([batch["x"] for batch in rows])[40:60] == 1).all()
    opened.clear()
    load(directory)
    assert opened == []


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "flipped", "pickled", "incomplete", "tables"])
def test_damaged_manifest_is_made_again(
    directory: Path, opened: list[str], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    first = load(directory)
    file = manifest(directory)
    data = file.read_bytes()
    with np.load(file) as archive:
        arrays = dict(archive)
    if damage == "pickled":
        np.savez(file, **{**arrays, "json": np.array([{"a": 1}], object)})
    elif damage == "incomplete":
        text = arrays["json"].tobytes().replace(b'"chunk_rows"', b'"chunk_rowz"')
        np.savez(file, **{**arrays, "json": np.frombuffer(text, np.uint8)})
    elif damage == "tables":
        np.savez(file, **{**arrays, "offsets": arrays["offsets"][:-1]})
    else:
        middle = data.index(b'"shards"')
        flipped = data[:middle] + b"X" + data[middle + 1 :]
        file.write_bytes({"empty": b"", "text": b"hello", "truncated": data[:-40], "flipped": flipped}[damage])
    opened.clear()
    with caplog.at_level(logging.WARNING):
        assert_same(load(directory), first)
    assert len(opened) == SHARDS
    assert "damaged manifest" in caplog.text
    assert file.read_bytes() != b""
    opened.clear()
    assert_same(load(directory), first)
    assert opened == []


def test_manifest_of_another_version_is_made_again(directory: Path, opened: list[str]) -> None:
    load(directory)
    file = manifest(directory)
    with np.load(file) as archive:
        arrays = dict(archive)
    text = arrays["json"].tobytes().replace(b'"format": 1', b'"format": 0')
    np.savez(file, **{**arrays, "json": np.frombuffer(text, np.uint8)})
    opened.clear()
    load(directory)
    assert len(opened) == SHARDS


def test_shards_with_links_are_always_opened(directory: Path, opened: list[str]) -> None:
    with h5py.File(directory / "s5.h5", "r+") as file:
        del file["x"]
        file["x"] = h5py.ExternalLink("other.h5", "x")
    helpers.write_arrays(directory / "other.h5", {"x": np.ones((20, 3), np.float32)})
    load(directory)
    opened.clear()
    load(directory)
    assert opened == ["s5.h5"]


def test_damaged_shard_is_an_error_and_nothing_is_stored(directory: Path) -> None:
    (directory / "s5.h5").write_bytes(b"no")
    with helpers.raises_one_line(DataError, "s5.h5", "not an HDF5 file"):
        load(directory)
    assert not (directory / "cache").exists()


def test_families_use_the_manifest(directory: Path, opened: list[str]) -> None:
    for expected in (SHARDS, 0):
        shard_index._cache.clear()
        opened.clear()
        with FeatureSource(f"{directory}/s*.h5", {"x": "x"}, manifest_dir=str(directory / "cache")) as source:
            blocks = list(source.batches(["x"], 7, 10**6, torch.device("cpu")))
            assert [start for start, _ in blocks] == list(range(0, 20 * SHARDS, 7))
        assert len(opened) == expected


def rank_worker(rank: int, directory: str, world: int) -> None:
    path = Path(directory)
    dist.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=world)
    names: list[Path] = []
    original = input_files.open_file
    shard_index.open_file = lambda file: names.append(file) or original(file)  # type: ignore[func-returns-value]
    loader = HDF5Loader(f"{path}/s*.h5", ["x", "y"], batch_size=16, rank=rank, world_size=world)
    rows = [row for batch in loader for row in batch["index"].tolist()]
    with FeatureSource(f"{path}/s*.h5", {"x": "x"}, ranks=current_ranks()) as source:
        value = float(source.read("x", 33, 34)[0, 0])
    for paths in (f"{path}/none*.h5", [f"{path}/s0.h5", f"{path}/bad.h5"]):
        with pytest.raises(DataError, match=r"no file matches|not an HDF5 file"):
            HDF5Loader(paths, "x", rank=rank, world_size=world)
    alone = HDF5Loader(f"{path}/s*.h5", "x").rows if rank == 1 else 0  # not a share: no collective operation
    (path / f"rank{rank}").write_text(f"{len(names)} {alone} {value} {rows}")
    dist.destroy_process_group()


@pytest.mark.dist
def test_rank_0_opens_the_shards_for_all(directory: Path) -> None:
    (directory / "bad.h5").write_bytes(b"no")
    run_ranks(rank_worker, (str(directory), 2), 2)
    texts = [(directory / f"rank{rank}").read_text().split(" ", 3) for rank in range(2)]
    with h5py.File(directory / "s1.h5") as file:
        value = float(file["x"][13, 0])
    assert [int(text[0]) for text in texts] == [SHARDS + 1, SHARDS]  # rank 0 also bad.h5; rank 1 for its own loader
    assert [float(text[2]) for text in texts] == [value, value]
    rows = [eval(text[3]) for text in texts]
    assert sorted(itertools.chain(*rows)) == list(range(20 * SHARDS))
