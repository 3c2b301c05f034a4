"""`extract` on Zarr stores."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers import raises_one_line
from trajectory_files import smooth_fields

from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.extract import main as extract_main
from spinlock_fast.trajectories.layouts import open_trajectories
from spinlock_fast.trajectories.options import Options

zarr = pytest.importorskip("zarr", reason="the extra zarr")
pytestmark = pytest.mark.filterwarnings("ignore")  # of zarr

FIELDS = smooth_fields(samples=7)
AXES = Options(axes="n t c y x")


def write_store(path: Path, name: str | None = "run/u", fields: Any = FIELDS, **options: Any) -> Path:
    options.setdefault("chunks", (3, *fields.shape[1:]))
    store = zarr.storage.ZipStore(path, mode="w") if path.suffix == ".zip" else zarr.storage.LocalStore(path)
    if name is None:
        array = zarr.create_array(store, shape=fields.shape, dtype=fields.dtype, **options)
    else:
        group = zarr.open_group(store, mode="w", zarr_format=options.pop("zarr_format", 3))
        group.attrs.update({"viscosity": 0.25, "title": "planted"})
        array = group.create_array(name, shape=fields.shape, dtype=fields.dtype, **options)
    array[...] = fields
    array.attrs["_ARRAY_DIMENSIONS"] = list("ntcyx")
    store.close()
    return path


def read(path: Path, options: Options = AXES, start: int = 0) -> Any:
    trajectories = open_trajectories(str(path), options=options)
    return np.stack(list(trajectories.read(start, trajectories.samples)))[:, 0]


@pytest.mark.parametrize(
    ("name", "array", "options"),
    [
        ("a.zarr", "run/u", {}),
        ("a.zarr", None, {}),
        ("a", "u", {"zarr_format": 2}),
        ("a.zarr", "u", {"chunks": (1, 2, 1, 4, 4), "shards": (2, 2, 2, 4, 4)}),
        ("a.zarr.zip", "u", {}),
    ],
)
def test_samples_of_every_kind_of_store(tmp_path: Path, name: str, array: str | None, options: dict[str, Any]) -> None:
    path = write_store(tmp_path / name, array, **options)
    assert np.array_equal(read(path), FIELDS)
    assert np.array_equal(read(path, start=4), FIELDS[4:])
    small = Options(axes="n t c y x", memory_budget=1)
    assert np.array_equal(read(path, small), FIELDS)


def test_other_orders_and_types(tmp_path: Path) -> None:
    moved = np.ascontiguousarray(FIELDS.transpose(1, 0, 3, 4, 2).astype(">f8"))  # t n y x c
    path = write_store(tmp_path / "moved", fields=moved, chunks=(2, 3, 8, 12, 2))
    assert np.allclose(read(path, Options(axes="t n y x c")), FIELDS)
    one = write_store(tmp_path / "one", fields=FIELDS[0], chunks=FIELDS[0].shape)
    assert np.array_equal(read(one, Options(axes="t c y x"))[0], FIELDS[0])


def test_the_command_gives_the_features_of_the_same_npy_file(tmp_path: Path) -> None:
    for part, rows in (("s_2", slice(0, 3)), ("s_10", slice(3, 7))):
        write_store(tmp_path / part, fields=FIELDS[rows])
    np.save(tmp_path / "fields.npy", FIELDS)
    found = []
    for source, output in ((f"{tmp_path}/s_*", "a.h5"), (f"{tmp_path}/fields.npy", "b.h5")):
        arguments = [source, "--axes", "n t c y x", "--output", f"{tmp_path}/{output}", "--device", "cpu", "--quiet"]
        with pytest.raises(SystemExit) as end:
            extract_main(arguments)
        assert not end.value.code
        with h5py.File(tmp_path / output) as file:
            found.append(file["features/temporal/features"][()])
            if output == "a.h5":
                assert np.allclose(file["parameters/params"][:, 0], 0.25)
    assert np.array_equal(found[0], found[1])


class _Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


def test_a_store_with_pickled_chunks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for key in ("compressor", "filters"):
        store = tmp_path / key
        store.mkdir()
        codec: Any = {"id": "pickle", "protocol": 5}
        metadata = {
            "zarr_format": 2, "shape": [2, 3, 4], "chunks": [2, 3, 4], "dtype": "<f4", "order": "C", "fill_value": 0,
            "compressor": None, "filters": None, key: codec if key == "compressor" else [codec],
        }  # fmt: skip
        (store / ".zarray").write_text(json.dumps(metadata))
        (store / "0.0.0").write_bytes(pickle.dumps(_Evil()))
        with raises_one_line(DataError, str(store), "pickle"):
            read(store, Options(axes="n t x"))
    assert not (tmp_path / "evil").exists()


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr")
    for options, kind, texts in (
        (Options(), ConfigError, ["--axes", "[7, 6, 2, 8, 12]"]),
        (Options(axes="n t c y x", dataset="v"), DataError, ["no array 'v'", "--dataset"]),
        (Options(axes="n t c y x", dataset="run"), DataError, ["no array 'run'"]),
        (Options(axes="n t y x"), ConfigError, ["--axes"]),
    ):
        with raises_one_line(kind, str(path) if kind is DataError else "", *texts):
            read(path, options)
    zarr.open_group(path, mode="a").create_array("v", shape=(2, 3, 4), dtype="f4")
    with raises_one_line(ConfigError, "--dataset", "2 arrays"):
        read(path)
    text = write_store(tmp_path / "text", fields=np.zeros((2, 3, 4), "U3"), chunks=(2, 3, 4))
    with raises_one_line(DataError, str(text), "expected real numbers"):
        read(text, Options(axes="n t x"))
    chunk = next(file for file in (write_store(tmp_path / "torn") / "run" / "u" / "c").rglob("*") if file.is_file())
    chunk.write_bytes(chunk.read_bytes()[:10])
    with raises_one_line(DataError, str(tmp_path / "torn"), "cannot be read as Zarr"):
        read(tmp_path / "torn")
    (tmp_path / "torn" / "zarr.json").write_text("{")
    with raises_one_line(DataError, str(tmp_path / "torn"), "cannot be read as Zarr"):
        read(tmp_path / "torn")
    (tmp_path / "b.zarr.zip").write_bytes(b"PK")
    with raises_one_line(DataError, "b.zarr.zip", "cannot be read as Zarr"):
        read(tmp_path / "b.zarr.zip")
    with raises_one_line(DataError, "is a directory"):
        open_trajectories(str(tmp_path), options=AXES)
    with raises_one_line(DataError, "a.zarr", "is a Zarr store"):
        open_trajectories(str(path), layout="well")


def test_without_zarr_the_extra_is_named(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr")
    code = (
        "import sys; sys.modules['zarr'] = None; from spinlock_fast.extract import main;"
        f"main([{str(path)!r}, '--axes', 'n t c y x', '--output', {str(tmp_path / 'out.h5')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'spinlock-fast[zarr]'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("version", [2, 3])
def test_packed_numbers_of_xarray_are_unpacked(version: int, tmp_path: Path) -> None:
    stored = np.arange(48, dtype=np.int16).reshape(2, 3, 8)
    attributes: dict[str, Any] = {"scale_factor": 0.5, "add_offset": 1.0, "nu": 2.0}
    attributes |= {"_ARRAY_DIMENSIONS": ["n", "t", "x"]} if version == 2 else {"_FillValue": "BQA="}  # 5 in base64
    zarr.create_array(
        tmp_path / "a.zarr",
        data=stored,
        zarr_format=version,
        attributes=attributes,
        fill_value=5 if version == 2 else 0,
    )
    found = open_trajectories(str(tmp_path / "a.zarr"), options=Options(axes="n t x"))
    values = np.concatenate(list(found.read(0, 2)))[:, :, 0]
    expected = np.where(stored == 5, np.nan, stored * 0.5 + 1.0)
    np.testing.assert_array_equal(values.reshape(expected.shape), expected)
    assert list(found.parameters) == ["nu"]
