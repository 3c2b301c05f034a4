"""Resumable states of a run: two are kept, each is checked when it is read."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spinlock_fast.checkpoints.directory import load_torch, save_torch
from spinlock_fast.checkpoints.integrity import (
    MANIFEST,
    RESUME,
    RESUME_BEFORE,
    STATES,
    file_sha256,
    read_manifest,
    write_state_manifest,
)
from spinlock_fast.checkpoints.run_directory import FINAL, PARTIAL, check_integrity, find
from spinlock_fast.config.loading import resolve_aliases
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.data.untrusted import reading
from spinlock_fast.errors import ConfigError, DataError, OutputError
from spinlock_fast.output.atomic_files import sync_directory

log = logging.getLogger(__name__)

# What may differ between a run and the one that resumes it.
_FREE_TO_CHANGE = {
    "dataset_path",
    "data",
    "output_dir",
    "memory_budget",
    "device",
    "logging",
    "training.num_epochs",
    "training.on_divergence",
    "training.save_every",
    "training.save_minutes",
    "training.early_stopping_patience",
    "training.use_torch_compile",
    "training.cuda_graphs",
    "training.data_on_device",
}
# What may differ besides where the run has diverged.
_FREE_AFTER_DIVERGENCE = {
    "training.learning_rate",
    "training.scheduler",
    "training.warmup_epochs",
    "training.weight_decay",
}
_NEXT = f".{RESUME}"  # a state that is whole, but not yet in its place


def write_state(directory: Path, state: Mapping[str, Any]) -> None:
    """Writes resume.pt; the state that was there becomes resume.previous.pt. At any moment one of them is whole.

    Raises:
        OutputError: it cannot be written; the state that was there stays.
    """
    following, path, before = (directory / name for name in (_NEXT, RESUME, RESUME_BEFORE))
    save_torch(following, state)
    # The manifest knows the new state before it has its name, and the old ones until they are gone.
    known = _known_states(directory) or []
    write_state_manifest(directory, [file_sha256(following), *known][:3])
    try:
        if path.exists():
            os.replace(path, before)
        os.replace(following, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None
    sync_directory(directory)


def read_resumable(directory: Path, config: RunConfig) -> dict[str, Any]:
    """The saved state of a run, checked against the settings that want to go on with it.

    A damaged state is passed over, with a warning, for the one before.

    Raises:
        DataError: there is nothing to resume, or nothing that is whole.
        ConfigError: a setting differs that the result depends on.
    """
    paths = [path for name in (*STATES, FINAL) if (path := directory / PARTIAL / name).exists()]
    paths = paths or [path for name in (*STATES, FINAL) if (path := find(directory, name)).exists()]
    if not paths:
        raise DataError(f"{directory}: nothing to resume, neither {RESUME} nor {FINAL} is there")
    for path, before in zip(paths, [*paths[1:], None], strict=True):
        try:
            state = _checked_state(directory, path)
            break
        except DataError as error:
            if before is None:
                raise
            log.warning("%s; going on from the state before, %s", error, before)
    free = _FREE_TO_CHANGE | (_FREE_AFTER_DIVERGENCE if "diverged_at" in state["run"] else set())
    _check_same_settings(state["config"], config, free)
    return state


def _checked_state(directory: Path, path: Path) -> dict[str, Any]:
    if path.name == FINAL and path.parent.name != PARTIAL:
        check_integrity(directory, FINAL)
    elif path.name != FINAL and (known := _known_states(path.parent)) is not None and file_sha256(path) not in known:
        raise DataError(f"{path}: is damaged: its SHA-256 is not in {MANIFEST}")
    state = load_torch(path)
    state = state.get("run_state", {}) if path.name == FINAL else state
    parts = [state.get(name) for name in ("run", "features", "config")] if isinstance(state, Mapping) else [None]
    if not all(isinstance(part, Mapping) for part in parts) or "values" not in state["run"]:
        raise DataError(f"{path}: the saved state is incomplete, or of another version")
    return state


def _known_states(directory: Path) -> list[str] | None:
    """The SHA-256 of the states of a directory; None where no manifest has any."""
    try:
        manifest = read_manifest(directory / MANIFEST)
    except DataError as error:
        log.warning("%s; the states beside it cannot be checked", error)
        return None
    known = (manifest or {}).get("states")
    return [str(value) for value in known] if isinstance(known, list) else None


def _check_same_settings(saved: Mapping[str, Any], config: RunConfig, free_to_change: set[str]) -> None:
    old, new = _flat(resolve_aliases(saved)), _flat(config.model_dump(mode="json"))
    old.setdefault("feature_cleaning.nan_fill", "zero")  # what runs did before there was the setting
    for key in old.keys() | new.keys():
        if old.get(key) != new.get(key) and not any(
            key == free or key.startswith(f"{free}.") for free in free_to_change
        ):
            raise ConfigError(f"{key}: {new.get(key)!r}, but the run to resume was started with {old.get(key)!r}")


def check_same_features(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises DataError where a run that is resumed sees other features; warns where they differ in rounding."""
    with reading({}, "the saved state"):
        same = all(saved[key] == now[key] for key in ("shape", "feature_names", "group_indices"))
        same = same and all(np.allclose(saved[key], now[key], rtol=1e-3, atol=1e-4) for key in ("mean", "std"))
        rounded = saved["fletcher32"] != now["fletcher32"]
    if not same:
        raise DataError("the features are not those of the interrupted run: the data or the encoders have changed")
    if rounded:
        log.warning(
            "features differ in rounding from the interrupted run (another processor, thread count or library?): "
            "the result will not be bit-identical to an unbroken run"
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat
