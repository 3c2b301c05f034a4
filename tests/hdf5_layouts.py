"""Arrays of any type, and the comparison of `HDF5Loader` with h5py, for tests of storage layouts."""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from spinlock_fast.data import HDF5Loader

hdf5plugin = pytest.importorskip("hdf5plugin", reason="pip install hdf5plugin")

NOT_NATIVE = dict(hdf5plugin.BZip2())  # a filter without a native decoder
DTYPES = ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8", "i1", "u1", "<i2", ">i2", "<u2", ">i4", "<u4", "<i8", ">u8"]


def random_values(shape: tuple[int, ...], dtype: str, seed: int = 0, constant: bool = False) -> NDArray[Any]:
    """Random bits, including NaN with any payload; runs of equal bytes, which compress, if `constant`."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    random = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    if constant:
        random //= 64
    return random.view(dtype).reshape(shape)


def native(values: NDArray[Any]) -> NDArray[Any]:
    """Converts to native byte order bytewise: a cast could change the payload of a NaN."""
    if values.dtype.isnative:
        return values
    return values.byteswap().view(values.dtype.newbyteorder("="))


def through_h5py(files: list[str], path: str) -> NDArray[Any]:
    parts = []
    for name in files:
        with h5py.File(name) as file:
            parts.append(native(file[path][()]))
    return np.concatenate(parts)


def check(files: list[str], paths: list[str], way: str | None = None, **options: Any) -> dict[str, Any]:
    """Loads all rows, compares them with h5py, and returns `stats()`. `way`: how each dataset must be read."""
    loader = HDF5Loader(files, paths, **{"batch_size": 7, "window_rows": 16, **options})
    expected = {path: through_h5py(files, path) for path in paths}
    seen = []
    for batch in loader:
        index = batch.pop("index").numpy()
        seen.append(index)
        for path, rows in batch.items():
            found = rows.numpy()
            assert found.dtype == expected[path].dtype
            assert found.tobytes() == expected[path][index].tobytes(), path
    assert sorted(np.concatenate(seen).tolist()) == list(range(len(expected[paths[0]])))
    if options.get("shuffle") is False:
        assert np.concatenate(seen).tolist() == list(range(len(expected[paths[0]])))
    stats = loader.stats()
    if way is not None:
        assert all(found.startswith(way) for found in stats["paths"].values()), stats["paths"]
    return stats
