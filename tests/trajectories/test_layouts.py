"""Every layout gives the same samples; what does not fit is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers import raises_one_line
from trajectory_files import (
    CHANNELS,
    SPACING,
    STEP,
    smooth_fields,
    write_pdebench_arrays,
    write_pdebench_groups,
    write_py_pde,
    write_well,
)

from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.trajectories import open_trajectories
from spinlock_fast.trajectories.options import Options
from spinlock_fast.trajectories.samples import TrajectorySet

FIELDS = smooth_fields()
ARRAY = Options(axes="n t c y x", fields=CHANNELS, spacing=SPACING[::-1], time_step=STEP)


def samples_of(found: TrajectorySet) -> Any:
    return np.concatenate(list(found.read(0, found.samples)))


def in_layout(layout: str, directory: Path) -> TrajectorySet:
    path = directory / f"{layout}.h5"
    if layout == "well":
        return open_trajectories(str(write_well(path, FIELDS)))
    if layout == "pdebench":
        return open_trajectories(str(write_pdebench_arrays(path, FIELDS)))
    if layout == "pdebench groups":
        return open_trajectories(str(write_pdebench_groups(path, FIELDS)), options=Options(fields=CHANNELS))
    if layout == "pypde":
        paths = [str(write_py_pde(directory / f"{i}.h5", sample)) for i, sample in enumerate(FIELDS)]
        return open_trajectories(paths)
    if layout == "npy":
        np.save(directory / "fields.npy", FIELDS)
        return open_trajectories(str(directory / "fields.npy"), options=ARRAY)
    with h5py.File(path, "w") as file:
        if layout == "array":
            file["a/fields"] = FIELDS
            return open_trajectories(str(path), options=ARRAY)
        file["fields"] = FIELDS.transpose(1, 0, 3, 4, 2)  # t n y x c: samples are not the first axis
    return open_trajectories(str(path), options=Options(**{**vars(ARRAY), "axes": "t n y x c"}))


@pytest.mark.parametrize("layout", ["well", "pdebench", "pdebench groups", "pypde", "npy", "array", "array by time"])
def test_every_layout_gives_the_same_samples(layout: str, tmp_path: Path) -> None:
    found = in_layout(layout, tmp_path)
    assert found.samples == len(FIELDS)
    assert np.array_equal(samples_of(found).astype(np.float32), FIELDS)
    shape = found.shape
    assert (shape.realizations, shape.steps, shape.channels) == (1, 6, CHANNELS)
    assert shape.grid.extents == (8, 12)
    assert shape.grid.spacing == pytest.approx(SPACING)
    assert shape.grid.periodic == (True, True)
    assert shape.time_step == pytest.approx(STEP)
    part = list(found.read(2, 4))
    assert np.array_equal(np.concatenate(part).astype(np.float32), FIELDS[2:4])


def test_vectors_walls_and_parameters_of_the_well(tmp_path: Path) -> None:
    values = np.arange(5.0)
    path = write_well(tmp_path / "a.h5", FIELDS, {"nu": 0.5}, {"seed": values}, vector=True, periodic=("x",))
    found = open_trajectories(str(path))
    assert found.shape.channels == ("velocity_x", "velocity_y")
    assert found.shape.grid.periodic == (False, True)
    assert np.array_equal(samples_of(found), FIELDS)
    assert {name: column.tolist() for name, column in found.parameters.items()} == {
        "nu": [0.5] * 5,
        "seed": values.tolist(),
    }


def test_fields_of_the_well_that_do_not_vary_everywhere(tmp_path: Path) -> None:
    path = write_well(tmp_path / "a.h5", FIELDS)
    with h5py.File(path, "a") as file:
        group = file["t0_fields"]
        for name, shape, varying in (
            ("along_x", (5, 6, 12), {"dim_varying": [True, False]}),
            ("common", (6, 12, 8), {"sample_varying": False}),
            ("still", (5, 12, 8), {"time_varying": False}),
        ):
            dataset = group.create_dataset(name, data=np.random.default_rng(1).random(shape, np.float32))
            dataset.attrs.update({"dim_varying": [True, True], "sample_varying": True, "time_varying": True, **varying})
        group.attrs["field_names"] = ["u", "v", "along_x", "common", "still"]
        along, common = group["along_x"][()], group["common"][()]
    found = open_trajectories(str(path))
    assert found.shape.channels == ("u", "v", "along_x", "common")
    assert found.notes == ["still does not change in time: left out"]
    values = samples_of(found)
    assert np.array_equal(values[:, :, 2], np.broadcast_to(along[:, :, None], (5, 6, 8, 12)))
    assert np.array_equal(values[:, :, 3], np.broadcast_to(common.swapaxes(1, 2), (5, 6, 8, 12)))
    assert open_trajectories(str(path), options=Options(fields=("common",))).shape.channels == ("common",)


def test_a_symmetric_tensor_has_its_independent_components(tmp_path: Path) -> None:
    path = write_well(tmp_path / "a.h5", FIELDS)
    with h5py.File(path, "a") as file:
        dataset = file["t2_fields"].create_dataset("stress", data=np.zeros((5, 6, 12, 8, 2, 2), np.float32))
        dataset.attrs.update(
            {"dim_varying": [True] * 2, "sample_varying": True, "time_varying": True, "symmetric": True}
        )
        file["t2_fields"].attrs["field_names"] = ["stress"]
    assert open_trajectories(str(path)).shape.channels[2:] == ("stress_x_x", "stress_x_y", "stress_y_y")


def test_parameters_in_file_names_and_attributes(tmp_path: Path) -> None:
    path = write_pdebench_arrays(tmp_path / "2D_Sols_beta0.4_Nu1e-3.hdf5", FIELDS)
    with h5py.File(path, "a") as file:
        file.attrs["rho"] = 2.0
    found = open_trajectories(str(path)).parameters
    assert {name: value[0] for name, value in found.items()} == {"beta": 0.4, "Nu": 1e-3, "rho": 2.0}


def test_parameters_of_py_pde(tmp_path: Path) -> None:
    path = write_py_pde(tmp_path / "a.h5", FIELDS[0], {"diffusivity": 0.3, "name": "heat"})
    assert open_trajectories(str(path)).parameters == {"diffusivity": np.array([0.3])}


def test_one_dimension(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["tensor"] = FIELDS[:, :, 0, 0]
        file["x-coordinate"] = np.arange(12) * 0.1
        file["t-coordinate"] = np.arange(7) * 0.2
    found = open_trajectories(str(tmp_path / "a.h5"))
    assert found.shape.grid.extents == (12,)
    assert np.array_equal(samples_of(found)[:, :, 0], FIELDS[:, :, 0, 0])


def refused(path: Path, *texts: str, kind: type[Exception] = DataError, **settings: Any) -> None:
    layout = settings.pop("layout", "auto")
    with raises_one_line(kind, *texts):
        open_trajectories(str(path), layout, Options(**settings))


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    path = write_well(tmp_path / "a.h5", FIELDS)
    refused(path, "has no field 'w'", "u, v", kind=ConfigError, fields=("w",))
    refused(path, "is not in the layout of PDEBench", layout="pdebench")
    refused(path, "--periodic", "no axis 'z'", kind=ConfigError, periodic="z")
    refused(path, "--spacing", "3 values for 2", kind=ConfigError, spacing=(1.0, 1.0, 1.0))
    refused(tmp_path / "missing.h5", "missing.h5")
    np.save(tmp_path / "b.npy", FIELDS)
    refused(tmp_path / "b.npy", "--axes: required", "[5, 6, 2, 8, 12]", kind=ConfigError)
    refused(tmp_path / "b.npy", "4 axes are named", kind=ConfigError, axes="n t y x")
    refused(tmp_path / "b.npy", "--axes", "'N T Y X'", kind=ConfigError, axes="N T Y X")
    (tmp_path / "c.nc").write_bytes(b"CDF\x01\x00\x00")
    refused(tmp_path / "c.nc", "classic netCDF", "nccopy -k nc4", axes="t x")
    refused(tmp_path / "b.npy", "no space axis", "as the dataset of a family", kind=ConfigError, axes="n t c")
    refused(tmp_path / "b.npy", "--fields: 1 names for 2 channels", kind=ConfigError, axes="n t c y x", fields=("u",))
    np.save(tmp_path / "c.npy", FIELDS.astype(np.complex64))
    refused(tmp_path / "c.npy", "expected real numbers", axes="n t c y x")
    np.save(tmp_path / "d.npy", FIELDS[:, :1])
    refused(tmp_path / "d.npy", "axis t has 1 state", axes="n t c y x")
    (tmp_path / "e.npy").write_bytes(b"\x93NUMPY")
    refused(tmp_path / "e.npy", "cannot be read as .npy", axes="n t c y x")
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["a"], file["b"] = FIELDS, FIELDS
    refused(tmp_path / "f.h5", "--dataset: required", "a, b", kind=ConfigError, axes="n t c y x")
    refused(tmp_path / "f.h5", "no dataset 'q'", dataset="q", axes="n t c y x")


def test_a_time_or_a_grid_that_is_not_uniform_is_refused(tmp_path: Path) -> None:
    path = write_well(tmp_path / "a.h5", FIELDS)
    with h5py.File(path, "a") as file:
        file["dimensions/time"][3] = 9.0
    refused(path, "time is not evenly spaced")
    assert open_trajectories(str(path), options=Options(time_step=0.5)).shape.time_step == 0.5


def test_files_of_different_shapes_are_refused(tmp_path: Path) -> None:
    paths = [str(write_well(tmp_path / "a.h5", FIELDS)), str(write_well(tmp_path / "b.h5", FIELDS[:, :4]))]
    with raises_one_line(DataError, "b.h5", "time steps 4, not 6"):
        open_trajectories(paths)
    paths = [str(write_well(tmp_path / "c.h5", FIELDS, {"nu": 1.0})), str(write_well(tmp_path / "d.h5", FIELDS))]
    with raises_one_line(DataError, "d.h5", "parameter 'nu' is not in every file"):
        open_trajectories(paths)
    with raises_one_line(DataError, "is of layout py-pde, but"):
        open_trajectories([paths[1], str(write_py_pde(tmp_path / "e.h5", FIELDS[0]))])


def test_a_field_whose_shape_is_not_that_of_the_header(tmp_path: Path) -> None:
    path = write_well(tmp_path / "a.h5", FIELDS)
    with h5py.File(path, "a") as file:
        file.attrs["n_trajectories"] = 7
    refused(path, "t0_fields/u has shape [5, 6, 12, 8], expected [7, 6, 12, 8]")


@pytest.mark.parametrize("part", ["dimensions", "t0_fields/u", "dimensions/time", "scalars"])
def test_a_file_of_the_well_with_a_part_missing(part: str, tmp_path: Path) -> None:
    path = write_well(tmp_path / "a.h5", FIELDS)
    with h5py.File(path, "a") as file:
        del file[part]
    if part == "scalars":
        assert open_trajectories(str(path), "well").parameters == {}
    else:
        refused(path, "a.h5", layout="well")


PACKED = {"scale_factor": 0.25, "add_offset": 8.0, "_FillValue": np.int16(-99), "valid_min": np.int16(-90)}


@pytest.mark.parametrize("axes", ["n t c y x", "t n c y x", "n c t y x", "t c y x"])
def test_packed_numbers_are_unpacked_whatever_the_order_of_axes(axes: str, tmp_path: Path) -> None:
    """As netCDF stores them: int16 with a scale, an offset and a fill value."""
    stored = np.round(4.0 * FIELDS).astype(np.int16)
    stored[0, 1, 0, 2, 3] = -99
    expected = (stored * 0.25 + 8.0).astype(np.float32)
    expected[0, 1, 0, 2, 3] = np.nan
    if "n" not in axes:
        stored, expected = stored[0], expected[:1]
    letters = axes.split()
    own = [letter for letter in "ntcyx" if letter in letters]
    with h5py.File(tmp_path / "a.nc", "w") as file:
        file["u"] = stored.transpose([own.index(letter) for letter in letters])
        file["u"].attrs.update({**PACKED, "_Netcdf4Dimid": 0, "nu": 0.5, "missing": np.nan})
    found = open_trajectories(str(tmp_path / "a.nc"), options=Options(axes=axes))
    np.testing.assert_array_equal(samples_of(found).astype(np.float32), expected)
    assert list(found.parameters) == ["nu"]
