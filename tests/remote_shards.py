"""Small shards with known rows, and a loader of them, for tests of remote files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spinlock_fast.data import HDF5Loader

SHARDS, ROWS = 8, 96
VALUES = np.random.default_rng(0).normal(size=(SHARDS * ROWS, 16)).astype(np.float32)


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
