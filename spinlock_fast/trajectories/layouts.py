"""Recognises the layout of files of trajectories, and opens them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py

from spinlock_fast.data.input_files import fetched, open_file
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.trajectories.arrays import open_array_file
from spinlock_fast.trajectories.given_parameters import read_given_parameters
from spinlock_fast.trajectories.options import Options
from spinlock_fast.trajectories.pdebench import is_pdebench, open_pdebench
from spinlock_fast.trajectories.py_pde import is_py_pde, open_py_pde
from spinlock_fast.trajectories.samples import TrajectorySet
from spinlock_fast.trajectories.the_well import is_well, open_well
from spinlock_fast.trajectories.zarr_arrays import find_stores_and_files, is_zarr, open_zarr_file

LAYOUTS = ("auto", "well", "pdebench", "pypde", "array")
_CALLED = {"well": "The Well", "pdebench": "PDEBench", "pypde": "py-pde", "array": "plain arrays"}
_RECOGNISE: dict[str, Callable[[h5py.File], bool]] = {"well": is_well, "pypde": is_py_pde, "pdebench": is_pdebench}


def open_trajectories(
    paths: str | Sequence[str], layout: str = "auto", options: Options | None = None
) -> TrajectorySet:
    """The samples of files of one layout.

    Args:
        paths: a file, a glob, or a list of those; HDF5 (netCDF-4 included), `.npy` or Zarr.
        layout: one of `LAYOUTS`; "auto" recognises The Well, PDEBench and py-pde, and takes everything else as plain
            arrays.
        options: overrides of the file metadata.

    Raises:
        ConfigError: an impossible setting, or one that is missing.
        DataError: a file is missing, damaged, of another layout, or its samples have another shape than the first.
    """
    options = options or Options()
    if layout not in LAYOUTS:
        raise ConfigError(f"--layout: {layout!r}, expected {', '.join(LAYOUTS)}")
    files = find_stores_and_files(paths)
    for file in files:
        _refuse_classic_netcdf(file)
    kinds = [_layout_of(file) if layout == "auto" else layout for file in files]
    if options.axes is not None and layout == "auto":
        kinds = ["array"] * len(files)
    for file, kind in zip(files, kinds, strict=True):
        if kind != kinds[0]:
            raise DataError(f"{file}: is of layout {_CALLED[kind]}, but {files[0]} of {_CALLED[kinds[0]]}")
        if layout not in ("auto", "array"):
            _check(file, layout)
    openers: dict[str, Callable[..., tuple[Sequence[Any], list[str]]]] = {
        "well": open_well,
        "pdebench": open_pdebench,
        "pypde": open_py_pde,
        "array": _open_arrays,
    }
    found, notes = openers[kinds[0]](files, options)
    given = {}
    if options.parameters is not None:
        given = read_given_parameters(options.parameters, files, [file.samples for file in found])
    return TrajectorySet(_CALLED[kinds[0]], list(found), notes, given)


def _open_arrays(files: Sequence[Path], options: Options) -> tuple[Sequence[Any], list[str]]:
    notes = [] if options.periodic is not None else ["boundaries are taken as periodic (--periodic)"]
    if options.time_step is None or options.spacing is None:
        notes.append("spacing and time step count as 1 where they are not given (--spacing, --time-step)")
    return [(open_zarr_file if is_zarr(file) else open_array_file)(file, options) for file in files], notes


def _refuse_classic_netcdf(path: Path) -> None:
    start = b""
    with suppress(OSError), fetched(path):  # the layout reports a file that cannot be read
        if path.is_file():
            with open(path, "rb") as file:
                start = file.read(3)
    if start == b"CDF":
        raise DataError(f"{path}: in the classic netCDF format; convert it to netCDF-4: nccopy -k nc4 IN.nc OUT.nc")


def _layout_of(path: Path) -> str:
    if path.suffix == ".npy" or is_zarr(path):
        return "array"
    with open_file(path) as file:
        return next((name for name, recognise in _RECOGNISE.items() if recognise(file)), "array")


def _check(path: Path, layout: str) -> None:
    if is_zarr(path):
        raise DataError(f"{path}: is a Zarr store, of which plain arrays are read; expected {_CALLED[layout]} in HDF5")
    with open_file(path) as file:
        if not _RECOGNISE[layout](file):
            raise DataError(f"{path}: is not in the layout of {_CALLED[layout]}")
