"""manifest.json: SHA-256 of every file of a checkpoint directory, to detect damage."""

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
PREVIOUS_RESUME = "resume.previous.pt"
STATES = (RESUME, PREVIOUS_RESUME)
FORMAT = 1  # of a checkpoint directory; larger numbers are rejected


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(directory: Path) -> None:
    """Writes the manifest of a finished run in the directory where it was built; raises OutputError."""
    files = {
        path.name: {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        for path in sorted(directory.iterdir())
        if path.is_file() and not path.name.startswith(".") and path.name not in (*STATES, MANIFEST)
    }
    write_json(directory / MANIFEST, {"format": FORMAT, "files": files})


def write_state_manifest(directory: Path, states: Sequence[str]) -> None:
    """Writes the manifest of an unfinished run: SHA-256 of its resumable states, newest first."""
    write_json(directory / MANIFEST, {"format": FORMAT, "states": list(states)})


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest; None if there is none, as in directories of earlier versions.

    Raises:
        DataError: it is damaged, or has a later format.
    """
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        log.debug("%s does not exist: files are read without a check of their SHA-256", path)
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is damaged"
        raise DataError(f"{path}: cannot be read: {reason}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise DataError(f"{path}: cannot be read: it is damaged")
    if manifest["format"] > FORMAT:
        raise DataError(
            f"{path}: format {manifest['format']}, but this version reads formats up to {FORMAT}: update spinlock-fast"
        )
    return manifest


def expected_sha256(manifest: dict[str, Any] | None, name: str) -> str | None:
    """SHA-256 of a file by the manifest; None if it has no entry."""
    files = (manifest or {}).get("files")
    entry = files.get(name) if isinstance(files, dict) else None
    digest = entry.get("sha256") if isinstance(entry, dict) else None
    return digest if isinstance(digest, str) else None
