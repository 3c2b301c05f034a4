"""The matrix of encoded features: in memory, or in a scratch file that all ranks of a run share."""

from __future__ import annotations

import logging
import mmap
import os
import socket
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from spinlock_fast.data.mapped_pages import MappedPages
from spinlock_fast.distributed import SINGLE, Ranks
from spinlock_fast.errors import ConfigError, OutputError
from spinlock_fast.messages import format_bytes
from spinlock_fast.output.atomic_files import create_temporary, remove_stale_temporaries

log = logging.getLogger(__name__)

Storage = Literal["auto", "memory", "disk"]

_REWRITTEN_ROWS = 8192  # a multiple of 1024: blocks of two hosts share no page of 4,096 bytes, whatever the width
_FILE = "features"


def is_kept_on_disk(rows: int, columns: int, storage: Storage, memory_budget: int, ranks: Ranks = SINGLE) -> bool:
    """Whether a float32 matrix [rows, columns] is kept in a file: beyond half of the budget, and with several ranks."""
    if storage == "auto":
        return ranks.size > 1 or 4 * rows * columns > memory_budget // 2
    return storage == "disk" or ranks.size > 1


class FeatureMatrix:
    """A float32 matrix [rows, columns] whose rows are written in blocks and then replaced by narrower ones.

    The file has no name once all ranks have opened it, so that it disappears with the processes, however they end.
    Where ranks run on several hosts it keeps its name until the matrix is no longer used.

    Args:
        rows, columns: shape.
        directory: existing directory of the scratch file, on a file system that all ranks share; None: in memory.
        ranks: the processes that share the file; all must create the matrix.

    Raises:
        OutputError: the file cannot be created, or the disk has no space for it.
        ConfigError: a rank does not see the directory of rank 0.
    """

    x: NDArray[np.float32]
    """[rows, columns]"""

    def __init__(self, rows: int, columns: int, directory: Path | None = None, ranks: Ranks = SINGLE) -> None:
        self.on_disk = directory is not None
        self._rows = rows
        self._ranks = ranks
        self._several_hosts = ranks.local_size != ranks.size
        if directory is None:
            self._buffer = np.empty(rows * columns, np.float32)
            self._set_columns(columns)
            return
        size = 4 * rows * columns
        self._descriptor = self._open(directory, size)
        weakref.finalize(self, os.close, self._descriptor)
        self._set_columns(columns)
        log.info("the encoded features take %s of disk in %s while the command runs", format_bytes(size), directory)

    def _open(self, directory: Path, size: int) -> int:
        """Descriptor of the file, which rank 0 creates; all ranks raise the same error."""
        path, problem = None, ""
        try:
            if self._ranks.is_main:
                try:
                    path = _create_file(directory, size)
                except OSError as error:
                    reason = os.strerror(error.errno or 0)
                    problem = f"{directory}: the encoded features need {format_bytes(size)} of disk: {reason}"
            path, problem = self._ranks.broadcast_object((path, problem))
            if problem:
                raise OutputError(problem)
            descriptor = self._open_on_all_ranks(path)
        except BaseException:
            if self._ranks.is_main and path is not None:
                path.unlink(missing_ok=True)
            raise
        if self._ranks.is_main:
            if self._several_hosts:
                weakref.finalize(self, path.unlink, missing_ok=True)
            else:
                path.unlink()
        return descriptor

    def _open_on_all_ranks(self, path: Path) -> int:
        """Opens the file of rank 0; raises ConfigError on all ranks if one does not find it."""
        descriptor, problem = -1, ""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            problem = f"rank {self._ranks.rank} on {socket.gethostname()} cannot open {path}, which rank 0 has created "
            problem += f"({os.strerror(error.errno or 0)}): all ranks must share the file system of this directory"
        problems = [text for text in self._ranks.gather_objects(problem) if text]
        if problems:
            if descriptor >= 0:
                os.close(descriptor)
            raise ConfigError(problems[0])
        return descriptor

    def _set_columns(self, columns: int) -> None:
        size = self._rows * columns
        if self.on_disk:
            # The descriptor is duplicated by mmap, so the map stays valid when this object is gone.
            self._buffer = np.frombuffer(mmap.mmap(self._descriptor, 4 * size), np.float32)
        self.x = self._buffer[:size].reshape(self._rows, columns)
        self.pages = MappedPages(self.x)

    def write(self, start: int, block: NDArray[np.float32], columns: slice = slice(None)) -> None:
        """Writes a block of rows, or some of their columns."""
        self.x[start : start + len(block), columns] = block
        self.pages.release_if_many()

    def synchronize(self) -> None:
        """Makes the values that any rank has written visible to all ranks."""
        if self.on_disk and self._several_hosts:  # network file systems show changes when a file is mapped again
            with suppress(OSError):
                os.fsync(self._descriptor)
            self._ranks.barrier()
            self._set_columns(self.x.shape[1])
        else:
            self._ranks.barrier()

    def rewrite(self, transform: Callable[[NDArray[np.float32]], NDArray[np.float32]], columns: int) -> None:
        """Replaces all rows in place by transform([B, old columns]) -> [B, columns], not wider than before.

        Rows are packed towards the start of the memory. Every rank transforms a part of the blocks.
        """
        self.synchronize()
        new = self._buffer[: self._rows * columns].reshape(self._rows, columns)
        blocks = -(-self._rows // _REWRITTEN_ROWS)
        for first in range(0, blocks, self._ranks.size):
            start = (first + self._ranks.rank) * _REWRITTEN_ROWS
            block = transform(self.x[start : start + _REWRITTEN_ROWS]) if start < self._rows else None
            self._ranks.barrier()  # all blocks up to here were read, and may be overwritten
            if block is not None:
                new[start : start + len(block)] = block
                self.pages.release_if_many()
        self.pages.release()
        self.synchronize()
        if self.on_disk and self._ranks.is_main:
            os.ftruncate(self._descriptor, 4 * new.size)
        self.synchronize()
        del new
        self._set_columns(columns)

    def to_memory(self) -> None:
        """Copies the matrix from its file to memory."""
        self._buffer = self.x.ravel().copy()
        self.on_disk = False
        self._set_columns(self.x.shape[1])


def _create_file(directory: Path, size: int) -> Path:
    """A file of `size` bytes with reserved disk space: a write to a map that finds no space would end the process."""
    remove_stale_temporaries(directory / _FILE)
    path = create_temporary(directory / _FILE)
    try:
        with open(path, "r+b") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path
