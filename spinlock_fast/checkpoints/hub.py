"""Finds the directory of a checkpoint by its name: a local directory, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from spinlock_fast.checkpoints.integrity import MANIFEST, STATES
from spinlock_fast.checkpoints.run_directory import FILES, FINAL, LOGS
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.messages import one_line

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def checkpoint_directory(name: str | Path, **options: Any) -> Path:
    """The directory itself if it exists, else a repository "owner/name", downloaded to the cache of huggingface_hub.

    Args:
        name: directory or repository.
        options: further arguments of `huggingface_hub.snapshot_download`.

    Raises:
        ConfigError: huggingface_hub is not installed.
        DataError: there is neither, or it cannot be downloaded.
    """
    if os.path.isdir(name):
        return Path(name)
    if os.path.lexists(name):
        raise DataError(f"{name}: is not a directory")
    if not isinstance(name, str) or not _REPOSITORY.fullmatch(name):
        raise DataError(
            f'{one_line(name)}: no such directory, and not a repository "owner/name" of the Hugging Face Hub'
        )
    try:
        import huggingface_hub
    except ImportError:
        raise ConfigError(
            f"{name}: no such directory; a repository of the Hugging Face Hub needs: pip install 'spinlock-fast[hub]'"
        ) from None
    needed = [file for file in (*FILES, MANIFEST) if file not in (*STATES, FINAL, *LOGS)]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=needed, **options))
    except (OSError, ValueError, RuntimeError, getattr(huggingface_hub.errors, "HTTPError", OSError)) as error:
        reason = one_line(error, 200) or type(error).__name__
        raise DataError(f"{name}: no such directory, and not available from the Hugging Face Hub: {reason}") from None
