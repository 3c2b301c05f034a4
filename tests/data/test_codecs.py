"""Compression filters that are decoded natively: the values of h5py with hdf5plugin, and errors for damaged chunks."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import h5py
import helpers
import hypothesis.extra.numpy as npst
import numpy as np
import pytest
from hdf5_layouts import DTYPES, check, hdf5plugin, random_values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spinlock_fast import _native
from spinlock_fast.data import HDF5Loader
from spinlock_fast.errors import DataError

pytestmark = pytest.mark.skipif(
    "lz4" not in _native.codec_libraries() or "zstd" not in _native.codec_libraries(),
    reason="this build has neither LZ4 nor Zstandard",
)

SHUFFLE, FLETCHER32 = (2, ()), (3, ())
BLOSC_CODECS = ("blosclz", "lz4", "lz4hc", "zlib", "zstd")


def as_filter(options: Any) -> tuple[int, tuple[int, ...]]:
    """(registered number, client data) of a filter of hdf5plugin."""
    return options["compression"], tuple(options["compression_opts"])


CODECS = {
    "gzip": (1, (4,)),
    "lzf": (32000, ()),
    "zstd": as_filter(hdf5plugin.Zstd()),
    "lz4": as_filter(hdf5plugin.LZ4()),
    "lz4, small blocks": as_filter(hdf5plugin.LZ4(nbytes=64)),
    **{f"bitshuffle, {name}": as_filter(hdf5plugin.Bitshuffle(cname=name)) for name in ("none", "lz4", "zstd")},
    "bitshuffle, small blocks": as_filter(hdf5plugin.Bitshuffle(nelems=16, cname="lz4")),
    **{
        f"{name}, {codec}, {shuffle}": as_filter(make(codec, shuffle))
        for name, make in (
            ("blosc", lambda codec, shuffle: hdf5plugin.Blosc(cname=codec, shuffle=shuffle)),
            ("blosc2", lambda codec, shuffle: hdf5plugin.Blosc2(cname=codec, filters=shuffle)),
        )
        for codec in BLOSC_CODECS
        for shuffle in (0, 1, 2)
    },
    "blosc2, small blocks": (32026, (0, 256, 0, 0, 5, 1, 1)),
    "blosc, uncompressed": as_filter(hdf5plugin.Blosc(clevel=0)),
    "blosc2, uncompressed": as_filter(hdf5plugin.Blosc2(clevel=0)),
    "blosc2, truncated": as_filter(hdf5plugin.Blosc2(filters=hdf5plugin.Blosc2.TRUNC_PREC)),
}


def create(
    file: h5py.File, name: str, shape: Any, dtype: str, chunks: Any, filters: list[tuple[int, tuple[int, ...]]]
) -> h5py.Dataset:
    """A dataset with filters in any order, which `create_dataset` does not offer."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk(chunks)
    for code, values in filters:
        if code == 2:
            plist.set_shuffle()
        elif code == 3:
            plist.set_fletcher32()
        else:
            plist.set_filter(code, h5py.h5z.FLAG_OPTIONAL, values)
    space = h5py.h5s.create_simple(shape)
    return h5py.Dataset(h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype)), space, plist))


def smooth(shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    """Values that every codec compresses."""
    size = int(np.prod(shape))
    return (np.arange(size) // 3 % 100).astype(dtype).reshape(shape)


def pipelines() -> st.SearchStrategy[list[tuple[int, tuple[int, ...]]]]:
    """Filters in any order: one codec or two, with or without shuffle and fletcher32."""
    codecs = st.lists(st.sampled_from(sorted(CODECS.values())), min_size=1, max_size=2, unique_by=lambda f: f[0])
    others = st.lists(st.sampled_from([SHUFFLE, FLETCHER32]), max_size=2, unique=True)
    return st.tuples(codecs, others).flatmap(lambda lists: st.permutations([*lists[0], *lists[1]]))


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    shape=npst.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=40),
    chunk=st.tuples(*[st.integers(1, 24)] * 4),
    dtype=st.sampled_from(DTYPES),
    filters=pipelines(),
    content=st.sampled_from(["noise", "runs", "smooth", "constant", "zero"]),
    shuffle=st.sampled_from([True, False]),
)
def test_any_pipeline_matches_h5py(
    shape: tuple[int, ...], chunk: tuple[int, ...], dtype: str, filters: Any, content: str, shuffle: bool
) -> None:
    shape = shape[:2] + tuple(min(size, 9) for size in shape[2:])
    chunks = tuple(min(a, b) for a, b in zip(shape, chunk, strict=False))
    if content in ("noise", "runs"):
        values = random_values(shape, dtype, constant=content == "runs")
    else:
        values = {"smooth": smooth(shape, dtype), "constant": np.full(shape, 3, dtype), "zero": np.zeros(shape, dtype)}[
            content
        ]
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/a.h5"
        with h5py.File(path, "w") as file:
            create(file, "x", shape, dtype, chunks, filters).write_direct(values)
        stats = check([path], ["x"], shuffle=shuffle)
        assert stats["paths"]["x"] in ("native", "h5py, because of edge chunks that may be stored unfiltered")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shuffle", [True, False])
def test_filters_are_read_natively(tmp_path: Path, codec: str, shuffle: bool) -> None:
    """Whole rows, and rows that several chunks share."""
    values = smooth((48, 60, 5), "<f4")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, chunks in {"x": (8, 60, 5), "y": (16, 30, 5), "z": (48, 60, 5)}.items():
            create(file, name, values.shape, "<f4", chunks, [CODECS[codec]]).write_direct(values)
    check([str(tmp_path / "a.h5")], ["x", "y", "z"], "native", shuffle=shuffle)


@pytest.mark.parametrize("codec", CODECS)
def test_a_skipped_codec_is_respected(tmp_path: Path, codec: str) -> None:
    """Chunks with different filter masks in one dataset."""
    values = random_values((32, 6), "<f4", constant=True)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = create(file, "x", values.shape, "<f4", (8, 6), [CODECS[codec], FLETCHER32])
        dataset[...] = values
        dataset.id.write_direct_chunk((8, 0), values[8:16].tobytes(), filter_mask=3)
    check([str(tmp_path / "a.h5")], ["x"], "native")


@pytest.mark.parametrize("rows", [4, 8])
def test_blosc_chunks_from_before_the_split_flag(tmp_path: Path, rows: int) -> None:
    """Blosc before 1.14 never set the flag, and split blocks of at least 128 items; 4 rows are 80 items."""
    codec = as_filter(hdf5plugin.Blosc(cname="lz4", shuffle=1))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = create(file, "x", (32, 20), "<f4", (rows, 20), [codec])
        dataset[...] = smooth((32, 20), "<f4")
        file.flush()
        stored = dataset.id.read_direct_chunk((rows, 0))[1]
        assert bool(stored[2] & 16) == (rows == 4)
        dataset.id.write_direct_chunk((rows, 0), stored[:2] + bytes([stored[2] & ~16]) + stored[3:])
    check([str(tmp_path / "a.h5")], ["x"], "native")


def test_large_chunks_have_many_blocks(tmp_path: Path) -> None:
    """Chunks of 4 MB: several blocks of every codec, and blocks of blosc2 that lie in several parts of the chunk."""
    values = smooth((64, 128, 256), "<f4") * np.float32(1.5)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for codec in ("lz4", "bitshuffle, lz4", "blosc, lz4, 1", "blosc2, zstd, 1", "blosc2, lz4, 2", "zstd", "lzf"):
            create(file, codec, values.shape, "<f4", (32, 128, 256), [CODECS[codec]]).write_direct(values)
        names = list(file)
    check([str(tmp_path / "a.h5")], names, "native", window_rows=64)


@pytest.mark.parametrize("chunks", [(100, 4), (90, 4), (5, 7, 5), (1, 33, 4), (1, 30, 2, 2), (33,)])
def test_padded_blocks_of_blosc2(tmp_path: Path, chunks: tuple[int, ...]) -> None:
    """Blocks of 256 bytes that are contiguous in the chunk or not; those at its ends are stored with padding."""
    shape = (2 * chunks[0] + 1, *(2 * size - 1 for size in chunks[1:]))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        create(file, "x", shape, "<f4", chunks, [CODECS["blosc2, small blocks"]]).write_direct(smooth(shape, "<f4"))
    check([str(tmp_path / "a.h5")], ["x"], "native")


@pytest.mark.parametrize("codec", ["lzf", "lz4", "blosc, blosclz, 0", "blosc2, blosclz, 0"])
def test_repeated_content_of_any_period(tmp_path: Path, codec: str) -> None:
    """Matches at all distances, which BloscLZ stores in two ways."""
    random = np.random.default_rng(0)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for period in (1, 2, 3, 5, 7, 9, 13, 17, 100, 8190, 8192, 9000, 40000):
            values = np.resize(random.integers(0, 256, period, dtype=np.uint8), 100_000)
            create(file, str(period), (100_000,), "u1", (100_000,), [CODECS[codec]])[...] = values
        names = list(file)
    check([str(tmp_path / "a.h5")], names, "native", batch_size=50_000, window_rows=100_000)


def test_blosc2_features_without_decoder_are_read_through_h5py(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        delta = hdf5plugin.Blosc2(filters=hdf5plugin.Blosc2.DELTA)
        file.create_dataset("x", data=smooth((32, 60), "<f4"), chunks=(8, 60), **delta)
    check([str(tmp_path / "a.h5")], ["x"], "h5py, because of filter 3 of blosc2")


@pytest.mark.slow
def test_hdf5plugin_is_not_needed(tmp_path: Path) -> None:
    values = smooth((32, 60), "<f4")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name in ("zstd", "lz4", "blosc, lz4, 1", "blosc2, zstd, 1", "bitshuffle, lz4"):
            create(file, name, values.shape, "<f4", (8, 60), [CODECS[name]]).write_direct(values)
        names = list(file)
    code = (
        "import sys; sys.modules['hdf5plugin'] = None\n"
        "from spinlock_fast.data import HDF5Loader\n"
        f"loader = HDF5Loader({str(tmp_path / 'a.h5')!r}, {names!r}, batch_size=32, shuffle=False)\n"
        "batch = next(iter(loader)); index = batch.pop('index')\n"
        "print(*(float(rows.sum()) for rows in batch.values()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [float(word) for word in result.stdout.split()] == [float(values.sum())] * len(names)


def test_a_build_without_codecs_reads_through_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        create(file, "x", (32, 60), "<f4", (8, 60), [CODECS["zstd"]]).write_direct(smooth((32, 60), "<f4"))

    def check_filters(filters: Any) -> None:
        raise NotImplementedError("the filter zstd: this build lacks LZ4 or Zstandard")

    monkeypatch.setattr(_native, "check_filters", check_filters)
    check([str(tmp_path / "a.h5")], ["x"], "h5py, because of the filter zstd: this build lacks")


COMPRESSED = [name for name in CODECS if name != "bitshuffle, none" and "uncompressed" not in name]


def damaged(path: Path, codec: str, change: Any) -> None:
    """A file whose chunk of rows 8 to 15 is changed."""
    with h5py.File(path, "w") as file:
        dataset = create(file, "x", (32, 60), "<f4", (8, 60), [CODECS[codec]])
        dataset[...] = smooth((32, 60), "<f4")
        file.flush()
        stored = dataset.id.read_direct_chunk((8, 0))[1]
        dataset.id.write_direct_chunk((8, 0), change(stored))


@pytest.mark.parametrize("codec", COMPRESSED)
def test_truncated_chunks_are_errors(tmp_path: Path, codec: str) -> None:
    for keep in (0.5, 0.1):
        damaged(tmp_path / "a.h5", codec, lambda stored, keep=keep: stored[: max(1, int(keep * len(stored)))])
        with helpers.raises_one_line(DataError, "a.h5: x: chunk [8, 0] (rows 8..15) at byte ", "is damaged"):
            list(HDF5Loader(str(tmp_path / "a.h5"), "x"))


BOMBS = {
    "lz4": lambda stored: (1 << 40).to_bytes(8, "big") + stored[8:],
    "bitshuffle, lz4": lambda stored: (1 << 40).to_bytes(8, "big") + stored[8:],
    "bitshuffle, zstd": lambda stored: (1 << 40).to_bytes(8, "big") + stored[8:],
    # A frame of Zstandard whose header declares 1 TiB: magic number, flags, size, and one empty block.
    "zstd": lambda stored: b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little") + b"\x01\x00\x00",
    "blosc, lz4, 1": lambda stored: stored[:4] + 2 * (0x7FFFFFFF).to_bytes(4, "little") + stored[12:],
    # The shape of the array and of its chunk in the metadata: 8 rows become 2**30.
    "blosc2, lz4, 1": lambda stored: stored.replace(
        b"\xd3" + (8).to_bytes(8, "big"), b"\xd3" + (1 << 30).to_bytes(8, "big"), 1
    ).replace(b"\xd2" + (8).to_bytes(4, "big"), b"\xd2" + (1 << 30).to_bytes(4, "big"), 1),
}


@pytest.mark.parametrize("codec", BOMBS)
def test_declared_sizes_beyond_the_chunk_are_errors(tmp_path: Path, codec: str) -> None:
    """Memory is never allocated for them."""
    damaged(tmp_path / "a.h5", codec, BOMBS[codec])
    loader = HDF5Loader(str(tmp_path / "a.h5"), "x")
    with helpers.raises_one_line(DataError, "a.h5: x: chunk [8, 0] (rows 8..15)", "longer than the chunk"):
        list(loader)


@settings(max_examples=60)
@given(codec=st.sampled_from(sorted(CODECS)), seed=st.integers(0, 2**32 - 1))
def test_damaged_chunks_decode_or_are_errors(codec: str, seed: int) -> None:
    """`decode_chunk` on randomly changed chunks; tests/native does this under the sanitizers."""
    random = np.random.default_rng(seed)
    values = smooth((8, 30, 7), "<f4")
    with h5py.File("a.h5", "w", driver="core", backing_store=False) as file:
        dataset = create(file, "x", values.shape, "<f4", values.shape, [CODECS[codec]])
        dataset[...] = values
        file.flush()
        mask, stored = dataset.id.read_direct_chunk((0, 0, 0))
        code, _, data, _ = dataset.id.get_create_plist().get_filter(0)
    filters = [(code, list(data))]
    if mask == 0:
        assert _native.decode_chunk(stored, 0, filters, values.nbytes) == values.tobytes() or "truncated" in codec
    for _ in range(20):
        changed = bytearray(stored)
        for at in random.integers(0, len(changed), 3):
            changed[at] = random.integers(0, 256)
        with contextlib.suppress(ValueError, NotImplementedError):
            assert len(_native.decode_chunk(bytes(changed), 0, filters, values.nbytes)) == values.nbytes


def test_unknown_filters_are_not_implemented() -> None:
    with pytest.raises(NotImplementedError, match="the filter 32023"):
        _native.check_filters([(32023, [1])])
    with pytest.raises(NotImplementedError, match="item size"):
        _native.check_filters([(32008, [0, 4])])
