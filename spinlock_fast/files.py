"""Writing files so that a reader sees the old one or the new one, never half of one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from spinlock_fast.errors import OutputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the name of a temporary file that takes the place of `path` when the block ends well.

    Raises:
        OutputError: the directory cannot be made or the file not written.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {_reason(error)}") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary name, then renames; raises OutputError."""
    with replacing(path) as temporary:
        try:
            write(temporary)
        except RuntimeError as error:  # what torch.save makes of a full disk
            raise OutputError(f"{path}: cannot be written: {_one_line(error)}") from None


def write_text(path: Path, text: str) -> None:
    """A UTF-8 text file."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """An indented JSON file; raises ValueError for NaN or Inf, which JSON does not have."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def check_writable(directory: Path) -> None:
    """Raises OutputError where no file can be made in the directory; leaves nothing behind, not even an empty one."""
    missing: list[Path] = []
    try:
        missing = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise OutputError(f"{directory}: cannot be written: {_reason(error)}") from None
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def _reason(error: OSError) -> str:
    # HDF5 puts a page of detail where others put a phrase.
    return os.strerror(error.errno) if error.errno else _one_line(error)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
