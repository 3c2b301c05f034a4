"""Reads state dicts of other projects: file formats, key names, and messages for missing keys."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from spinlock_fast.checkpoints.directory import load_restricted
from spinlock_fast.checkpoints.run_directory import BEST, FINAL, SAFETENSORS, check_integrity, find
from spinlock_fast.compat.original_files import read_original
from spinlock_fast.errors import DataError
from spinlock_fast.messages import one_line

Format = Literal["encodec", "mimi", "dac", "taming", "diffusers", "spinlock"]

# Key names of the original releases -> those of `transformers`, which this module uses.
_RENAMED_KEYS = (
    (r"rvq_first\.vq\.", "semantic_residual_vector_quantizer."),
    (r"rvq_rest\.vq\.", "acoustic_residual_vector_quantizer."),
    (r"rvq_first\.", "semantic_residual_vector_quantizer."),
    (r"rvq_rest\.", "acoustic_residual_vector_quantizer."),
    (r"(layers\.\d+)\._codebook\.", r"\1.codebook."),
    (r"\bquantizer\.vq\.layers\.", "quantizer.layers."),
    (r"\bcodebook\.embedding_sum$", "codebook.embed_sum"),
    (r"\bcodebook\._initialized$", "codebook.initialized"),
    (r"\bparametrizations\.weight\.original0$", "weight_g"),
    (r"\bparametrizations\.weight\.original1$", "weight_v"),
)

# A key pattern that identifies each format, in the order in which they are tried.
_FORMAT_PATTERNS: tuple[tuple[Format, str], ...] = (
    ("mimi", r"semantic_residual_vector_quantizer\."),
    ("dac", r"\bquantizers\.\d+\.(in_proj|out_proj|codebook)\."),
    ("encodec", r"\blayers\.\d+\.codebook\.embed$"),
    ("spinlock", r"\bvq_layers\.\d+\.embedding\.weight$|^(.*\bquantizer\.)?embedding$"),
    ("diffusers", r"\b(down_blocks|up_blocks)\."),
    ("taming", r"\bquantize\.embedding\.weight$|^embedding\.weight$"),
)

# Entries of checkpoints that contain the state dict.
_WRAPPERS = ("state_dict", "model_state_dict", "best_state", "model", "generator")


class Weights:
    """The tensors of a checkpoint under their names in `transformers`.

    Args:
        payload: a state dict, or a checkpoint that contains one.
        format: None detects it from the keys.

    Raises:
        DataError: no tensors, or keys of no known format.
    """

    def __init__(self, payload: Any, format: Format | None) -> None:
        if not isinstance(payload, Mapping):
            raise DataError(f"a state dict or a path is needed, got {type(payload).__name__}; give its state_dict()")
        self.payload: Mapping[str, Any] = payload
        state: Mapping[str, Any] = payload
        while inner := [state[name] for name in _WRAPPERS if isinstance(state.get(name), Mapping)]:
            state = inner[0]
        if not any(isinstance(value, Tensor) for value in state.values()):
            raise DataError(f"no named tensors in the checkpoint; its entries are {_some(state)}")
        self.names: dict[str, str] = {}  # name in `transformers` -> name in the source
        self.tensors: dict[str, Tensor] = {}
        for key, value in state.items():
            if isinstance(value, Tensor):
                name = str(key)
                for old, new in _RENAMED_KEYS:
                    name = re.sub(old, new, name)
                self.names[name] = str(key)
                self.tensors[name] = value.detach()
        self.detected: Format | None = next(
            (name for name, pattern in _FORMAT_PATTERNS if any(re.search(pattern, key) for key in self.tensors)), None
        )
        if format is None and self.detected is None:
            raise DataError(f"keys of no known format; some are {_some(self.names.values())}; give format=")
        self.format: Format = format or self.detected or "encodec"

    def prefixes(self, name: str) -> list[str]:
        """The prefixes of keys that end with `name`."""
        pattern = re.compile(rf"(|.*\.){re.escape(name)}")
        return [match[1] for match in map(pattern.fullmatch, self.tensors) if match]

    def prefix(self, name: str) -> str:
        """The only prefix of keys that end with `name`; raises DataError if there are several or none."""
        prefixes = self.prefixes(name)
        if len(prefixes) > 1:
            where = ", ".join(map(repr, prefixes[:4]))
            raise DataError(f"{len(prefixes)} quantizers in the state dict, under {where}; give the state dict of one")
        if not prefixes:
            raise self.missing(name)
        return prefixes[0]

    def prefix_in(self, part: str, name: str) -> str:
        """The prefix of `name` within a `part` of a model; empty if the state dict is that of the part itself."""
        return "" if name in self.tensors else self.prefix(part + name) + part

    def missing(self, name: str) -> DataError:
        """The error for a missing key, with the nearest key and the detected format."""
        matches = get_close_matches(name, self.tensors, n=1, cutoff=0.0)
        nearest = f"; the nearest key is {self.names[matches[0]]!r}" if matches else ""
        detected = self.detected or "no known format"
        hint = f"; the keys look like {detected!r}" if detected != self.format else ""
        return DataError(f"no {name!r}, which format {self.format!r} needs{nearest}{hint}")

    def get(self, name: str) -> Tensor:
        """A tensor as float32; raises DataError if it is missing, not real, or contains NaN or infinity."""
        value = self.stored(name).float()
        if not value.isfinite().all():
            raise DataError(f"{self.names[name]!r} holds values that are not finite")
        return value

    def stored(self, name: str) -> Tensor:
        """A tensor in its stored dtype; raises DataError if it is missing, or not a dense tensor of real numbers."""
        if name not in self.tensors:
            raise self.missing(name)
        value = self.tensors[name]
        kinds = {
            "complex": value.is_complex(),
            "quantized": value.is_quantized,
            "sparse": value.layout != torch.strided,
            "without values (meta)": value.is_meta,
        }
        for kind, applies in kinds.items():
            if applies:
                raise DataError(f"{self.names[name]!r} is {kind}, not a dense tensor of real numbers")
        return value

    def optional(self, name: str) -> Tensor | None:
        """As `get`; None if it is missing."""
        return self.get(name) if name in self.tensors else None

    def matrix(self, name: str, columns: int | None = None) -> Tensor:
        """A tensor [rows, columns] as float32, without trailing dimensions of size 1."""
        value = self.get(name)
        while value.ndim > 2 and value.shape[-1] == 1:
            value = value.squeeze(-1)
        if value.ndim != 2 or (columns is not None and value.shape[1] != columns):
            expected = f"[rows, {'columns' if columns is None else columns}]"
            raise DataError(f"{self.names[name]!r} must be {expected}, got {list(value.shape)}")
        return value

    def num_stages(self, prefix: str, leaf: str, requested: int | None) -> int:
        """Number of keys `prefix`0`leaf`, `prefix`1`leaf`, ..., or `requested`; raises DataError if that is more."""
        count = 0
        while f"{prefix}{count}{leaf}" in self.tensors:
            count += 1
        if requested is not None and requested > count:
            raise DataError(f"num_quantizers is {requested}, but there are {count} under {prefix!r}")
        return count if requested is None else requested


def _some(keys: Any) -> str:
    names = sorted(map(str, keys))
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_weights(path: Path, format: Format | None) -> Mapping[str, Any]:
    """The contents of a weights file or checkpoint directory; raises DataError."""
    if os.path.isdir(path):
        names = (BEST, FINAL, SAFETENSORS, "diffusion_pytorch_model.safetensors")
        files = [file for name in names if (file := find(path, name)).exists()]
        if not files:
            raise DataError(f"{path}: none of {', '.join(names)} is in this directory")
        check_integrity(path, files[0].name)
        path = files[0]
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        return load_restricted(path)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        refused = name[1] if name else "an unknown type"
    if format in (None, "spinlock") and refused.split(".")[0] in ("numpy", "pathlib", "spinlock"):
        return read_original(path)
    raise DataError(f"{path}: contains {refused}, which is not loaded; save only the state dict and give that file")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read as safetensors: {one_line(error, 200)}") from None
