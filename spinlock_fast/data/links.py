"""Where a path in a file leads: through soft and external links, to the file that holds the dataset."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py

from spinlock_fast.data.files import H5PY_ERRORS, check_regular, identify, naming_damage, one_line, open_file
from spinlock_fast.errors import DataError

_MOST_LINKS = 16  # as libhdf5 follows at most


@dataclass
class Boundary:
    """Which files a data set may take values from.

    Args:
        external: False refuses files outside the directory of the file that names them.
    """

    external: bool = True

    def check(self, file: Path, named: Path) -> None:
        """Raises DataError where `file` must not take values from `named`."""
        if self.external:
            return
        home = Path(os.path.realpath(file)).parent
        if not Path(os.path.realpath(named)).is_relative_to(home):
            raise DataError(
                f"{file}: takes values from {named}, outside of its directory: refused, since allow_external is false"
            )


@dataclass
class Trace:
    """Files that a path leads through, in order, without the first; the last one holds the dataset."""

    passed: list[Path] = field(default_factory=list)


def get_dataset(
    file: Path, handle: h5py.File, path: str, boundary: Boundary | None = None, trace: Trace | None = None
) -> h5py.Dataset:
    """A dataset by its path, as `find_dataset`; raises DataError that names the nearest one where there is none."""
    dataset = find_dataset(file, handle, path, boundary, trace)
    if dataset is None:
        raise _no_dataset(file, handle, path)
    return dataset


def find_dataset(
    file: Path, handle: h5py.File, path: str, boundary: Boundary | None = None, trace: Trace | None = None
) -> h5py.Dataset | None:
    """A dataset by its path, through any links; None where there is nothing, not even a link.

    Args:
        boundary: what links may lead to.
        trace: is filled with the files of external links.

    Raises:
        DataError: it is a group, or a link leads nowhere, to something else than an HDF5 file, or out of the boundary.
    """
    trace = trace if trace is not None else Trace()
    shown = f"{file}: {path}"
    with ExitStack() as stack:
        _walk(_Walk(shown, boundary or Boundary(), trace, stack), file, handle["/"], path)
        try:
            node = handle[path]
        except H5PY_ERRORS as error:
            if trace.passed:
                raise DataError(f"{shown}: {one_line(error)} (behind a link to {trace.passed[-1]})") from None
            if path in _dataset_names(file, handle, path):
                raise
            return None
        if not isinstance(node, h5py.Dataset):
            raise DataError(f"{shown} is a {'group' if isinstance(node, h5py.Group) else 'type'}, not a dataset")
        home = trace.passed[-1] if trace.passed else file
        if not _same_file(node.file, home):
            raise DataError(
                f"{shown}: leads to {node.file.filename}, where {home} was expected: the links are ambiguous"
            )
    return node


@dataclass
class _Walk:
    shown: str
    boundary: Boundary
    trace: Trace
    stack: ExitStack
    links: int = 0


def _walk(walk: _Walk, file: Path, group: Any, path: str) -> None:
    """Follows a path component by component; raises DataError at a link that leads nowhere."""
    if path.startswith("/"):
        group = group.file["/"]
    parts = [part for part in path.split("/") if part not in ("", ".")]
    for i, part in enumerate(parts):
        try:
            link = group.get(part, getlink=True) if isinstance(group, h5py.Group) else None
        except H5PY_ERRORS:
            return  # libhdf5 says it better, and knows kinds of links that h5py does not
        if isinstance(link, (h5py.SoftLink, h5py.ExternalLink)):
            _follow(walk, file, group, link, "/".join(parts[i + 1 :]))
            return
        if link is None:
            return
        try:
            group = group[part]
        except H5PY_ERRORS:
            return


def _follow(walk: _Walk, file: Path, group: h5py.Group, link: h5py.SoftLink | h5py.ExternalLink, rest: str) -> None:
    """Goes on with `rest` where a link leads to; raises DataError where that does not exist."""
    walk.links += 1
    if walk.links > _MOST_LINKS:
        raise DataError(f"{walk.shown}: its links lead in a circle, or through more than {_MOST_LINKS} others")
    where = link.path
    if isinstance(link, h5py.ExternalLink):
        where += f" in {link.filename}"
        found = find_named(
            file, os.fsencode(link.filename), os.environ.get("HDF5_EXT_PREFIX", ""), boundary=walk.boundary
        )
        if found is None:
            raise DataError(f"{walk.shown}: is a link to {where}: no such HDF5 file")
        walk.trace.passed.append(found)
        file, group = found, walk.stack.enter_context(open_file(found))["/"]
    before = len(walk.trace.passed)
    _walk(walk, file, group, f"{link.path}/{rest}" if rest else link.path)
    if len(walk.trace.passed) == before:  # otherwise libhdf5 would open further files
        try:
            group[link.path]
        except KeyError:
            raise DataError(f"{walk.shown}: is a link to {where}, where no such object exists") from None
        except H5PY_ERRORS:
            return


def find_named(
    file: Path, name: bytes, searched: str, prefix: bytes = b"", boundary: Boundary | None = None
) -> Path | None:
    """The file that libhdf5 finds under a name stored in another file; None where there is none.

    Args:
        file: the one that names it.
        searched: directories that are searched first, as an environment variable lists them.
        prefix: a directory of the access properties, searched next.
        boundary: what it may be.

    Raises:
        DataError: it is outside of the boundary, or not a regular file.
    """
    for candidate in _candidates(file, name, searched, prefix):
        if candidate.exists():
            if boundary is not None:
                boundary.check(file, candidate)
            check_regular(candidate)
            if h5py.is_hdf5(candidate):
                return candidate
    return None


def _candidates(file: Path, name: bytes, searched: str, prefix: bytes) -> Iterator[Path]:
    """In the order of libhdf5 (H5F_prefix_open_file)."""
    text = os.fsdecode(name)
    if os.path.isabs(text):
        yield Path(text)
        text = os.path.basename(text)
    for directory in searched.split(os.pathsep):
        if directory:
            yield Path(directory, text)
    if prefix:
        yield Path(os.fsdecode(prefix), text)
    yield Path(os.path.abspath(file)).parent / text
    yield Path(text)
    yield Path(os.path.realpath(file)).parent / text


def _same_file(handle: h5py.File, file: Path) -> bool:
    if handle.driver != "sec2":  # it has several descriptors, or none
        return True
    opened, named = identify(int(handle.id.get_vfd_handle())), identify(file)
    return (opened.device, opened.inode) == (named.device, named.inode)


def _dataset_names(file: Path, handle: h5py.File, path: str) -> list[str]:
    names: list[str] = []
    with naming_damage(file, path):
        handle.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return names


def _no_dataset(file: Path, handle: h5py.File, path: str) -> DataError:
    names = _dataset_names(file, handle, path)
    close = difflib.get_close_matches(path, names, 1, cutoff=0.4)
    listed = ", ".join(names[:6])
    hint = f"; nearest is {close[0]}" if close else f"; it holds {listed or 'no dataset'}"
    return DataError(f"{file}: no dataset {path}{hint}")
