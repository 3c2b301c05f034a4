"""The same simulations of six equations in every layout: bit for bit the same features, parameters and metadata."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from equations import EQUATIONS, SAMPLES, STEP, parameters_of, solve, solve_with_py_pde
from numpy.typing import NDArray
from trajectory_files import (
    CHANNELS,
    SPACING,
    write_pdebench_arrays,
    write_pdebench_groups,
    write_py_pde,
    write_well,
)

from spinlock_fast.trajectories.extraction import extract
from spinlock_fast.trajectories.options import Options

DATASETS = ("features/temporal/features", "features/summary/aggregated/features", "parameters/params")
PARAMETERS = ("parameters/params", "features/architecture/aggregated/features")
FAST = ("diffusion", "wave")
every_equation = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in EQUATIONS]
)


class Layouts:
    """The same simulations of an equation in files of every layout."""

    def __init__(self, name: str, directory: Path, fields: NDArray[Any]) -> None:
        self.directory, self.fields, self.parameters = directory, fields, parameters_of(name)
        self.channels = CHANNELS[: fields.shape[2]]
        self.periodic = EQUATIONS[name].periodic
        self.rows = [{key: float(values[i]) for key, values in self.parameters.items()} for i in range(SAMPLES)]
        walls = "".join(self.periodic)
        self.unsaid = {"fields": self.channels, "periodic": walls}
        self.array = {"axes": "n t c y x", "spacing": SPACING[::-1], "time_step": STEP, **self.unsaid}

    def well(self) -> Any:
        """One file, parameters as scalars."""
        path = self.directory / "well.h5"
        return write_well(path, self.fields, None, self.parameters, periodic=self.periodic, step=STEP), {}

    def well_of_each(self) -> Any:
        """One file for each set of parameters."""
        return [
            write_well(self.directory / f"well_{i}.h5", self.fields[i : i + 1], row, periodic=self.periodic, step=STEP)
            for i, row in enumerate(self.rows)
        ], {}

    def pdebench(self) -> Any:
        """Named arrays, one file for each set of parameters."""
        return [
            write_pdebench_arrays(self.directory / f"bench_{i}.h5", self.fields[i : i + 1], row, step=STEP)
            for i, row in enumerate(self.rows)
        ], self.unsaid

    def pdebench_groups(self) -> Any:
        """A group for each simulation."""
        path = self.directory / "groups.h5"
        return write_pdebench_groups(path, self.fields, self.parameters, step=STEP), self.unsaid

    def py_pde(self) -> Any:
        """One file for each simulation, float64."""
        return [
            write_py_pde(self.directory / f"pde_{i}.h5", self.fields[i], row, self.periodic, STEP)
            for i, row in enumerate(self.rows)
        ], {"fields": None}

    def npy(self) -> Any:
        """One array, parameters in a CSV file."""
        np.save(self.directory / "fields.npy", self.fields)
        lines = [",".join(self.parameters), *(",".join(map(repr, row.values())) for row in self.rows)]
        (self.directory / "parameters.csv").write_text("\n".join(lines) + "\n")
        return self.directory / "fields.npy", {**self.array, "parameters": str(self.directory / "parameters.csv")}

    def hdf5_with_table(self) -> Any:
        """One array, parameters in another dataset of the file."""
        with h5py.File(self.directory / "table.h5", "w") as file:
            file["run/u"] = self.fields
            file["run/theta"] = np.stack(list(self.parameters.values()), 1)
            file["run/theta"].attrs["feature_names"] = list(self.parameters)
        return self.directory / "table.h5", {**self.array, "parameters": "run/theta"}

    def hdf5(self) -> Any:
        """One array for each set of parameters, which are attributes; space before channels, Fortran's order."""
        paths = []
        for i, row in enumerate(self.rows):
            paths.append(self.directory / f"array_{i}.h5")
            with h5py.File(paths[-1], "w") as file:
                file["run/u"] = self.fields[i].transpose(0, 3, 2, 1)
                file["run/u"].attrs.update(row)
        return paths, {**self.array, "axes": "t x y c"}

    def zarr(self) -> Any:
        """A Zarr store for each set of parameters."""
        zarr = pytest.importorskip("zarr", reason="the extra zarr is not installed")
        paths = [self.directory / f"{i}.zarr" for i in range(SAMPLES)]
        for i, row in enumerate(self.rows):
            zarr.create_array(paths[i], data=self.fields[i : i + 1], attributes=row)
        return paths, self.array


