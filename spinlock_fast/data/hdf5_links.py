"""Resolution of soft and external HDF5 links to the file that stores a dataset."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py

from spinlock_fast.data.input_files import H5PY_ERRORS, check_regular, open_file, reporting_damage
from spinlock_fast.errors import DataError
from spinlock_fast.messages import one_line

_MAX_LINKS = 16  # limit of libhdf5


@dataclass
class ExternalFilePolicy:
    """Which other files a data set may take values from.

    Args:
        allow_external: False rejects files outside the directory of the file that refers to them.
    """

    allow_external: bool = True

    def check(self, file: Path, target: Path) -> None:
        """Raises DataError if `file` must not take values from `target`."""
        if self.allow_external:
            return
        directory = Path(os.path.realpath(file)).parent
        if not Path(os.path.realpath(target)).is_relative_to(directory):
            raise DataError(
                f"{file}: takes values from {target}, outside its directory, which allow_external=False forbids"
            )


@dataclass
class LinkTrace:
    """Files reached through external links of a path, in order; the last one stores the dataset."""

    files: list[Path] = field(default_factory=list)


def get_dataset(
    file: Path, handle: h5py.File, path: str, policy: ExternalFilePolicy | None = None, trace: LinkTrace | None = None
) -> h5py.Dataset:
    """Like `find_dataset`, but raises DataError with the most similar path if there is no dataset."""
    dataset = find_dataset(file, handle, path, policy, trace)
    if dataset is None:
        raise _no_dataset(file, handle, path)
    return dataset


def find_dataset(
    file: Path, handle: h5py.File, path: str, policy: ExternalFilePolicy | None = None, trace: LinkTrace | None = None
) -> h5py.Dataset | None:
    """Opens a dataset by its path, following links; None if the path does not exist.

    Args:
        file: path of the open file, for error messages and relative links.
        handle: the open file.
        path: dataset path within the file.
        policy: files that links may refer to.
        trace: receives the files of external links.

    Raises:
        DataError: the path is a group, or a link is broken, refers to a file that is not HDF5, or violates the policy.
    """
    trace = trace if trace is not None else LinkTrace()
    shown = f"{file}: {path}"
    with ExitStack() as stack:
        _walk(_LinkWalk(shown, policy or ExternalFilePolicy(), trace, stack), file, handle["/"], path)
        try:
            node = handle[path]
        except H5PY_ERRORS as error:
            if trace.files:
                raise DataError(f"{shown}: {one_line(error)} (behind a link to {trace.files[-1]})") from None
            if path in _dataset_names(file, handle, path):
                raise
            return None
        if not isinstance(node, h5py.Dataset):
            raise DataError(f"{shown} is a {'group' if isinstance(node, h5py.Group) else 'type'}, not a dataset")
        storage_file = trace.files[-1] if trace.files else file
        if not _same_file(node.file, storage_file):
            raise DataError(
                f"{shown}: leads to {node.file.filename}, where {storage_file} was expected: the links are ambiguous"
            )
    return node


@dataclass
class _LinkWalk:
    shown: str
    policy: ExternalFilePolicy
    trace: LinkTrace
    stack: ExitStack
    links: int = 0


def _walk(walk: _LinkWalk, file: Path, group: Any, path: str) -> None:
    """Follows a path component by component; raises DataError at a broken link."""
    if path.startswith("/"):
        group = group.file["/"]
    parts = [part for part in path.split("/") if part not in ("", ".")]
    for i, part in enumerate(parts):
        try:
            link = group.get(part, getlink=True) if isinstance(group, h5py.Group) else None
        except H5PY_ERRORS:
            return  # libhdf5 reports the error when the path is opened; h5py does not support all kinds of links
        if isinstance(link, (h5py.SoftLink, h5py.ExternalLink)):
            _follow(walk, file, group, link, "/".join(parts[i + 1 :]))
            return
        if link is None:
            return
        try:
            group = group[part]
        except H5PY_ERRORS:
            return


def _follow(walk: _LinkWalk, file: Path, group: h5py.Group, link: h5py.SoftLink | h5py.ExternalLink, rest: str) -> None:
    """Follows a link and then the path `rest`; raises DataError if the target does not exist."""
    walk.links += 1
    if walk.links > _MAX_LINKS:
        raise DataError(f"{walk.shown}: its links form a cycle or a chain of more than {_MAX_LINKS}")
    target = link.path
    if isinstance(link, h5py.ExternalLink):
        target += f" in {link.filename}"
        linked_file = resolve_linked_file(
            file, os.fsencode(link.filename), os.environ.get("HDF5_EXT_PREFIX", ""), policy=walk.policy
        )
        if linked_file is None:
            raise DataError(f"{walk.shown}: is a link to {target}: no such HDF5 file")
        walk.trace.files.append(linked_file)
        file, group = linked_file, walk.stack.enter_context(open_file(linked_file))["/"]
    before = len(walk.trace.files)
    _walk(walk, file, group, f"{link.path}/{rest}" if rest else link.path)
    if len(walk.trace.files) == before:  # else libhdf5 would open further files
        try:
            group[link.path]
        except KeyError:
            raise DataError(f"{walk.shown}: is a link to {target}, where no such object exists") from None
        except H5PY_ERRORS:
            return


def resolve_linked_file(
    file: Path, name: bytes, search_path: str, prefix: bytes = b"", policy: ExternalFilePolicy | None = None
) -> Path | None:
    """Finds the file that libhdf5 opens for a file name stored in another file; None if there is none.

    Args:
        file: the file that contains the name.
        name: the stored name.
        search_path: directories to search first, separated as in an environment variable.
        prefix: directory of the access properties, searched next.
        policy: files that are allowed.

    Raises:
        DataError: the policy rejects the file, or it is not a regular file.
    """
    for candidate in _candidates(file, name, search_path, prefix):
        if candidate.exists():
            if policy is not None:
                policy.check(file, candidate)
            check_regular(candidate)
            if h5py.is_hdf5(candidate):
                return candidate
    return None


def _candidates(file: Path, name: bytes, search_path: str, prefix: bytes) -> Iterator[Path]:
    """Candidate paths in the search order of libhdf5 (H5F_prefix_open_file)."""
    file_name = os.fsdecode(name)
    if os.path.isabs(file_name):
        yield Path(file_name)
        file_name = os.path.basename(file_name)
    for directory in search_path.split(os.pathsep):
        if directory:
            yield Path(directory, file_name)
    if prefix:
        yield Path(os.fsdecode(prefix), file_name)
    yield Path(os.path.abspath(file)).parent / file_name
    yield Path(file_name)
    yield Path(os.path.realpath(file)).parent / file_name


def _same_file(handle: h5py.File, file: Path) -> bool:
    if handle.driver != "sec2":  # no single file descriptor
        return True
    return os.path.samestat(os.fstat(handle.id.get_vfd_handle()), os.stat(file))


def _dataset_names(file: Path, handle: h5py.File, path: str) -> list[str]:
    names: list[str] = []
    with reporting_damage(file, path):
        handle.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return names


def _no_dataset(file: Path, handle: h5py.File, path: str) -> DataError:
    names = _dataset_names(file, handle, path)
    close = difflib.get_close_matches(path, names, 1, cutoff=0.4)
    listed = ", ".join(names[:6])
    hint = f"; nearest is {close[0]}" if close else f"; it holds {listed or 'no dataset'}"
    return DataError(f"{file}: no dataset {path}{hint}")
