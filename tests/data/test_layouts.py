"""Storage layouts: the loader returns the same bytes as h5py."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import h5py
import helpers
import numpy as np
import pytest
from hdf5_layouts import DTYPES, NOT_NATIVE, check, random_values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spinlock_fast.data import HDF5Loader, native_layout
from spinlock_fast.errors import DataError


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    """Strategy for one dataset: row shape, number type, storage, written rows."""
    row_shape = tuple(draw(st.lists(st.integers(1, 9), min_size=0, max_size=3)))
    dtype = draw(st.sampled_from(DTYPES))
    chunked = draw(st.booleans()) or draw(st.booleans())
    options: dict[str, Any] = {}
    if chunked:
        sizes = [draw(st.integers(1, 12)), *(draw(st.integers(1, size)) for size in row_shape)]
        if draw(st.booleans()):
            sizes[1:] = row_shape  # chunks of whole rows, as in most files
        options["chunks"] = tuple(sizes)
        options["maxshape"] = draw(st.sampled_from(["fixed", "rows", "all", "mixed"]))
        options["growing"] = [draw(st.sampled_from([0, 1, 2])) for _ in sizes]
        options["compression"] = draw(st.sampled_from([None, "gzip", "gzip", "lzf"]))
        options["shuffle"] = draw(st.booleans())
        options["fletcher32"] = draw(st.booleans())
        if np.dtype(dtype).kind != "f" and draw(st.integers(0, 5)) == 0:
            options["scaleoffset"] = 0
            options["fletcher32"] = False
    if draw(st.booleans()):
        options["fillvalue"] = random_values((1,), dtype, seed=draw(st.integers(0, 99)))[0]
    return {
        "row_shape": row_shape,
        "dtype": dtype,
        "options": options,
        "constant": draw(st.booleans()),
        "written": draw(st.sampled_from(["all", "some", "none"])),
    }


def write(file: h5py.File, path: str, rows: int, layout: dict[str, Any], seed: int) -> None:
    shape = (rows, *layout["row_shape"])
    options = dict(layout["options"])
    if growing := options.pop("growing", None):
        most = {0: lambda size: size, 1: lambda size: 2 * size + 1, 2: lambda size: None}
        kind = options["maxshape"]
        options["maxshape"] = {
            "fixed": tuple(max(pair) for pair in zip(shape, options["chunks"], strict=True)),
            "rows": (None, *shape[1:]),
            "all": (None,) * len(shape),
            "mixed": tuple(
                None if size is None else max(size, chunk)
                for size, chunk in zip(
                    (most[kind](size) for kind, size in zip(growing, shape, strict=True)),
                    options["chunks"],
                    strict=True,
                )
            ),
        }[kind]
    dataset = file.create_dataset(path, shape, layout["dtype"], **options)
    values = random_values(shape, layout["dtype"], seed, layout["constant"])
    if layout["written"] == "all":
        dataset[...] = values
    elif layout["written"] == "some" and rows:
        for row in np.random.default_rng(seed).choice(rows, max(1, rows // 9), replace=False):
            dataset[row] = values[row]


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(
    first=layouts(),
    second=layouts(),
    shard_rows=st.lists(st.integers(0, 40), min_size=1, max_size=3).filter(any),
    batch_size=st.integers(1, 50),
    window_rows=st.integers(1, 60),
    libver=st.sampled_from(["earliest", "v108", "v110", "latest"]),
    shuffle=st.sampled_from([True, False, "exact"]),
    num_threads=st.integers(1, 3),
)
def test_any_layout_matches_h5py(
    first: dict[str, Any], second: dict[str, Any], shard_rows: list[int], libver: str, **options: Any
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        files = []
        for shard, rows in enumerate(shard_rows):
            files.append(f"{directory}/shard_{shard}.h5")
            with h5py.File(files[-1], "w", libver=(libver, "latest")) as file:
                write(file, "a", rows, first, seed=shard)
                write(file, "b/c", rows, second, seed=10 + shard)
        check(files, ["a", "b/c"], **options)


SHAPE = (50, 6, 5)
CHUNKED = {"chunks": (8, 6, 5)}


@pytest.mark.parametrize("shuffle", [True, False, "exact"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        CHUNKED,
        {**CHUNKED, "compression": "gzip"},
        {**CHUNKED, "compression": "gzip", "shuffle": True},
        {**CHUNKED, "compression": "gzip", "shuffle": True, "fletcher32": True},
        {**CHUNKED, "fletcher32": True},
        {"chunks": (8, 4, 3), "compression": "gzip"},
        {"chunks": (60, 6, 5), "maxshape": (None, 6, 5), "compression": "gzip"},
        {"chunks": (1, 6, 5), "compression": "gzip"},
    ],
    ids=repr,
)
@pytest.mark.parametrize("dtype", ["<f4", ">f4"])
def test_common_layouts_are_read_natively(tmp_path: Path, options: Any, dtype: str, shuffle: Any) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=random_values(SHAPE, dtype, constant=True), **options)
    check([str(tmp_path / "a.h5")], ["x"], "native", shuffle=shuffle)


@pytest.mark.parametrize("options", [{"scaleoffset": 0}, NOT_NATIVE], ids=["scaleoffset", "bzip2"])
def test_other_filters_are_read_through_h5py(tmp_path: Path, options: Any) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=random_values(SHAPE, "<i4", constant=True), chunks=(8, 6, 5), **options)
        file.create_dataset("y", data=random_values(SHAPE, "<f4"), chunks=(4, 6, 5), compression="gzip")
    stats = check([str(tmp_path / "a.h5")], ["x", "y"])
    assert stats["paths"]["x"].startswith("h5py, because of the filter")
    assert stats["paths"]["y"] == "native"


def test_missing_filter_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=random_values(SHAPE, "<f4"), chunks=(8, 6, 5), **NOT_NATIVE)
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda code: False)
    with helpers.raises_one_line(DataError, "a.h5", "x", "bzip2", "pip install hdf5plugin"):
        HDF5Loader(str(tmp_path / "a.h5"), "x")


@pytest.mark.parametrize("mask", range(8))
def test_filter_mask_of_chunks_is_respected(tmp_path: Path, mask: int) -> None:
    """Chunks of one dataset with different filter masks, filtered accordingly by hand."""
    import zlib

    from spinlock_fast import _native

    values = random_values((32, 6), "<f4", constant=True)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset(
            "x", data=values, chunks=(8, 6), compression="gzip", shuffle=True, fletcher32=True
        )
        content = values[8:16].tobytes()
        if not mask & 1:
            content = np.frombuffer(content, np.uint8).reshape(-1, 4).T.tobytes()
        if not mask & 2:
            content = zlib.compress(content)
        if not mask & 4:
            content += _native.fletcher32(content).to_bytes(4, "little")
        dataset.id.write_direct_chunk((8, 0), content, filter_mask=mask)
    check([str(tmp_path / "a.h5")], ["x"], "native")


def test_user_block_is_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w", userblock_size=1024) as file:
        file.create_dataset("x", data=random_values(SHAPE, "<f4"), chunks=(8, 6, 5), compression="gzip")
        file.create_dataset("y", data=random_values(SHAPE, "<f4", seed=1))
    check([str(tmp_path / "a.h5")], ["x", "y"])


def test_external_files_are_read_through_h5py(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        size = h5py.h5f.UNLIMITED
        dataset = file.create_dataset("x", (20, 3), "<f4", external=[(str(tmp_path / "x.bin"), 0, size)])
        dataset[...] = random_values((20, 3), "<f4")
    check([str(tmp_path / "a.h5")], ["x"], "h5py, because of its external files")


def test_compact_dataset_is_read_through_h5py(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple((20, 3))
        h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F32LE, space, plist).write(
            h5py.h5s.ALL, h5py.h5s.ALL, random_values((20, 3), "<f4")
        )
    check([str(tmp_path / "a.h5")], ["x"], "h5py, because of its compact layout")


def test_unwritten_values_are_fill_values(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("contiguous", (20, 3), "<f4", fillvalue=7.0)
        file.create_dataset("chunked", (20, 3), "<f4", fillvalue=-3.0, chunks=(4, 2), compression="gzip")
    stats = check([str(tmp_path / "a.h5")], ["contiguous", "chunked"])
    assert stats["paths"]["chunked"] == "native"


def test_unusual_integer_sizes_are_read_through_h5py(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        kind = h5py.h5t.STD_I32LE.copy()
        kind.set_precision(24)
        dataset = h5py.h5d.create(file.id, b"x", kind, h5py.h5s.create_simple((20, 3)))
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, np.arange(-30, 30, dtype=np.int32).reshape(20, 3))
    check([str(tmp_path / "a.h5")], ["x"], "h5py, because of its number type")


def test_possibly_unfiltered_edge_chunks_are_read_through_h5py(tmp_path: Path) -> None:
    """With shuffle alone, the size does not show whether the partial last chunk was filtered."""
    for rows, way in [(16, "native"), (18, "h5py, because of edge chunks")]:
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file.create_dataset("x", data=random_values((rows, 3), "<f4"), chunks=(8, 3), shuffle=True)
        check([str(tmp_path / "a.h5")], ["x"], way)


def test_chunks_without_fill_values_are_read_through_h5py(tmp_path: Path) -> None:
    """Values of a missing chunk are undefined if fill values are never written: left to libhdf5."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("x", (40, 6), "<f4", chunks=(8, 6), compression="gzip", fill_time="never")
        dataset[:8] = 1.0
    loader = HDF5Loader(str(tmp_path / "a.h5"), "x")
    assert loader.stats()["paths"]["x"] == "h5py, because of chunks without values"


@pytest.mark.parametrize("old_format", [False, True])
def test_all_chunk_index_types_are_read(tmp_path: Path, old_format: bool) -> None:
    """Old and new file formats, fixed and extendible in one or two dimensions, one chunk and many."""
    with h5py.File(tmp_path / "a.h5", "w", libver="earliest" if old_format else "latest") as file:
        shapes = [(40, 6), (None, 6), (None, None)]
        cases = itertools.product(shapes, [(8, 6), (40, 6), (3, 4)], [None, "gzip"])
        for i, (maxshape, chunks, compression) in enumerate(cases):
            data = random_values((40, 6), "<f4", seed=i, constant=True)
            file.create_dataset(f"x{i}", data=data, chunks=chunks, maxshape=maxshape, compression=compression)
        names = list(file)
    check([str(tmp_path / "a.h5")], names, "native")


def test_resized_dataset_matches_h5py(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset(
            "x", data=random_values((40, 6), "<f4"), chunks=(8, 6), maxshape=(None, 6), compression="gzip", fillvalue=2
        )
        dataset.resize(21, axis=0)
        dataset.resize(50, axis=0)
        dataset[45:] = 1.0
    check([str(tmp_path / "a.h5")], ["x"], "native")


@pytest.mark.parametrize("libver", ["earliest", "v110", "latest"])
@pytest.mark.parametrize(
    ("chunks", "maxshape", "way"),
    [
        ((4, 4), (8, None), "h5py, because of one growing dimension that is not the first"),
        ((4, 4), (16, None), "h5py, because of one growing dimension that is not the first"),
        ((3, 5), (8, None), "h5py, because of one growing dimension that is not the first"),
        ((4, 4), (None, 12), "native"),
        ((4, 4), (None, None), "native"),
        ((4, 4), (16, 24), "native"),
    ],
)
def test_extensible_array_index_is_read_correctly(
    tmp_path: Path, libver: Any, chunks: Any, maxshape: Any, way: str
) -> None:
    """libhdf5 lists chunks of an extensible array with wrong coordinates if the rows do not grow."""
    with h5py.File(tmp_path / "a.h5", "w", libver=libver) as file:
        data = np.arange(96, dtype=np.float32).reshape(8, 12)
        file.create_dataset("x", data=data, chunks=chunks, maxshape=maxshape, compression="gzip")
    check([str(tmp_path / "a.h5")], ["x"], way)


def test_wrong_chunk_listing_falls_back_to_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listed chunks are compared with those found by coordinates, in case a version of libhdf5 lists them wrongly."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=random_values((40, 6), "<f4"), chunks=(8, 3), compression="gzip")
    list_chunks = native_layout._list_chunks

    def misplacing(dataset: Any, grid: Any) -> Any:
        offsets, sizes, masks, partial = list_chunks(dataset, grid)
        swapped = np.arange(len(offsets)).reshape(grid).T.ravel()
        return offsets[swapped], sizes[swapped], masks, partial

    monkeypatch.setattr(native_layout, "_list_chunks", misplacing)
    check([str(tmp_path / "a.h5")], ["x"], "h5py, because of a listing of its chunks that contradicts libhdf5")


@pytest.mark.parametrize("filters", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("extra", [4, 190, 5000])
def test_excess_bytes_of_a_chunk_are_ignored(tmp_path: Path, filters: tuple[bool, bool], extra: int) -> None:
    """Like libhdf5, uses the first bytes of the decoded chunk."""
    import zlib

    from spinlock_fast import _native

    shuffle, fletcher32 = filters
    values = random_values((32, 6), "<f4", constant=True)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset(
            "x", data=values, chunks=(8, 6), compression="gzip", shuffle=shuffle, fletcher32=fletcher32
        )
        content = values[8:16].tobytes() + np.random.default_rng(0).bytes(extra)
        if shuffle:
            content = np.frombuffer(content, np.uint8).reshape(-1, 4).T.tobytes() if extra % 4 == 0 else content
        content = zlib.compress(content)
        if fletcher32:
            content += _native.fletcher32(content).to_bytes(4, "little")
        dataset.id.write_direct_chunk((8, 0), content)
    check([str(tmp_path / "a.h5")], ["x"], "native")


def test_far_too_long_stream_is_an_error(tmp_path: Path) -> None:
    """The allocated memory is limited."""
    import zlib

    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("x", data=random_values((32, 6), "<f4"), chunks=(8, 6), compression="gzip")
        dataset.id.write_direct_chunk((8, 0), zlib.compress(bytes(40 << 20)))
    with helpers.raises_one_line(DataError, "chunk [8, 0]", "longer than the chunk"):
        list(HDF5Loader(str(tmp_path / "a.h5"), "x"))