LAYOUTS = [name for name, method in vars(Layouts).items() if not name.startswith("_") and callable(method)]


def extracted(files: Any, options: dict[str, Any], output: Path) -> dict[str, Any]:
    """The datasets and the metadata of the features of some files."""
    paths = [str(path) for path in files] if isinstance(files, list) else str(files)
    with h5py.File(extract(paths, output, options=Options(**options))) as file:
        found: dict[str, Any] = {name: file[name][()] for name in (*DATASETS, *PARAMETERS) if name in file}
        found |= {name: np.asarray(file.attrs[name]).tolist() for name in ("extents", "spacing", "periodic")}
        found |= {name: file.attrs[name] for name in ("time_step", "channels")}
        found["columns"] = {
            group: list(file[group].attrs["feature_names"])
            for group in ("features/temporal", "features/summary/aggregated", "parameters")
            if group in file
        }
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            assert np.array_equal(found[name], value), name
            assert np.isfinite(value).all()
        else:
            assert np.array_equal(found[name], value) if name == "channels" else found[name] == value, name


@pytest.mark.parametrize("layout", LAYOUTS)
@every_equation
def test_every_layout_of_an_equation_gives_the_same_features(name: str, layout: str, tmp_path: Path) -> None:
    layouts = Layouts(name, tmp_path, solve(name))
    expected = extracted(*layouts.well(), tmp_path / "expected.h5")
    assert np.array_equal(
        expected["parameters/params"], np.stack([values for _, values in sorted(layouts.parameters.items())], 1)
    )
    assert (expected["extents"], expected["spacing"], expected["time_step"]) == ([8, 12], list(SPACING), STEP)
    assert expected["periodic"] == [axis in layouts.periodic for axis in ("y", "x")]
    assert_same(extracted(*getattr(layouts, layout)(), tmp_path / "found.h5"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", EQUATIONS)
def test_files_written_by_py_pde(name: str, tmp_path: Path) -> None:
    pytest.importorskip("pde", reason="py-pde is not installed")
    fields, paths = solve_with_py_pde(name, tmp_path)
    layouts = Layouts(name, tmp_path, fields)
    expected = extracted(*layouts.well(), tmp_path / "expected.h5")
    found = extracted(paths, {}, tmp_path / "found.h5")
    if len(layouts.channels) == 1:
        found["channels"] = expected["channels"]  # py-pde drops the label of a single field
    assert_same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_the_package_of_the_well_reads_the_files(name: str, tmp_path: Path) -> None:
    """In a process of its own: the package sets warnings and threads of its own."""
    pytest.importorskip("the_well", reason="the_well is not installed")
    fields = solve(name)
    Layouts(name, tmp_path, fields).well()
    code = (
        "import sys, numpy as np; from the_well.data import WellDataset;"
        "data = WellDataset(path=sys.argv[1], n_steps_input=2, n_steps_output=1, use_normalization=False);"
        "np.save(sys.argv[2], np.stack([data[i]['input_fields'].numpy() for i in range(len(data))]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(tmp_path / "a.npy")], check=True, env=environment)
    found = np.load(tmp_path / "a.npy")  # [N windows, 2, X, Y, C]
    windows = np.stack([fields[:, i : i + 2] for i in range(fields.shape[1] - 2)], 1).reshape(-1, 2, *fields.shape[2:])
    assert np.array_equal(found.transpose(0, 1, 4, 3, 2), windows)
