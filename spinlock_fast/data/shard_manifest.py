"""Manifest of shards: their indexes in one file, so that a run does not open each shard to find its chunks."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from spinlock_fast import _native
from spinlock_fast.data.hdf5_links import ExternalFilePolicy
from spinlock_fast.data.input_files import FileIdentity, identify
from spinlock_fast.data.packing import Packing
from spinlock_fast.data.shard_index import ShardIndex, index_file
from spinlock_fast.output.atomic_files import write_atomically

log = logging.getLogger(__name__)

_FORMAT = 1
_TABLES = {"offsets": np.uint64, "sizes": np.uint64, "masks": np.uint32}  # one number per chunk
_DAMAGE = (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, EOFError, zipfile.BadZipFile)


class ShardManifest:
    """Indexes of shards, read from and written to one file of a directory.

    The file holds for each shard its path, size, modification time, and for each dataset its shape, type and the places
    of its chunks. A shard of another size or modification time is indexed again. Shards with links, virtual or external
    sources are not stored, since other files decide what they hold. It is a NumPy archive without pickled objects:
    JSON, and arrays of chunk offsets, sizes and filter masks.

    Args:
        directory: where the file is stored; None for no file.
        paths: dataset paths.
        files: the shards.
        policy: files from which linked and virtual datasets may take values.
    """

    def __init__(
        self, directory: Path | None, files: Sequence[Path], paths: Sequence[str], policy: ExternalFilePolicy | None
    ) -> None:
        self._paths, self._policy = list(paths), policy
        self._entries: dict[str, dict[str, Any]] = {}
        self._changed = self._filters_checked = False
        self.file: Path | None = None
        if directory is not None:
            allow_external = policy is None or policy.allow_external
            parents = sorted({os.path.abspath(file.parent) for file in files})
            key = json.dumps([sorted(paths), parents, allow_external]).encode()
            self.file = Path(directory) / f"shards-{hashlib.sha256(key).hexdigest()[:16]}.npz"
            self._read(self.file)

    def index(self, file: Path) -> dict[str, ShardIndex]:
        """Indexes of the datasets of a shard, from the manifest if the file has not changed; see `index_file`."""
        if self.file is None:
            return index_file(file, self._paths, self._policy)
        name, identity = os.path.abspath(file), identify(file)
        entry = self._entries.get(name)
        if entry is not None and entry["version"] == [identity.size, identity.mtime_ns]:
            indexes = {path: _restored(file, identity, path, entry["datasets"][path]) for path in self._paths}
            if self._filters_checked or not any(index.h5py_reason for index in indexes.values()):
                return indexes
            self._filters_checked = True  # one file is opened: this machine may lack a filter that h5py needs
            return index_file(file, self._paths, self._policy)
        indexes = index_file(file, self._paths, self._policy)
        self._changed |= self._entries.pop(name, None) is not None
        if not any(index.backing_files or index.swmr or index.virtual_segments for index in indexes.values()):
            version = [indexes[self._paths[0]].identity.size, indexes[self._paths[0]].identity.mtime_ns]
            datasets = {path: _stored(index) for path, index in indexes.items()}
            self._entries[name] = {"version": version, "datasets": datasets}
            self._changed = True
        return indexes

    def save(self) -> None:
        """Replaces the file of the manifest if a shard was indexed; raises OutputError."""
        if self.file is None or not self._changed:
            return
        tables: dict[str, list[NDArray[Any]]] = {name: [] for name in _TABLES}
        entries: dict[str, Any] = {}
        for name, entry in self._entries.items():
            datasets = {}
            for path, stored in entry["datasets"].items():
                layout = dict(stored["layout"] or {})
                if "offsets" in layout:
                    for table, parts in tables.items():
                        parts.append(layout.pop(table))
                    layout["chunks"] = len(tables["offsets"][-1])
                    layout["fill"] = layout["fill"].hex()
                datasets[path] = {**stored, "layout": layout or None}
            entries[name] = {"version": entry["version"], "datasets": datasets}
        text = json.dumps({"versions": _versions(), "shards": entries}).encode()
        arrays = {
            name: np.concatenate(parts) if parts else np.empty(0, _TABLES[name]) for name, parts in tables.items()
        }
        write_atomically(self.file, lambda path: _save(path, {"json": np.frombuffer(text, np.uint8), **arrays}))
        self._changed = False

    def _read(self, file: Path) -> None:
        if not file.exists():
            return
        try:
            with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
                content = json.loads(archive["json"].tobytes())
                if content["versions"] != _versions():
                    log.info("%s: written by another version, indexing the shards again", file)
                    return
                self._entries = _with_tables(content["shards"], {name: archive[name] for name in _TABLES})
        except _DAMAGE as error:
            log.warning("%s: damaged manifest, indexing the shards again (%s)", file, type(error).__name__)
            self._entries = {}


def _save(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    with open(path, "wb") as file:  # np.savez would add a suffix to the name
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _versions() -> dict[str, Any]:
    """What decides how a dataset is read besides its file."""
    return {
        "format": _FORMAT,
        "hdf5": h5py.version.hdf5_version,
        "h5py": h5py.__version__,
        "inflate": _native.inflate_library(),
        "codecs": _native.codec_libraries(),
    }


def _with_tables(shards: dict[str, Any], tables: dict[str, NDArray[Any]]) -> dict[str, dict[str, Any]]:
    """Adds the chunk tables to the entries of a file; raises one of _DAMAGE if they do not fit."""
    if any(tables[name].dtype != dtype or tables[name].ndim != 1 for name, dtype in _TABLES.items()):
        raise ValueError("chunk tables")
    first = 0
    for entry in shards.values():
        for path, stored in entry["datasets"].items():
            layout = stored["layout"]
            if layout is not None and "chunks" in layout:
                count = int(layout.pop("chunks"))
                layout["fill"] = bytes.fromhex(layout["fill"])
                layout["filters"] = [(int(code), [int(v) for v in values]) for code, values in layout["filters"]]
                layout.update({name: table[first : first + count] for name, table in tables.items()})
                first += count
            _restored(Path("."), FileIdentity(0, 0, 0, 0), path, stored)  # raises if an entry is incomplete
    if any(len(table) != first for table in tables.values()):
        raise ValueError("chunk tables")
    return shards


def _stored(index: ShardIndex) -> dict[str, Any]:
    packing = index.packing
    return {
        "shape": list(index.shape),
        "dtype": index.dtype.str,
        "chunk_rows": index.chunk_rows,
        "chunk_bytes": index.chunk_bytes,
        "layout": index.native_layout,
        "h5py_reason": index.h5py_reason,
        "packing": None
        if packing is None
        else [list(packing.missing), packing.scale, packing.offset, packing.unsigned, packing.dtype.str],
        "matlab": index.matlab,
    }


def _restored(file: Path, identity: FileIdentity, path: str, stored: dict[str, Any]) -> ShardIndex:
    packing = stored["packing"]
    shape = tuple(int(size) for size in stored["shape"])
    if not shape or min(shape) < 0 or 0 in shape[1:]:
        raise ValueError("shape")
    return ShardIndex(
        file,
        identity,
        path,
        shape,
        np.dtype(stored["dtype"]),
        int(stored["chunk_rows"]),
        int(stored["chunk_bytes"]),
        stored["layout"],
        str(stored["h5py_reason"]),
        False,
        file,
        identity,
        (),
        None
        if packing is None
        else Packing(tuple(packing[0]), packing[1], packing[2], packing[3], np.dtype(packing[4])),
        bool(stored["matlab"]),
    )
