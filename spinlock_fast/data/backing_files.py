"""Other files that hold values of a dataset: targets of links, virtual sources and external raw files."""

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

from spinlock_fast.data.hdf5_links import ExternalFilePolicy, LinkTrace, get_dataset, resolve_linked_file
from spinlock_fast.data.input_files import H5PY_ERRORS, FileIdentity, check_regular, identify, open_file
from spinlock_fast.errors import DataError

_Rows = tuple[int, int]
_Parents = tuple[tuple[FileIdentity, str], ...]  # enclosing virtual datasets
_ALL_ROWS: _Rows = (0, 1 << 62)
# libhdf5 reads these two when it is loaded, but HDF5_EXT_PREFIX at each use.
_VIRTUAL_PREFIX = os.environ.get("HDF5_VDS_PREFIX", "")
_RAW_PREFIX = os.environ.get("HDF5_EXTFILE_PREFIX", "")
_MAX_NESTING = 16  # of virtual datasets


@dataclass(frozen=True)
class BackingFile:
    """A file that holds values of rows [first, stop), or a link to them."""

    path: Path
    identity: FileIdentity
    first: int = 0
    stop: int = _ALL_ROWS[1]
    opened_by_hdf5: bool = False  # libhdf5 opens it whenever such a row is read

    def holds(self, low: int, high: int) -> bool:
        """Whether reading rows [low, high) accesses the file."""
        return self.first < high and low < self.stop


def linked_files(trace: LinkTrace) -> list[BackingFile]:
    """The files reached through external links."""
    return [BackingFile(path, identify(path), opened_by_hdf5=True) for path in trace.files]


def sources_of(file: Path, dataset: h5py.Dataset, policy: ExternalFilePolicy) -> list[BackingFile]:
    """Files that hold the values of a virtual or external dataset, including nested ones.

    Args:
        file: the file that stores the dataset.
        dataset: any dataset; others than virtual and external ones have no sources.
        policy: files that are allowed.

    Raises:
        DataError: a source is missing, too short or not allowed; libhdf5 would return fill values instead.
    """
    return list(dict.fromkeys(_collect(file, dataset, policy, _ALL_ROWS, ())))


def descriptor_limit() -> int:
    """Maximal number of open files of this process."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _collect(
    file: Path, dataset: h5py.Dataset, policy: ExternalFilePolicy, rows: _Rows, parents: _Parents
) -> Iterator[BackingFile]:
    if dataset.is_virtual:
        current = (identify(file), dataset.name)
        if current in parents or len(parents) >= _MAX_NESTING:
            raise DataError(f"{file}: {dataset.name}: a virtual dataset must not contain itself")
        yield from _virtual_files(file, dataset, policy, rows, (*parents, current))
    elif dataset.id.get_create_plist().get_external_count() > 0:
        yield from _raw_files(file, dataset, policy, rows)


def _virtual_files(
    file: Path, dataset: h5py.Dataset, policy: ExternalFilePolicy, rows: _Rows, parents: _Parents
) -> Iterator[BackingFile]:
    opened: dict[Path, h5py.File] = {}  # only the last one: mappings of one file are mostly consecutive
    with ExitStack() as stack:
        for mapping in dataset.virtual_sources():
            for block, (name, path) in enumerate(_named_sources(mapping)):
                source = source_file(file, name, dataset, policy)
                if source is None:
                    if block > 0:
                        break  # a series ends at the first missing file
                    raise DataError(
                        f"{file}: {dataset.name}: its virtual source {path} in {name} is missing: no such HDF5 file"
                    )
                if source not in opened:
                    stack.close()
                    opened = {source: stack.enter_context(open_file(source))}
                # Rows of a nested dataset are numbered differently: use those of the outermost dataset.
                source_rows = _rows_of(mapping.vspace, block) if len(parents) == 1 else rows
                if source != file:
                    yield BackingFile(source, identify(source), *source_rows, opened_by_hdf5=True)
                trace = LinkTrace()
                inner = get_dataset(source, opened[source], path, policy, trace)
                _check_size(source, path, inner, mapping)
                for linked in trace.files:
                    yield BackingFile(linked, identify(linked), *source_rows, opened_by_hdf5=True)
                storage_file = trace.files[-1] if trace.files else source
                yield from _collect(storage_file, inner, policy, source_rows, parents)


def source_file(file: Path, name: str, dataset: h5py.Dataset, policy: ExternalFilePolicy) -> Path | None:
    """The file of a source of a virtual dataset by its stored name; None if there is no such HDF5 file."""
    if name == ".":
        return file
    prefix = dataset.id.get_access_plist().get_virtual_prefix()
    return resolve_linked_file(file, os.fsencode(name), _VIRTUAL_PREFIX, prefix, policy)


def _named_sources(mapping: Any) -> Iterator[tuple[str, str]]:
    """File name and dataset path of each source of a mapping; names with `%b` give one source per block."""
    names = (mapping.file_name, mapping.dset_name)
    if not any("%b" in name.replace("%%", "") for name in names):
        yield names[0].replace("%%", "%"), names[1].replace("%%", "%")
        return
    for block in count():
        file_name, path = ("%".join(part.replace("%b", str(block)) for part in name.split("%%")) for name in names)
        yield file_name, path


def _rows_of(space: h5py.h5s.SpaceID, block: int) -> _Rows:
    """The rows of the virtual dataset that a mapping fills."""
    try:
        low, high = space.get_select_bounds()
        return int(low[0]), int(high[0]) + 1
    except H5PY_ERRORS:  # an unlimited selection has no bounds
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
    """Raises DataError if a source is smaller than the region that is mapped."""
    space = mapping.src_space
    try:
        if space.get_select_type() == h5py.h5s.SEL_ALL:
            fits = dataset.size == mapping.vspace.get_select_npoints()
        else:
            fits = all(last < size for last, size in zip(space.get_select_bounds()[1], dataset.shape, strict=True))
    except H5PY_ERRORS:  # unlimited: maps what exists
        return
    if not fits:
        raise DataError(f"{file}: {path}: has shape {dataset.shape}, other than the virtual dataset maps")


def _raw_files(file: Path, dataset: h5py.Dataset, policy: ExternalFilePolicy, rows: _Rows) -> Iterator[BackingFile]:
    plist = dataset.id.get_create_plist()
    remaining = dataset.size * dataset.dtype.itemsize
    for i in range(plist.get_external_count()):
        name, offset, size = plist.get_external(i)
        path = _raw_path(file, name, dataset.id.get_access_plist().get_efile_prefix())
        description = f"{file}: {dataset.name}: its external file {path}"
        policy.check(file, path)
        if not path.exists():
            raise DataError(f"{description} is missing")
        check_regular(path)
        needed = min(remaining, size)
        remaining -= needed
        identity = identify(path)
        if identity.size < offset + needed:
            raise DataError(f"{description} holds {identity.size} bytes, but {offset + needed} are needed")
        yield BackingFile(path, identity, *rows)


def _raw_path(file: Path, name: bytes, prefix: bytes) -> Path:
    """Path of an external raw file as libhdf5 resolves it: relative to the working directory unless a prefix is set."""
    prefix = os.fsencode(_RAW_PREFIX) or prefix or b""
    if prefix.startswith(b"${ORIGIN}"):
        prefix = os.fsencode(Path(os.path.abspath(file)).parent) + prefix.removeprefix(b"${ORIGIN}")
    return Path(os.fsdecode(os.path.join(b"" if prefix == b"." else prefix, name)))
