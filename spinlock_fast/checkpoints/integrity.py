"""manifest.json: the SHA-256 of every file of a checkpoint directory, by which damage is noticed."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spinlock_fast.errors import DataError
from spinlock_fast.output.atomic_files import write_json

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
RESUME = "resume.pt"
RESUME_BEFORE = "resume.previous.pt"
STATES = (RESUME, RESUME_BEFORE)
FORMAT = 1  # of a checkpoint directory; a reader refuses a larger one


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(directory: Path) -> None:
    """Writes the manifest of the files of a result, which still lie where it was built; raises OutputError."""
    files = {
        path.name: {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        for path in sorted(directory.iterdir())
        if path.is_file() and not path.name.startswith(".") and path.name not in (*STATES, MANIFEST)
    }
    write_json(directory / MANIFEST, {"format": FORMAT, "files": files})


def write_state_manifest(directory: Path, states: Sequence[str]) -> None:
    """Writes the manifest of an unfinished run: the SHA-256 of its resumable states, newest first."""
    write_json(directory / MANIFEST, {"format": FORMAT, "states": list(states)})


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest, None where there is none, as in directories of earlier versions.

    Raises:
        DataError: it is damaged, or of a later format.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        log.debug("%s is not there: files are read without a check of their SHA-256", path)
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is damaged"
        raise DataError(f"{path}: cannot be read: {reason}") from None
    if not isinstance(found, dict) or not isinstance(found.get("format"), int):
        raise DataError(f"{path}: cannot be read: it is damaged")
    if found["format"] > FORMAT:
        raise DataError(
            f"{path}: format {found['format']}, but this version reads formats up to {FORMAT}: update spinlock-fast"
        )
    return found


def expected_sha256(manifest: dict[str, Any] | None, name: str) -> str | None:
    """What the manifest has of a file; None where it has nothing."""
    files = (manifest or {}).get("files")
    entry = files.get(name) if isinstance(files, dict) else None
    found = entry.get("sha256") if isinstance(entry, dict) else None
    return found if isinstance(found, str) else None
