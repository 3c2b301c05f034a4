"""Virtual datasets: sources that hold whole rows are read natively, others through h5py, with the same values."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import helpers
import numpy as np
import pytest
from hdf5_layouts import NOT_NATIVE, check, random_values
from hypothesis import given, settings
from hypothesis import strategies as st

from spinlock_fast.data import HDF5Loader
from spinlock_fast.errors import DataError

ROW = (3, 4)


def write_source(
    file: Path, rows: int, seed: int, dtype: str = "<f4", row: tuple[int, ...] = ROW, **storage: Any
) -> None:
    with h5py.File(file, "w") as handle:
        handle.create_dataset("group/x", data=random_values((rows, *row), dtype, seed), **storage)


def write_virtual(file: Path, rows: int, fill: Callable[[h5py.VirtualLayout], None], dtype: str = "<f4") -> str:
    layout = h5py.VirtualLayout((rows, *ROW), dtype)
    fill(layout)
    with h5py.File(file, "w", libver="latest") as handle:
        handle.create_virtual_dataset("x", layout, fillvalue=-7)
    return str(file)


def source(name: str, rows: int, row: tuple[int, ...] = ROW, dtype: str = "<f4") -> h5py.VirtualSource:
    return h5py.VirtualSource(name, "group/x", (rows, *row), dtype=dtype)


STORAGES: list[dict[str, Any]] = [
    {},
    {"chunks": (4, *ROW), "compression": "gzip", "shuffle": True},
    {"chunks": (5, 2, 3), "compression": "gzip", "fletcher32": True},
    {"chunks": (1, *ROW)},
]


@pytest.mark.parametrize("shuffle", [True, False, "exact"])
@pytest.mark.parametrize("storage", STORAGES)
def test_concatenated_sources_are_read_natively(tmp_path: Path, storage: dict[str, Any], shuffle: Any) -> None:
    for i in range(3):
        write_source(tmp_path / f"part_{i}.h5", 11, i, **storage)

    def fill(layout: h5py.VirtualLayout) -> None:
        for i in range(3):
            layout[11 * i : 11 * i + 11] = source(f"part_{i}.h5", 11)

    stats = check([write_virtual(tmp_path / "v.h5", 33, fill)], ["x"], "native", shuffle=shuffle)
    if shuffle is True and storage.get("chunks", (0,))[0] == 4:
        assert stats["chunks"] <= 2 * 9


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", ["<f4", ">f4", ">i8", "<u2"])
def test_ranges_of_rows_in_any_order(tmp_path: Path, storage: dict[str, Any], dtype: str) -> None:
    for i in range(2):
        write_source(tmp_path / f"part_{i}.h5", 23, i, dtype, **storage)

    def fill(layout: h5py.VirtualLayout) -> None:
        a, b = (source(f"part_{i}.h5", 23, dtype=dtype) for i in range(2))
        layout[0:9] = b[14:23]
        layout[9:10] = a[3:4]
        layout[10:27] = a[6:23]
        layout[27:29] = b[0:2]

    check([write_virtual(tmp_path / "v.h5", 29, fill, dtype)], ["x"], "native")


@pytest.mark.parametrize(
    "storage", [{}, {"chunks": ROW, "compression": "gzip"}, {"chunks": (2, 3), "compression": "gzip"}]
)
def test_stacked_sources_are_rows(tmp_path: Path, storage: dict[str, Any]) -> None:
    """The example in the documentation of h5py: each source is one row."""
    for i in range(7):
        with h5py.File(tmp_path / f"row_{i}.h5", "w") as handle:
            handle.create_dataset("group/x", data=random_values(ROW, "<f4", i), **storage)

    def fill(layout: h5py.VirtualLayout) -> None:
        for i in range(7):
            layout[i] = h5py.VirtualSource(f"row_{i}.h5", "group/x", ROW)

    check([write_virtual(tmp_path / "v.h5", 7, fill)], ["x"], "native")


def test_one_row_of_a_larger_source(tmp_path: Path) -> None:
    write_source(tmp_path / "part.h5", 9, 0, chunks=(4, *ROW), compression="gzip")

    def fill(layout: h5py.VirtualLayout) -> None:
        for i in range(9):
            layout[i] = source("part.h5", 9)[8 - i]

    check([write_virtual(tmp_path / "v.h5", 9, fill)], ["x"], "native")


def test_sources_in_other_directories_links_and_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write_source(tmp_path / "sub" / "part.h5", 5, 0)
    write_source(tmp_path / "far.h5", 5, 1, chunks=(2, *ROW))
    with h5py.File(tmp_path / "linking.h5", "w") as handle:
        handle["group/x"] = h5py.ExternalLink("far.h5", "group/x")
    layout = h5py.VirtualLayout((20, *ROW), "<f4")
    layout[0:5] = source("sub/part.h5", 5)
    layout[5:10] = source("linking.h5", 5)
    layout[10:15] = source(str(tmp_path / "sub" / "part.h5"), 5)
    layout[15:20] = source(".", 5)
    with h5py.File(tmp_path / "v.h5", "w", libver="latest") as handle:
        handle["group/x"] = random_values((5, *ROW), "<f4", 2)
        handle.create_virtual_dataset("x", layout)
    check([str(tmp_path / "v.h5")], ["x"], "native")


def test_rows_without_a_source_have_the_fill_value_and_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_source(tmp_path / "part.h5", 10, 0)

    def fill(layout: h5py.VirtualLayout) -> None:
        layout[4:10] = source("part.h5", 10)[0:6]
        layout[12:16] = source("part.h5", 10)[6:10]

    file = write_virtual(tmp_path / "v.h5", 20, fill)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            check([file], ["x"], "h5py for some rows, because of 10 rows without a virtual source")
    assert sum("10 rows without a virtual source, which have the fill value" in text for text in caplog.messages) == 1


@pytest.mark.parametrize(
    ("storage", "words"), [(NOT_NATIVE, "the filter bzip2 of a virtual source"), ({"dtype": "<f8"}, "another type")]
)
def test_other_sources_stay_native(tmp_path: Path, storage: dict[str, Any], words: str) -> None:
    write_source(tmp_path / "a.h5", 10, 0, chunks=(4, *ROW), compression="gzip")
    with h5py.File(tmp_path / "b.h5", "w") as handle:
        handle.create_dataset(
            "group/x", data=np.arange(120).reshape(10, *ROW).astype("<f4"), chunks=(4, *ROW), **storage
        )

    def fill(layout: h5py.VirtualLayout) -> None:
        layout[0:10] = source("a.h5", 10)
        layout[10:20] = source("b.h5", 10)

    stats = check([write_virtual(tmp_path / "v.h5", 20, fill)], ["x"], f"h5py for some rows, because of {words}")
    assert stats["chunks"] >= 3


def strided(layout: h5py.VirtualLayout) -> None:
    layout[0:20:2] = source("part.h5", 10)


def strided_source(layout: h5py.VirtualLayout) -> None:
    layout[0:5] = source("part.h5", 10)[0:10:2]


def columns(layout: h5py.VirtualLayout) -> None:
    layout[0:10, :, 0:2] = source("part.h5", 10)[:, :, 2:4]


def reshaped(layout: h5py.VirtualLayout) -> None:
    layout[0:4] = h5py.VirtualSource("flat.h5", "group/x", (4, 12), dtype="<f4")


@pytest.mark.parametrize("fill", [strided, strided_source, columns, reshaped])
def test_other_mappings_are_read_through_h5py(tmp_path: Path, fill: Callable[[h5py.VirtualLayout], None]) -> None:
    write_source(tmp_path / "part.h5", 10, 0, chunks=(4, *ROW), compression="gzip")
    write_source(tmp_path / "flat.h5", 4, 0, row=(12,))
    check([write_virtual(tmp_path / "v.h5", 20, fill)], ["x"], "h5py, because of")


def test_overlapping_sources_are_read_as_h5py_reads_single_rows(tmp_path: Path) -> None:
    """libhdf5 does not set rows 15..19 if they are read together with rows that have two sources."""
    write_source(tmp_path / "part.h5", 10, 0)

    def fill(layout: h5py.VirtualLayout) -> None:
        layout[0:10] = source("part.h5", 10)
        layout[5:15] = source("part.h5", 10)

    file = write_virtual(tmp_path / "v.h5", 20, fill)
    with h5py.File(file) as handle:
        expected = np.concatenate([handle["x"][i : i + 1] for i in range(20)])
    loader = HDF5Loader(file, "x", batch_size=20, shuffle=False)
    assert loader.stats()["paths"]["x"] == "h5py, because of its virtual sources, which overlap"
    (batch,) = loader
    assert batch["x"].numpy().tobytes() == expected.tobytes()


def test_unlimited_sources_are_read_through_h5py(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "part.h5", "w") as handle:
        handle.create_dataset("x", data=random_values((6, *ROW), "<f4"), maxshape=(None, *ROW), chunks=(2, *ROW))
    layout = h5py.VirtualLayout((6, *ROW), "<f4", maxshape=(None, *ROW))
    part = h5py.VirtualSource("part.h5", "x", (6, *ROW), maxshape=(None, *ROW))
    layout[: h5py.h5s.UNLIMITED] = part[: h5py.h5s.UNLIMITED]
    with h5py.File(tmp_path / "v.h5", "w", libver="latest") as handle:
        handle.create_virtual_dataset("x", layout)
    check([str(tmp_path / "v.h5")], ["x"], "h5py, because of an unlimited virtual source")


def test_damage_of_a_source_is_named(tmp_path: Path) -> None:
    write_source(tmp_path / "part.h5", 12, 0, chunks=(4, *ROW), compression="gzip")
    file = write_virtual(
        tmp_path / "v.h5", 7, lambda layout: layout.__setitem__(slice(0, 7), source("part.h5", 12)[5:12])
    )
    with h5py.File(tmp_path / "part.h5") as handle:
        offset = handle["group/x"].id.get_chunk_info(2).byte_offset
    data = bytearray((tmp_path / "part.h5").read_bytes())
    data[offset + 10 : offset + 20] = bytes(10)
    (tmp_path / "part.h5").write_bytes(data)
    loader = HDF5Loader(file, "x", batch_size=7)
    with helpers.raises_one_line(DataError, "v.h5 (values in", "part.h5", "chunk [8, 0, 0] (rows 8..11)", "damaged"):
        list(loader)


@given(
    data=st.data(),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    chunk=st.integers(1, 5),
    batch=st.integers(1, 9),
)
@settings(max_examples=15, deadline=None)
def test_any_ranges(
    tmp_path_factory: pytest.TempPathFactory, data: Any, sizes: list[int], chunk: int, batch: int
) -> None:
    directory = tmp_path_factory.mktemp("virtual")
    for i, size in enumerate(sizes):
        storage = {} if i % 2 else {"chunks": (min(chunk, size), 2, 3), "compression": "gzip"}
        write_source(directory / f"{i}.h5", size, i, **storage)
    layout, end = h5py.VirtualLayout((40, *ROW), "<f4"), 0
    for _ in range(4):
        i = data.draw(st.integers(0, len(sizes) - 1))
        first = data.draw(st.integers(0, sizes[i] - 1))
        stop = data.draw(st.integers(first + 1, sizes[i]))
        end += data.draw(st.integers(0, 1))
        layout[end : end + stop - first] = source(f"{i}.h5", sizes[i])[first:stop]
        end += stop - first
    with h5py.File(directory / "v.h5", "w", libver="latest") as handle:
        handle.create_virtual_dataset("x", layout, fillvalue=3)
    check([str(directory / "v.h5")], ["x"], "h5py for some rows", batch_size=batch)
