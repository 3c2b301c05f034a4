"""The same fields in the layouts that people store, written as the documentation of each describes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

SPACING = (0.5, 0.25)  # y, x
STEP = 0.1
CHANNELS = ("u", "v")


def smooth_fields(samples: int = 5, steps: int = 6, channels: int = 2, extents: tuple[int, ...] = (8, 12)) -> Any:
    """Random smooth fields [N, T, C, *space], float32; the same each time."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((samples, steps, channels, *extents))
    for axis in range(3, x.ndim):
        x = (x + np.roll(x, 1, axis) + np.roll(x, -1, axis)) / 3.0
    return np.ascontiguousarray(x.cumsum(1), np.float32)


def write_well(
    path: Path,
    fields: NDArray[Any],
    parameters: Mapping[str, float] | None = None,
    per_sample: Mapping[str, NDArray[Any]] | None = None,
    vector: bool = False,
    periodic: Sequence[str] = ("x", "y"),
    step: float = STEP,
) -> Path:
    """A file of The Well: each channel a scalar field, or both channels one vector field."""
    N, T, _, Y, X = fields.shape
    space = fields.transpose(0, 1, 2, 4, 3)  # x before y
    with h5py.File(path, "w") as file:
        file.attrs.update(
            {"dataset_name": "planted", "grid_type": "cartesian", "n_spatial_dims": 2, "n_trajectories": N}
        )
        file.attrs["simulation_parameters"] = list(parameters or {})
        for name, value in (parameters or {}).items():
            file.attrs[name] = value
        dimensions = file.create_group("dimensions")
        dimensions.attrs["spatial_dims"] = ["x", "y"]
        for name, values in (
            ("time", np.arange(T) * step),
            ("x", np.arange(X) * SPACING[1]),
            ("y", np.arange(Y) * SPACING[0]),
        ):
            dataset = dimensions.create_dataset(name, data=values.astype(np.float32))
            dataset.attrs.update({"sample_varying": False, "time_varying": name == "time"})
        conditions = file.create_group("boundary_conditions")
        for name in ("x", "y"):
            group = conditions.create_group(f"{name}_sides")
            group.attrs.update({"associated_dims": [name], "associated_fields": [], "sample_varying": False})
            group.attrs.update({"bc_type": "PERIODIC" if name in periodic else "WALL", "time_varying": False})
            mask = np.zeros(X if name == "x" else Y, bool)
            mask[[0, -1]] = True
            group.create_dataset("mask", data=mask)
            group.create_dataset("values", data=np.zeros(int(mask.sum())))
        scalars = file.create_group("scalars")
        scalars.attrs["field_names"] = [*(parameters or {}), *(per_sample or {})]
        for name, value in (parameters or {}).items():
            dataset = scalars.create_dataset(name, data=np.float32(value))
            dataset.attrs.update({"sample_varying": False, "time_varying": False})
        for name, values in (per_sample or {}).items():
            dataset = scalars.create_dataset(name, data=values.astype(np.float32))
            dataset.attrs.update({"sample_varying": True, "time_varying": False})
        for order in range(3):
            group = file.create_group(f"t{order}_fields")
            group.attrs["field_names"] = ["velocity"] if vector and order == 1 else []
        if vector:
            _well_field(file["t1_fields"], "velocity", np.moveaxis(space, 2, -1))
        else:
            file["t0_fields"].attrs["field_names"] = list(CHANNELS[: fields.shape[2]])
            for i, name in enumerate(CHANNELS[: fields.shape[2]]):
                _well_field(file["t0_fields"], name, space[:, :, i])
    return path


def _well_field(group: h5py.Group, name: str, values: NDArray[Any], **varying: Any) -> None:
    dataset = group.create_dataset(name, data=values, chunks=(1, *values.shape[1:]), compression="gzip")
    attributes = {"dim_varying": [True, True], "sample_varying": True, "time_varying": True, **varying}
    dataset.attrs.update(attributes)


def write_pdebench_arrays(
    path: Path, fields: NDArray[Any], parameters: Mapping[str, float] | None = None, step: float = STEP
) -> Path:
    """Named variables [N, T, X, Y] with coordinates at the centres of cells; time has one coordinate more."""
    _, T, C, Y, X = fields.shape
    with h5py.File(path, "w") as file:
        file.attrs.update(parameters or {})
        for i in range(C):
            file[CHANNELS[i]] = fields[:, :, i].swapaxes(-1, -2)
        file["x-coordinate"] = (np.arange(X) + 0.5) * SPACING[1]
        file["y-coordinate"] = (np.arange(Y) + 0.5) * SPACING[0]
        file["t-coordinate"] = np.arange(T + 1) * step
    return path


def write_pdebench_groups(
    path: Path, fields: NDArray[Any], parameters: Mapping[str, NDArray[Any]] | None = None, step: float = STEP
) -> Path:
    """A group for each sample, with data [T, X, Y, C], and its parameters as attributes."""
    N, T, _, Y, X = fields.shape
    with h5py.File(path, "w") as file:
        for i in range(N):
            group = file.create_group(f"{i:04d}")
            group.attrs.update({name: values[i] for name, values in (parameters or {}).items()})
            group["data"] = fields[i].transpose(0, 3, 2, 1)
            group["grid/x"] = (np.arange(X) + 0.5) * SPACING[1]
            group["grid/y"] = (np.arange(Y) + 0.5) * SPACING[0]
            group["grid/t"] = np.arange(T) * step
    return path


def write_py_pde(
    path: Path,
    fields: NDArray[Any],
    info: Mapping[str, Any] | None = None,
    periodic: Sequence[str] = ("x", "y"),
    step: float = STEP,
) -> Path:
    """One sample [T, C, Y, X], as `FileStorage` of py-pde 0.59 writes a collection of scalar fields."""
    T, C, Y, X = fields.shape
    bounds = [[0.0, X * SPACING[1]], [0.0, Y * SPACING[0]]]
    wraps = [axis in periodic for axis in ("x", "y")]
    grid = json.dumps({"bounds": bounds, "shape": [X, Y], "periodic": wraps, "class": "CartesianGrid"})
    each = [
        {"class": '"ScalarField"', "grid": grid, "label": json.dumps(CHANNELS[i]), "dtype": '"<f8"'} for i in range(C)
    ]
    attributes = {"class": '"FieldCollection"', "label": "null", "dtype": '"<f8"', "fields": json.dumps(each)}
    with h5py.File(path, "w") as file:
        file["data"] = fields.swapaxes(-1, -2).astype(np.float64)
        file["times"] = np.arange(T) * step
        file.attrs["field_attributes"] = json.dumps(attributes)
        file.attrs["controller"] = json.dumps({"t_start": 0})
        for name, value in (info or {}).items():
            file.attrs[name] = json.dumps(value)
    return path
