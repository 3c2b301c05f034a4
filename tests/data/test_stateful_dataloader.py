"""HDF5Loader in torchdata's StatefulDataLoader, which stores the position of its workers."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest

from spinlock_fast.data import HDF5Loader

stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # on two processors
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata 0.11
]

ROWS = 205


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    for i, values in enumerate(np.array_split(np.arange(ROWS, dtype=np.float32)[:, None], 3)):
        helpers.write_arrays(directory / f"s{i}.h5", {"x": values}, chunk_rows=8)
    return directory


def load(directory: Path, workers: int, settings: dict[str, Any]) -> Any:
    defaults = {"batch_size": 16, "window_rows": 48, "num_threads": 1}
    loader = HDF5Loader(str(directory / "s*.h5"), "x", **{**defaults, **settings})
    return stateful.StatefulDataLoader(loader, batch_size=None, num_workers=workers)


def rows_of(batches: Any) -> list[tuple[int, ...]]:
    return [tuple(batch["index"].tolist()) for batch in batches]


@pytest.mark.parametrize(
    ("workers", "stop", "settings"),
    [(0, 5, {}), (0, 5, {"shuffle": False}), (2, 5, {"shard_group": 1}), (2, 0, {"shuffle": "exact"})],
)
def test_resumes_in_the_middle_of_an_epoch(directory: Path, workers: int, stop: int, settings: dict[str, Any]) -> None:
    whole = load(directory, workers, settings)
    expected = [rows_of(whole), rows_of(whole)]
    assert sorted(row for batch in expected[0] for row in batch) == list(range(ROWS))
    first = load(directory, workers, settings)
    batches = iter(first)
    taken = rows_of(next(batches) for _ in range(stop))
    state = pickle.loads(pickle.dumps(first.state_dict()))
    del batches
    second = load(directory, workers, settings)
    second.load_state_dict(state)
    assert taken + rows_of(second) == expected[0]
    assert Counter(rows_of(second)) == Counter(expected[1])


def test_resumes_at_the_end_of_an_epoch(directory: Path) -> None:
    whole = load(directory, 0, {})
    expected = [rows_of(whole), rows_of(whole)]
    first = load(directory, 0, {})
    assert rows_of(first) == expected[0]
    second = load(directory, 0, {})
    second.load_state_dict(first.state_dict())
    assert (rows_of(second) or rows_of(second)) == expected[1]
