"""Plain arrays of Zarr stores: directories, and `.zarr.zip` files."""

from __future__ import annotations

import base64
import glob
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spinlock_fast.data.input_files import find_files
from spinlock_fast.data.natural_sort import natural_sort_key
from spinlock_fast.data.packing import Packing, read_packing
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.messages import one_line
from spinlock_fast.trajectories.arrays import ArrayFile, array_file
from spinlock_fast.trajectories.options import Options
from spinlock_fast.trajectories.samples import parameters_among

_MARKERS = ("zarr.json", ".zarray", ".zgroup")
# Of zarr and of codecs, for damaged stores.
_ERRORS = (
    OSError, ValueError, TypeError, LookupError, RuntimeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


class ZarrFile(ArrayFile):
    """The samples of an array of a Zarr store; see `ArrayFile`."""

    def read(self, start: int) -> Iterator[NDArray[np.floating]]:
        """Samples from number `start` on; each chunk is decoded once where the memory suffices."""
        letters = list(self.letters)
        with open_store(self.path) as root:
            array = root if self.dataset is None else root[self.dataset]
            if "n" not in letters:
                yield self._arranged(self._values(array, (), 0), letters)
                return
            axis = letters.index("n")
            row_bytes = array.dtype.itemsize * int(np.prod(array.shape)) // max(array.shape[axis], 1)
            at_once = max(1, min(array.chunks[axis], self.memory_budget // max(row_bytes, 1)))
            while start < self.samples:
                stop = min(start - start % at_once + at_once, self.samples)
                block = self._values(array, (slice(None),) * axis + (slice(start, stop),), start)
                for i in range(stop - start):
                    yield self._arranged(np.take(block, i, axis), letters)
                start = stop

    def _values(self, array: Any, place: tuple[slice, ...], sample: int) -> NDArray[Any]:
        with reporting(self.path, f"{array.path or 'array'}: from sample {sample}: "):
            stored, packing = np.asarray(array[place or ...]), zarr_packing(array, self.path)
            return stored if packing is None else packing(stored)


def is_zarr(path: str | Path) -> bool:
    """Whether a path is a Zarr store."""
    if os.path.isdir(path):
        return any(os.path.isfile(os.path.join(path, name)) for name in _MARKERS)
    return str(path).lower().endswith(".zarr.zip") and os.path.isfile(path)


def find_stores_and_files(paths: str | Sequence[str]) -> list[Path]:
    """`find_files`, where directories that are Zarr stores count as files."""
    found: list[Path] = []
    for pattern in [paths] if isinstance(paths, str) else paths:
        matches = [pattern] if is_zarr(pattern) else sorted(glob.glob(pattern), key=natural_sort_key)
        stores = [Path(match) for match in matches if is_zarr(match)]
        found += stores if stores and len(stores) == len(matches) else find_files(pattern, of_generate=False)
    if not found:
        find_files(paths, of_generate=False)  # raises
    return found


def open_zarr_file(path: Path, options: Options) -> ArrayFile:
    """The samples of an array of a Zarr store; attributes that are single numbers are parameters.

    Raises:
        ConfigError: zarr is not installed, or the axes or the dataset are not named.
        DataError: there is no such array, or it is stored with a codec that runs code.
    """
    with open_store(path) as root, reporting(path):
        dataset, array = None, root
        if not hasattr(root, "shape"):
            dataset = options.dataset or _only_array(path, root)
            array = root.get(dataset)
            if array is None or not hasattr(array, "shape"):
                raise DataError(f"{path}: no array {dataset!r}; --dataset names the array of the fields")
        name = dataset or "array"
        if _names_pickle(array.metadata.to_dict()):
            raise DataError(f"{path}: {name}: stored with the codec pickle, which could run any code")
        if array.dtype.kind not in "fiub":
            raise DataError(f"{path}: {name}: expected real numbers, got {array.dtype}")
        attributes = {**root.attrs.asdict(), **array.attrs.asdict()}
        shape = tuple(array.shape)
    return array_file(ZarrFile, path, dataset, shape, parameters_among(attributes), options)


def zarr_packing(array: Any, path: Path) -> Packing | None:
    """The packing of an array that xarray wrote (CF conventions); see `read_packing`.

    xarray stores `_FillValue` as base64 in Zarr 3, and as the fill value of the array in Zarr 2.
    """
    attributes = array.attrs.asdict()
    dtype = np.dtype(array.dtype)
    if isinstance(fill := attributes.get("_FillValue"), str):
        with suppress(ValueError):
            attributes["_FillValue"] = np.frombuffer(base64.b64decode(fill, validate=True), dtype.newbyteorder("<"))
    elif "_ARRAY_DIMENSIONS" in attributes and array.fill_value is not None:
        attributes["_FillValue"] = array.fill_value
    file = SimpleNamespace(attrs={}, filename=str(path))
    return read_packing(
        SimpleNamespace(attrs=attributes, dtype=dtype, file=file, name=array.path or "array", fillvalue=None)
    )


def store_state(path: Path) -> tuple[int, int]:
    """Bytes, and time of the last change in nanoseconds, of a file or of all files in a store."""
    files = (
        [path] if not os.path.isdir(path) else [Path(top, name) for top, _, names in os.walk(path) for name in names]
    )
    states = [file.stat() for file in files]
    return sum(state.st_size for state in states), max((state.st_mtime_ns for state in states), default=0)


@contextmanager
def open_store(path: Path) -> Iterator[Any]:
    """The root of a store, an array or a group; raises ConfigError without zarr, DataError for damage."""
    zarr = _zarr(path)
    with reporting(path):
        store = zarr.storage.ZipStore(path, mode="r") if not os.path.isdir(path) else zarr.storage.LocalStore(path)
        root = zarr.open(store, mode="r")
    try:
        yield root
    finally:
        store.close()


@contextmanager
def reporting(path: Path, place: str = "") -> Iterator[None]:
    """Converts errors of zarr and of its codecs to a DataError that names the store."""
    try:
        yield
    except (ConfigError, DataError):
        raise
    except _ERRORS as error:
        raise DataError(f"{path}: {place}cannot be read as Zarr: {one_line(error, 200)}") from None


def _zarr(path: Path) -> ModuleType:
    try:
        import zarr
        import zarr.storage
    except ImportError:
        raise ConfigError(f"{path}: Zarr stores need zarr 3: pip install 'spinlock-fast[zarr]'") from None
    return zarr  # type: ignore[no-any-return, unused-ignore]


def _only_array(path: Path, root: Any) -> str:
    found = [name for name, node in root.members(max_depth=None) if hasattr(node, "shape") and len(node.shape) >= 3]
    if len(found) != 1:
        names = ", ".join(found[:5]) or "none"
        raise ConfigError(f"--dataset: required, {path} has {len(found)} arrays with three or more axes ({names})")
    return str(found[0])


def _names_pickle(metadata: Any) -> bool:
    """Whether a codec of the metadata is numcodecs.Pickle, the only one of its codecs that runs code when reading."""
    if isinstance(metadata, Mapping):
        return any(_names_pickle(value) for key, value in metadata.items() if key != "attributes")
    if isinstance(metadata, (list, tuple)):
        return any(_names_pickle(value) for value in metadata)
    if hasattr(metadata, "get_config"):
        return _names_pickle(metadata.get_config())
    if hasattr(metadata, "to_dict"):
        return _names_pickle(metadata.to_dict())
    return isinstance(metadata, str) and "pickle" in metadata.lower()
