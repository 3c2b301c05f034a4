"""`HDF5Loader.refresh` follows a file that another process writes in SWMR mode."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import h5py
import helpers
import numpy as np
import pytest
from processes import forkserver
from torch.utils.data import DataLoader

from spinlock_fast.data import HDF5Loader
from spinlock_fast.errors import DataError

DATASETS = ["x", "group/y"]


def write(path: str, connection: Connection, compression: str | None) -> None:
    """Appends as many rows as it receives, all with their row number; 0 closes the file."""
    with h5py.File(path, "w", libver="latest") as file:
        x = file.create_dataset("x", (0, 3), "i8", maxshape=(None, 3), chunks=(4, 3), compression=compression)
        y = file.create_dataset("group/y", (0,), "f4", maxshape=(None,), chunks=(5,))
        file.swmr_mode = True
        while (count := connection.recv()) > 0:
            rows = np.arange(len(x), len(x) + count)
            for dataset, values in ((x, np.stack([rows] * 3, 1)), (y, rows)):
                dataset.resize(len(dataset) + count, axis=0)
                dataset[-count:] = values
                dataset.flush()
            connection.send(len(x))
    connection.send("closed")


class Writer:
    """A process that writes a file in SWMR mode."""

    def __init__(self, path: Path, compression: str | None) -> None:
        self._connection, end = forkserver().Pipe()
        self.process = forkserver().Process(target=write, args=(str(path), end, compression), daemon=True)
        self.process.start()

    def append(self, rows: int) -> Any:
        self._connection.send(rows)
        assert self._connection.poll(60.0)
        return self._connection.recv()


@pytest.fixture(params=[None, "gzip"])
def writer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Writer]:
    writer = Writer(tmp_path / "a.h5", request.param)
    yield writer
    writer.process.kill()
    writer.process.join()


def rows_of(loader: Any) -> list[int]:
    rows: list[int] = []
    for batch in loader:
        index = batch["index"]
        assert (batch["x"] == index[:, None]).all()
        assert (batch["group/y"] == index).all()
        rows += index.tolist()
    return sorted(rows)


def test_appended_rows_are_read_after_refresh(tmp_path: Path, writer: Writer) -> None:
    writer.append(10)
    loader = HDF5Loader(str(tmp_path / "a.h5"), DATASETS, batch_size=4, window_rows=8)
    assert loader.stats()["paths"]["x"] == "h5py, because of a writer that has the file open"
    assert rows_of(loader) == list(range(10))
    total = 10
    for count in (1, 4, 30):
        total = writer.append(count)
        assert rows_of(loader) == list(range(total - count))
        assert loader.refresh() == total
        assert rows_of(loader) == list(range(total))
    writer.append(6)
    workers = DataLoader(loader, batch_size=None, num_workers=1, multiprocessing_context="fork")
    loader.refresh()
    assert rows_of(workers) == list(range(total + 6))
    assert writer.append(0) == "closed"
    loader.refresh()
    assert loader.stats()["paths"]["x"] == "native"
    assert rows_of(loader) == list(range(total + 6))


def test_an_iteration_that_has_begun_keeps_its_rows(tmp_path: Path, writer: Writer) -> None:
    writer.append(40)
    loader = HDF5Loader(str(tmp_path / "a.h5"), DATASETS, batch_size=4, window_rows=8)
    batches = iter(loader)
    first = next(batches)
    writer.append(20)
    assert loader.refresh() == 60
    assert rows_of([first, *batches]) == list(range(40))
    assert rows_of(loader) == list(range(60))


def test_a_glob_finds_new_files(tmp_path: Path) -> None:
    for i in range(2):
        helpers.write_arrays(tmp_path / f"{i}.h5", {"x": np.arange(6.0).reshape(3, 2)})
        if i == 0:
            loader = HDF5Loader(str(tmp_path / "*.h5"), "x", batch_size=2)
    assert loader.rows == 3
    assert loader.refresh() == 6
    assert sum(len(batch["x"]) for batch in loader) == 6


def test_a_failed_refresh_changes_nothing(tmp_path: Path) -> None:
    helpers.write_arrays(tmp_path / "0.h5", {"x": np.arange(6.0).reshape(3, 2)})
    loader = HDF5Loader(str(tmp_path / "*.h5"), "x", batch_size=2)
    helpers.write_arrays(tmp_path / "1.h5", {"x": np.arange(9.0).reshape(3, 3)})
    with helpers.raises_one_line(DataError, "1.h5", "rows of shape (3,)"):
        loader.refresh()
    assert sum(len(batch["x"]) for batch in loader) == 3
