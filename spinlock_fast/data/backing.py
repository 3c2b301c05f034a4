"""Files that a dataset takes its values from, besides the one that holds it."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import h5py

from spinlock_fast.data.files import H5PY_ERRORS, Identity, check_regular, identify, open_file
from spinlock_fast.data.links import Boundary, Trace, find_named, get_dataset
from spinlock_fast.errors import DataError

_Rows = tuple[int, int]
_Above = tuple[tuple[Identity, str], ...]  # the virtual datasets that lead to one
_ALL_ROWS: _Rows = (0, 1 << 62)
# libhdf5 reads them when it is loaded, unlike HDF5_EXT_PREFIX.
_VIRTUAL_PREFIX = os.environ.get("HDF5_VDS_PREFIX", "")
_RAW_PREFIX = os.environ.get("HDF5_EXTFILE_PREFIX", "")
_MOST_NESTED = 16  # virtual datasets of virtual datasets


@dataclass(frozen=True)
class BackingFile:
    """A file that holds values of some rows, or a link that leads to them."""

    path: Path
    identity: Identity
    first: int = 0
    stop: int = _ALL_ROWS[1]
    opened: bool = False  # by libhdf5 whenever such a row is read

    def holds(self, low: int, high: int) -> bool:
        """Whether reading rows [low, high) involves it."""
        return self.first < high and low < self.stop


def passed_files(trace: Trace) -> list[BackingFile]:
    """The files that links lead through."""
    return [BackingFile(path, identify(path), opened=True) for path in trace.passed]


def sources_of(file: Path, dataset: h5py.Dataset, boundary: Boundary) -> list[BackingFile]:
    """The files that virtual and external datasets read, those of nested ones included.

    Args:
        file: that holds the dataset.

    Raises:
        DataError: one is missing, too short, or out of the boundary: libhdf5 would give fill values in its place.
    """
    return list(dict.fromkeys(_collect(file, dataset, boundary, _ALL_ROWS, ())))


def descriptor_limit() -> int:
    """Files that this process may have open at a time."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _collect(
    file: Path, dataset: h5py.Dataset, boundary: Boundary, rows: _Rows, above: _Above
) -> Iterator[BackingFile]:
    if dataset.is_virtual:
        here = (identify(file), dataset.name)
        if here in above or len(above) >= _MOST_NESTED:
            raise DataError(f"{file}: {dataset.name}: a virtual dataset that takes values from itself")
        yield from _virtual_files(file, dataset, boundary, rows, (*above, here))
    elif dataset.id.get_create_plist().get_external_count() > 0:
        yield from _raw_files(file, dataset, boundary, rows)


def _virtual_files(
    file: Path, dataset: h5py.Dataset, boundary: Boundary, rows: _Rows, above: _Above
) -> Iterator[BackingFile]:
    prefix = dataset.id.get_access_plist().get_virtual_prefix()
    opened: dict[Path, h5py.File] = {}  # the last one: mappings of one file mostly follow each other
    with ExitStack() as stack:
        for mapping in dataset.virtual_sources():
            for block, (name, path) in enumerate(_named_sources(mapping)):
                source = file if name == "." else _find(file, name, prefix, boundary)
                if source is None:
                    if block > 0:
                        break  # a series ends where a file is missing
                    raise DataError(
                        f"{file}: {dataset.name}: its virtual source {path} in {name} is missing: no such HDF5 file"
                    )
                if source not in opened:
                    stack.close()
                    opened = {source: stack.enter_context(open_file(source))}
                # The rows of a nested dataset are counted otherwise: it shares those of the outermost.
                mine = _rows_of(mapping.vspace, block) if len(above) == 1 else rows
                if source != file:
                    yield BackingFile(source, identify(source), *mine, opened=True)
                trace = Trace()
                inner = get_dataset(source, opened[source], path, boundary, trace)
                _check_size(source, path, inner, mapping)
                for passed in trace.passed:
                    yield BackingFile(passed, identify(passed), *mine, opened=True)
                home = trace.passed[-1] if trace.passed else source
                yield from _collect(home, inner, boundary, mine, above)


def _find(file: Path, name: str, prefix: bytes, boundary: Boundary) -> Path | None:
    return find_named(file, os.fsencode(name), _VIRTUAL_PREFIX, prefix, boundary)


def _named_sources(mapping: Any) -> Iterator[tuple[str, str]]:
    """File and dataset of a mapping; a series of them where a name holds a place for the number of a block."""
    names = (mapping.file_name, mapping.dset_name)
    if not any("%b" in name.replace("%%", "") for name in names):
        yield names[0].replace("%%", "%"), names[1].replace("%%", "%")
        return
    for block in count():
        file_name, path = ("%".join(part.replace("%b", str(block)) for part in name.split("%%")) for name in names)
        yield file_name, path


def _rows_of(space: h5py.h5s.SpaceID, block: int) -> _Rows:
    """The rows that a mapping writes to."""
    try:
        low, high = space.get_select_bounds()
        return int(low[0]), int(high[0]) + 1
    except H5PY_ERRORS:  # a selection without end has no bounds
        pass
    try:
        start, stride, number, size = space.get_regular_hyperslab()
    except H5PY_ERRORS:
        return _ALL_ROWS
    if number[0] != h5py.h5s.UNLIMITED:
        return int(start[0]), int(start[0] + (number[0] - 1) * stride[0] + size[0])
    first = int(start[0] + block * stride[0])
    return first, min(first + int(size[0]), _ALL_ROWS[1])


def _check_size(file: Path, path: str, dataset: h5py.Dataset, mapping: Any) -> None:
    """Raises DataError where a source has become smaller than what is mapped of it."""
    space = mapping.src_space
    try:
        if space.get_select_type() == h5py.h5s.SEL_ALL:
            fits = dataset.size == mapping.vspace.get_select_npoints()
        else:
            fits = all(last < size for last, size in zip(space.get_select_bounds()[1], dataset.shape, strict=True))
    except H5PY_ERRORS:  # no bounds: it takes what is there
        return
    if not fits:
        raise DataError(f"{file}: {path}: has shape {dataset.shape}, other than the virtual dataset maps")


def _raw_files(file: Path, dataset: h5py.Dataset, boundary: Boundary, rows: _Rows) -> Iterator[BackingFile]:
    plist = dataset.id.get_create_plist()
    left = dataset.size * dataset.dtype.itemsize
    for i in range(plist.get_external_count()):
        name, offset, size = plist.get_external(i)
        path = _raw_path(file, name, dataset.id.get_access_plist().get_efile_prefix())
        where = f"{file}: {dataset.name}: its external file {path}"
        boundary.check(file, path)
        if not path.exists():
            raise DataError(f"{where} is missing")
        check_regular(path)
        needed = min(left, size)
        left -= needed
        identity = identify(path)
        if identity.size < offset + needed:
            raise DataError(f"{where} holds {identity.size} bytes, but {offset + needed} are needed")
        yield BackingFile(path, identity, *rows)


def _raw_path(file: Path, name: bytes, prefix: bytes) -> Path:
    """As libhdf5 finds it: without a prefix, relative to the working directory."""
    prefix = os.fsencode(_RAW_PREFIX) or prefix or b""
    if prefix.startswith(b"${ORIGIN}"):
        prefix = os.fsencode(Path(os.path.abspath(file)).parent) + prefix.removeprefix(b"${ORIGIN}")
    return Path(os.fsdecode(os.path.join(b"" if prefix == b"." else prefix, name)))
