"""Rows that several ranks compute at the same time, written in order by rank 0.

Ranks other than 0 keep their rows in temporary files beside the output, so memory does not grow with their number.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from spinlock_fast.distributed import Ranks
from spinlock_fast.errors import OutputError
from spinlock_fast.output.atomic_files import create_temporary, is_written_through

WriteBlock = Callable[[NDArray[Any]], None]  # appends rows [B, D]


def write_in_order(
    blocks: Iterable[NDArray[Any]],
    shape: tuple[int, int],
    dtype: np.dtype[Any],
    output: Path,
    write: WriteBlock | None,
    ranks: Ranks,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Passes the blocks of all ranks to `write` of rank 0, in order of the ranks; all of them call this.

    Args:
        blocks: [B, D] consecutive rows of this rank, in blocks of equal size but for the last of all.
        shape: (N, D) of all rows.
        dtype: of the rows in temporary files.
        output: the file that `write` writes; the temporary files are beside it.
        write: appends rows; on rank 0 only.
        progress: called on rank 0 with (rows done, N).

    Raises:
        OutputError: a temporary file cannot be written, or rank 0 does not see it.
    """
    (N, D), done, block_rows = shape, 0, 0
    with ExitStack() as stack:
        part = None if ranks.is_main else stack.enter_context(_temporary(output))
        names = ranks.gather_objects(None if part is None else part.name)[1:]
        for rank, name in enumerate(names if ranks.is_main else (), start=1):
            if not os.path.exists(name):
                raise OutputError(
                    f"{output}: rank 0 does not see the files of rank {rank} there; use a shared directory"
                )
        for block in blocks:
            done, block_rows = done + len(block), max(block_rows, len(block))
            if part is not None:
                _append(part, block.astype(dtype), output)
            elif write is not None:
                write(block)
                if progress is not None:
                    progress(done + sum(_size(name) for name in names) // (D * dtype.itemsize), N)
        block_rows = max(ranks.gather_objects(block_rows))
        if write is not None:
            for name in names:
                for block in _blocks_of(name, block_rows, D, dtype):
                    write(block)
            if progress is not None and names:
                progress(N, N)
        ranks.barrier()  # before the temporary files are removed


@contextmanager
def _temporary(output: Path) -> Iterator[BinaryIO]:
    """A new file beside the output, or in the directory of temporary files if the output is not a regular file."""
    through = is_written_through(output)
    target = Path(tempfile.gettempdir()) / "part" if through else Path(os.path.realpath(output))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        path = create_temporary(target)
    except OSError as error:
        raise _cannot_write(output, error) from None
    try:
        with open(path, "wb") as file:
            yield file
    finally:
        path.unlink(missing_ok=True)


def _append(part: BinaryIO, rows: NDArray[Any], output: Path) -> None:
    try:
        part.write(rows.tobytes())
        part.flush()
    except OSError as error:
        with suppress(OSError):
            part.close()  # it would try to write again
        raise _cannot_write(output, error) from None


def _cannot_write(output: Path, error: OSError) -> OutputError:
    return OutputError(f"{output}: cannot be written: {error.strerror}")


def _size(name: str) -> int:
    with suppress(OSError):
        return os.path.getsize(name)
    return 0


def _blocks_of(name: str, rows: int, width: int, dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    with open(name, "rb") as file:
        while data := file.read(rows * width * dtype.itemsize):
            yield np.frombuffer(data, dtype).reshape(-1, width)
