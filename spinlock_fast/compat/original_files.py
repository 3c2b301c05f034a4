"""Reads model files and settings of the original project without executing code from them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from spinlock_fast.checkpoints.directory import load_restricted
from spinlock_fast.config.loading import BoundedLoader, parse_yaml, read_text_file
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.messages import one_line

_DTYPES = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64", "U1"]


class _NormalizationStats:
    """Replaces `spinlock.encoding.normalization.NormalizationStats` in unpickling."""

    mean: Any
    std: Any


def _join_path(*parts: str) -> str:
    """Replaces the classes of `pathlib` in unpickling: paths are read as text."""
    return "/".join(parts)


def _safe_globals() -> list[Any]:
    """The types that a model file may contain, for `torch.serialization.safe_globals`."""
    from numpy._core import multiarray

    allowed: list[Any] = [
        np.ndarray,
        np.dtype,
        (_NormalizationStats, "spinlock.encoding.normalization.NormalizationStats"),
    ]
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
        allowed += [(multiarray._reconstruct, f"{module}._reconstruct"), (multiarray.scalar, f"{module}.scalar")]
    for module in ("pathlib", "pathlib._local"):
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"):
            allowed.append((_join_path, f"{module}.{name}"))
    return allowed + [type(np.dtype(dtype)) for dtype in _DTYPES]


def read_original(path: Path) -> dict[str, Any]:
    """The contents of a model file of the original project.

    Accepts tensors, numpy arrays, paths (as text) and normalization statistics; refuses every other type.

    Raises:
        DataError: the file is missing or damaged, or contains a type that is not accepted.
    """
    try:
        with torch.serialization.safe_globals(_safe_globals()):
            payload = load_restricted(path)
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().splitlines()[0]
        raise DataError(f"{path}: refused: {reason}") from None
    if "model_state_dict" not in payload:
        raise DataError(f"{path}: no model_state_dict: not a checkpoint of the original project")
    return payload


class _PathTagLoader(BoundedLoader):
    """YAML loader that reads tags of `pathlib` objects as text."""


def _construct_path(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> str:
    if not isinstance(node, yaml.SequenceNode):
        raise yaml.constructor.ConstructorError(None, None, f"unexpected {suffix}", node.start_mark)
    return _join_path(*map(str, loader.construct_sequence(node)))


_PathTagLoader.add_multi_constructor("tag:yaml.org,2002:python/object/apply:pathlib.", _construct_path)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a config.yaml of the original project; empty if there is no such file. Raises DataError."""
    try:
        value = parse_yaml(read_text_file(path), _PathTagLoader) if os.path.exists(path) else {}
    except (OSError, ConfigError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read: {one_line(error, 200)}") from None
    return value if isinstance(value, dict) else {}
