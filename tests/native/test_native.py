import zlib

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinlock_fast import _native


def shuffle(data: bytes, item_size: int) -> bytes:
    """HDF5's shuffle filter: byte 0 of every item, then byte 1, ..., then bytes beyond the last whole item."""
    count = len(data) // item_size
    items = np.frombuffer(data[: count * item_size], np.uint8).reshape(count, item_size)
    return items.T.tobytes() + data[count * item_size :]


def fletcher32(data: bytes) -> int:
    """Fletcher's checksum with unlimited integers: sums modulo 65535, where a nonzero multiple gives 65535."""
    words = np.frombuffer(data + b"\0" * (len(data) % 2), ">u2")
    first = second = 0
    for word in words.tolist():
        first += word
        second += first

    def reduce(total: int) -> int:
        return total if total == 0 else (total - 1) % 65535 + 1

    return reduce(second) << 16 | reduce(first)


def stored_chunk(path, values, *, chunks, **filters):
    """Stored bytes of the first chunk, written by HDF5."""
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=values, chunks=chunks, **filters)
    with h5py.File(path) as file:
        return file["x"].id.read_direct_chunk((0,) * values.ndim)[1]


@pytest.mark.parametrize("shape", [(8, 360), (8, 16, 63), (1, 3, 64, 64), (3, 7), (1, 1)])
def test_fletcher32_matches_hdf5(tmp_path, shape):
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    stored = stored_chunk(tmp_path / "a.h5", values, chunks=shape, fletcher32=True)
    assert _native.fletcher32(stored[:-4]) == int.from_bytes(stored[-4:], "little")


@pytest.mark.parametrize("size", [1, 2, 3, 719, 720, 721, 722, 723, 1441])
@pytest.mark.parametrize("fill", [0, 255, None])
def test_fletcher32_of_odd_sizes_and_extreme_bytes_matches_hdf5(tmp_path, size, fill):
    random = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    values = random if fill is None else np.full(size, fill, np.uint8)
    stored = stored_chunk(tmp_path / "a.h5", values, chunks=(size,), fletcher32=True)
    assert _native.fletcher32(stored[:-4]) == int.from_bytes(stored[-4:], "little")


@given(st.binary(max_size=3000))
def test_fletcher32_matches_the_formula(data):
    assert _native.fletcher32(data) == fletcher32(data)


def test_fletcher32_of_a_large_buffer_does_not_overflow():
    data = b"\xff\xfe" * 200_000
    assert _native.fletcher32(data) == fletcher32(data)


@pytest.mark.parametrize("dtype", ["u1", "f2", "f4", "f8", "S3", "S5", "c16"])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 100])
def test_unshuffle_matches_hdf5(tmp_path, dtype, count):
    size = np.dtype(dtype).itemsize
    random = np.random.default_rng(count).integers(1, 255, count * size, dtype=np.uint8)
    values = random.view(dtype)
    stored = stored_chunk(tmp_path / "a.h5", values, chunks=(count,), shuffle=True)
    assert _native.unshuffle(stored, size) == random.tobytes()


@pytest.mark.parametrize("item_size", range(1, 17))
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 63, 64, 65, 129, 1000])
def test_unshuffle_inverts_shuffle(item_size, size):
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()
    assert _native.unshuffle(shuffle(data, item_size), item_size) == data


@given(st.binary(max_size=300), st.integers(1, 40))
def test_unshuffle_inverts_shuffle_of_any_bytes(data, item_size):
    assert _native.unshuffle(shuffle(data, item_size), item_size) == data


def test_empty_buffers_are_accepted():
    assert _native.fletcher32(b"") == 0
    assert _native.unshuffle(b"", 4) == b""
    assert _native.fletcher32(np.empty((5, 0), np.float32)) == 0


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview, lambda b: np.frombuffer(b, np.float32).reshape(5, 4)])
def test_any_contiguous_buffer_is_accepted(wrap):
    data = np.random.default_rng(0).integers(0, 256, 80, dtype=np.uint8).tobytes()
    assert _native.unshuffle(wrap(data), 4) == _native.unshuffle(data, 4)
    assert _native.fletcher32(wrap(data)) == fletcher32(data)


def test_unaligned_buffer_is_accepted():
    data = np.random.default_rng(0).integers(0, 256, 81, dtype=np.uint8).tobytes()
    assert _native.unshuffle(memoryview(data)[1:], 4) == _native.unshuffle(data[1:], 4)


@pytest.mark.parametrize(
    "gappy",
    [
        np.arange(10, dtype=np.uint8)[::2],
        np.arange(10, dtype=np.uint8)[::-1],
        np.zeros((4, 3), order="F"),
        memoryview(b"abcdef")[::2],
    ],
    ids=["strided", "reversed", "fortran", "memoryview"],
)
def test_non_contiguous_buffers_are_errors(gappy):
    with pytest.raises(ValueError, match="contiguous"):
        _native.fletcher32(gappy)
    with pytest.raises(ValueError, match="contiguous"):
        _native.unshuffle(gappy, 1)


def test_item_size_zero_is_an_error():
    with pytest.raises(ValueError, match="item_size"):
        _native.unshuffle(b"abcd", 0)


@pytest.mark.parametrize("item_size", [-1, 2.5, "4"])
def test_invalid_item_sizes_are_errors(item_size):
    with pytest.raises(TypeError):
        _native.unshuffle(b"abcd", item_size)


def test_text_is_an_error():
    with pytest.raises(TypeError):
        _native.fletcher32("abcd")


@pytest.mark.skipif(_native.inflate_library() == "none", reason="this build cannot inflate")
@pytest.mark.parametrize("size", [1, 100, 70_000])
def test_inflate_fills_the_buffer_exactly(size):
    data = np.random.default_rng(0).integers(0, 30, size, dtype=np.uint8).tobytes()
    out = bytearray(size)
    _native.inflate(zlib.compress(data), out)
    assert out == data
    for wrong in (bytearray(size + 1), bytearray(size - 1)):
        with pytest.raises(ValueError, match="compressed data"):
            _native.inflate(zlib.compress(data), wrong)
    with pytest.raises(ValueError, match="compressed data"):
        _native.inflate(zlib.compress(data)[:-2], out)


def test_build_info_names_version_and_processor():
    info = _native.build_info()
    assert info["version"] == _native.__version__
    assert info["simd_level"] == _native.simd_level()
    assert _native.simd_level() in ("avx512", "avx2", "sse2", "portable")
    assert info["inflate"] == _native.inflate_library()
    assert info["inflate"].split()[0] in ("libdeflate", "zlib", "none")
    assert info["cxx_standard"] >= 202002
