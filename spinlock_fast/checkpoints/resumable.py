"""Resumable states of a run: the last two are kept, and checked when they are read."""

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
    PREVIOUS_RESUME,
    RESUME,
    STATES,
    file_sha256,
    read_manifest,
    write_state_manifest,
)
from spinlock_fast.checkpoints.run_directory import FINAL, PARTIAL, check_integrity, find
from spinlock_fast.config.loading import resolve_aliases
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.data.payload_checks import payload_errors
from spinlock_fast.errors import ConfigError, DataError, OutputError
from spinlock_fast.output.atomic_files import sync_directory

log = logging.getLogger(__name__)

# Settings that may change when a run is resumed.
_CHANGEABLE = {
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
    "training.checkpoint_dir",
    "training.init_from",  # the same checkpoint elsewhere, see `check_same_features`
}
# Settings that may change as well after a divergence.
_CHANGEABLE_AFTER_DIVERGENCE = {
    "training.learning_rate",
    "training.scheduler",
    "training.warmup_epochs",
    "training.weight_decay",
}
_NEXT = f".{RESUME}"  # a complete state before it is renamed


def write_state(directory: Path, state: Mapping[str, Any]) -> None:
    """Writes resume.pt and renames the existing one to resume.previous.pt. One of them is complete at any moment.

    Raises:
        OutputError: the state cannot be written; the existing states are kept.
    """
    new, path, previous = (directory / name for name in (_NEXT, RESUME, PREVIOUS_RESUME))
    save_torch(new, state)
    # The manifest lists the new state before it is renamed, and old states until they are replaced.
    known = _known_states(directory) or []
    write_state_manifest(directory, [file_sha256(new), *known][:3])
    try:
        if os.path.exists(path):
            os.replace(path, previous)
        os.replace(new, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None
    sync_directory(directory)


def read_resumable(directory: Path, config: RunConfig) -> dict[str, Any]:
    """The last saved state of a run, if the settings are compatible with it.

    If a state is damaged, the previous one is used, with a warning.

    Raises:
        DataError: there is no state, or none is undamaged.
        ConfigError: a setting that the result depends on differs from that of the run.
    """
    paths = [path for name in (*STATES, FINAL) if os.path.exists(path := directory / PARTIAL / name)]
    paths = paths or [path for name in (*STATES, FINAL) if os.path.exists(path := find(directory, name))]
    if not paths:
        raise DataError(f"{directory}: nothing to resume, neither {RESUME} nor {FINAL} is there")
    for path, previous in zip(paths, [*paths[1:], None], strict=True):
        try:
            state = _checked_state(directory, path)
            break
        except DataError as error:
            if previous is None:
                raise
            log.warning("%s; resuming from the previous state, %s", error, previous)
    diverged = "diverged_at" in state["run"]
    _check_same_settings(state["config"], config, _CHANGEABLE | (_CHANGEABLE_AFTER_DIVERGENCE if diverged else set()))
    return state


def _checked_state(directory: Path, path: Path) -> dict[str, Any]:
    if path.name == FINAL and path.parent.name != PARTIAL:
        check_integrity(directory, FINAL)
    elif path.name != FINAL and (known := _known_states(path.parent)) is not None and file_sha256(path) not in known:
        raise DataError(f"{path}: is damaged: its SHA-256 is not in {MANIFEST}")
    state = load_torch(path)
    state = state.get("run_state", {}) if path.name == FINAL else state
    sections = [state.get(name) for name in ("run", "features", "config")] if isinstance(state, Mapping) else [None]
    if not all(isinstance(section, Mapping) for section in sections) or "values" not in state["run"]:
        raise DataError(f"{path}: the saved state is incomplete, or of another version")
    return state


def _known_states(directory: Path) -> list[str] | None:
    """SHA-256 of the states of a directory by its manifest; None without a list of states."""
    try:
        manifest = read_manifest(directory / MANIFEST)
    except DataError as error:
        log.warning("%s; the states in its directory cannot be checked", error)
        return None
    known = (manifest or {}).get("states")
    return [str(value) for value in known] if isinstance(known, list) else None


def _check_same_settings(saved: Mapping[str, Any], config: RunConfig, changeable: set[str]) -> None:
    """Raises ConfigError for a setting that differs and is not in `changeable`, which lists keys and sections."""
    old, new = _flatten(resolve_aliases(saved)), _flatten(config.model_dump(mode="json"))
    # The behaviour before the settings existed.
    old.setdefault("feature_cleaning.nan_fill", "zero")
    old.setdefault("training.row_order", "auto")
    old.setdefault("training.freeze", "none")
    for key in old.keys() | new.keys():
        if old.get(key) != new.get(key) and not any(
            key == prefix or key.startswith(f"{prefix}.") for prefix in changeable
        ):
            raise ConfigError(f"{key}: {new.get(key)!r}, but the run to resume was started with {old.get(key)!r}")


def check_same_features(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises DataError if the features of a resumed run have changed; warns if they differ by rounding."""
    started_from, given = saved.get("init_from"), now.get("init_from")
    if started_from != given:
        other = "another one" if started_from and given else "the run has one" if started_from else "the run has none"
        raise DataError(f"training.init_from is not the checkpoint that the interrupted run started from: {other}")
    with payload_errors({}, "the saved state"):
        same = all(saved[key] == now[key] for key in ("shape", "feature_names", "group_indices"))
        same = same and all(np.allclose(saved[key], now[key], rtol=1e-3, atol=1e-4) for key in ("mean", "std"))
        identical = saved["fletcher32"] == now["fletcher32"]
    if not same:
        raise DataError("the features are not those of the interrupted run: the data or the encoders have changed")
    if not identical:
        log.warning(
            "features differ in rounding from the interrupted run (another processor, thread count or library?): "
            "the result will not be bit-identical to that of an uninterrupted run"
        )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat
