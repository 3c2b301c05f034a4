"""Packed data (fill values, scale, offset), booleans, and reversed axes of MATLAB."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import h5py
import helpers
import numpy as np
import pytest
import torch
from hdf5_layouts import NOT_NATIVE

from spinlock_fast.data import HDF5Loader
from spinlock_fast.data.feature_source import FeatureSource
from spinlock_fast.errors import DataError

STORED = np.array([[1, -99, 3], [-32768, 5, 6], [7, 8, -99], [10, 11, 12]])


def write(path: Path, stored: Any, layout: dict[str, Any] | None = None, **attributes: Any) -> str:
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("x", data=stored, **(layout or {}))
        dataset.attrs.update(attributes)
    return str(path)


def loaded(paths: Any, **options: Any) -> torch.Tensor:
    loader = HDF5Loader(paths, "x", **{"batch_size": 3, "shuffle": False, "num_threads": 1, **options})
    return torch.cat([batch["x"] for batch in loader])


CASES = [
    # stored type, attributes, type of the result
    ("<i2", {"_FillValue": np.int16(-99)}, np.float32),
    (">i2", {"_FillValue": np.int16(-99), "missing_value": np.int16([-32768])}, np.float32),
    ("<i4", {"missing_value": np.array([-99, -32768])}, np.float64),
    ("<i2", {"scale_factor": np.float32(0.5), "add_offset": np.float32(100)}, np.float32),
    ("<i2", {"scale_factor": 0.01, "add_offset": [273.15], "_FillValue": np.int16([-99])}, np.float64),
    ("<i2", {"add_offset": 3, "missing_value": "-99"}, np.float64),
    ("<f4", {"_FillValue": np.float32(-99)}, np.float32),
    ("<f4", {"_FillValue": -99.0, "scale_factor": 2.0}, np.float64),
    ("<f8", {"missing_value": np.float32(-99)}, np.float64),
    ("<f2", {"missing_value": np.float16(-99)}, np.float16),
    ("<i2", {"_FillValue": np.int16(157), "_Unsigned": "true", "scale_factor": 1e-4}, np.float64),
    ("<u1", {"_FillValue": np.uint8(157)}, np.float32),
    ("<i2", {"_FillValue": 1e30}, np.int16),  # no stored number can equal it
    ("<i2", {"scale_factor": 1.0, "add_offset": 0.0}, np.int16),
    ("<f4", {"_FillValue": np.float32(np.nan)}, np.float32),
]


def expected(stored: Any, attributes: dict[str, Any]) -> Any:
    """Unpacks by the CF conventions, one number at a time."""
    if str(attributes.get("_Unsigned")) == "true":
        stored = stored.astype(stored.dtype.newbyteorder("=")).view(np.uint16)
    missing = [
        float(number) for name in ("_FillValue", "missing_value") for number in np.ravel(attributes.get(name, np.nan))
    ]
    scale, offset = (np.ravel(attributes.get(name, d))[0] for name, d in (("scale_factor", 1.0), ("add_offset", 0.0)))
    values = stored.astype(np.float64) * float(scale) + float(offset)
    return np.where(np.isin(stored.astype(np.float64), missing), np.nan, values)


@pytest.mark.parametrize("layout", [{}, {"chunks": (2, 2), "compression": "gzip"}, {"chunks": (2, 3), **NOT_NATIVE}])
@pytest.mark.parametrize(("kind", "attributes", "result"), CASES)
def test_packed_numbers_are_unpacked(tmp_path: Path, kind: str, attributes: Any, result: Any, layout: Any) -> None:
    stored = STORED.astype(kind)
    path = write(tmp_path / "a.h5", stored, layout, **attributes)
    wanted = expected(stored, attributes)
    found = loaded(path).numpy()
    assert found.dtype == np.dtype(result)
    np.testing.assert_allclose(found, wanted.astype(result), rtol=1e-12)
    raw = loaded(path, unpack=False).numpy()
    np.testing.assert_array_equal(raw, stored)
    assert raw.dtype == stored.dtype.newbyteorder("=")
    with FeatureSource(path, {"family": "x"}) as source:
        np.testing.assert_allclose(source.read("family", 0, 4), wanted.astype(np.float32), rtol=1e-6)
        np.testing.assert_allclose(
            torch.cat([b["family"] for _, b in source.batches(["family"], 2, 10**6, torch.device("cpu"))]),
            wanted.astype(np.float32),
            rtol=1e-6,
        )
    np.testing.assert_array_equal(loaded(path, cache_dir=tmp_path / "cache").numpy(), found)


def test_shards_with_different_packing_are_unpacked(tmp_path: Path) -> None:
    stored = STORED.astype(np.int16)
    write(tmp_path / "0.h5", stored, scale_factor=np.float32(2))
    write(tmp_path / "1.h5", stored)
    write(tmp_path / "2.h5", stored, add_offset=0.5, _FillValue=np.int16(-99))
    found = loaded(f"{tmp_path}/*.h5", batch_size=5, shuffle=True)
    index = torch.cat([b["index"] for b in HDF5Loader(f"{tmp_path}/*.h5", "x", batch_size=5, num_threads=1)])
    wanted = np.concatenate([stored * 2.0, stored, np.where(stored == -99, np.nan, stored + 0.5)])
    assert found.dtype == torch.float64
    np.testing.assert_array_equal(found, wanted[index])


def test_netcdf_default_fill_values_become_nan(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs["_NCProperties"] = "version=2,netcdf=4.9.2,hdf5=1.14.2"
        dataset = file.create_dataset("x", (8, 3), "<f4", chunks=(4, 3), fillvalue=np.float32(9.96921e36))
        dataset[:4] = 1.0
    found = loaded(str(tmp_path / "a.h5"))
    assert (found[:4] == 1).all()
    assert found[4:].isnan().all()


@pytest.mark.parametrize(
    ("dtype", "default"),
    [("i2", -32767), (">i2", -32767), ("u2", 65535), ("i4", -2147483647), ("i8", -9223372036854775806)],
)
@pytest.mark.parametrize("scale", [None, 0.5])
def test_netcdf_default_integer_fill_values_become_nan(
    tmp_path: Path, dtype: str, default: int, scale: float | None
) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs["_NCProperties"] = "version=2,netcdf=4.9.2,hdf5=1.14.2"
        dataset = file.create_dataset("x", (8, 3), dtype, chunks=(4, 3), fillvalue=default)
        dataset[:4] = 6
        dataset[0, 1] = default
        if scale is not None:
            dataset.attrs["scale_factor"] = scale
    found = loaded(str(tmp_path / "a.h5"))
    wanted = np.full((8, 3), 6 * (scale or 1.0))
    wanted[4:] = wanted[0, 1] = np.nan
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("dtype", "default"), [("i1", -127), ("u1", 255)])
def test_netcdf_bytes_have_no_default_fill_value(tmp_path: Path, dtype: str, default: int) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs["_NCProperties"] = "version=2,netcdf=4.9.2,hdf5=1.14.2"
        file.create_dataset("x", (8, 3), dtype, chunks=(4, 3), fillvalue=default)
    assert (loaded(str(tmp_path / "a.h5")) == default).all()


def test_packing_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.h5", STORED, _FillValue=-99, scale_factor=0.5)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            list(HDF5Loader(path, "x"))
            with FeatureSource(path, {"family": "x"}) as source:
                source.read("family", 0, 2)
    (message,) = caplog.messages
    assert all(word in message for word in ("a.h5", "x", "-99 counts as missing", "0.5", "scale_factor"))


@pytest.mark.parametrize("value", ["much", np.array([1.0, 2.0]), np.nan, np.inf])
def test_invalid_scale_is_an_error(tmp_path: Path, value: Any) -> None:
    with helpers.raises_one_line(DataError, "a.h5", "x", "scale_factor", "expected one finite number"):
        HDF5Loader(write(tmp_path / "a.h5", STORED, scale_factor=value), "x")


@pytest.mark.parametrize("layout", [{}, {"chunks": (4, 2), "compression": "gzip"}, {"chunks": (4, 3), **NOT_NATIVE}])
def test_booleans_become_uint8(tmp_path: Path, layout: Any) -> None:
    values = np.random.default_rng(0).random((20, 3)) > 0.5
    path = write(tmp_path / "a.h5", values, layout)
    found = loaded(path)
    assert found.dtype == torch.uint8
    np.testing.assert_array_equal(found, values)
    with FeatureSource(path, {"family": "x"}) as source:
        np.testing.assert_array_equal(source.read("family", 0, 20), values.astype(np.float32))


def test_transposed_matlab_array_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.h5", np.zeros((3, 50)), MATLAB_class=np.bytes_("double"))
    HDF5Loader(path, "x")
    assert "MATLAB" in caplog.text
    assert "read as 3 rows" in caplog.text
    with h5py.File(path, "a") as file:
        file["y"] = np.zeros((5, 50))
    with helpers.raises_one_line(DataError, "x has 3, y has 5", "MATLAB stores arrays with reversed axes"):
        HDF5Loader(path, ["x", "y"])


def test_matching_matlab_arrays_are_not_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    HDF5Loader(write(tmp_path / "a.h5", np.zeros((50, 3)), MATLAB_class=np.bytes_("double")), "x")
    assert not caplog.messages
