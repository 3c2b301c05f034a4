"""Weights of other projects' models: files, names, and errors that say what is missing."""

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

from spinlock_fast.errors import DataError

Format = Literal["encodec", "mimi", "dac", "taming", "diffusers", "spinlock"]

# Names of the first release of a family -> those of `transformers`, which the readers below know.
_RENAMED = (
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

# The key of each family that tells it from the others, in the order in which they are tried.
_MARKS: tuple[tuple[Format, str], ...] = (
    ("mimi", r"semantic_residual_vector_quantizer\."),
    ("dac", r"\bquantizers\.\d+\.(in_proj|out_proj|codebook)\."),
    ("encodec", r"\blayers\.\d+\.codebook\.embed$"),
    ("spinlock", r"\bvq_layers\.\d+\.embedding\.weight$|^(.*\bquantizer\.)?embedding$"),
    ("diffusers", r"\b(down_blocks|up_blocks)\."),
    ("taming", r"\bquantize\.embedding\.weight$|^embedding\.weight$"),
)

# Where checkpoints keep the weights among other things.
_WRAPPERS = ("state_dict", "model_state_dict", "best_state", "model", "generator")


class Weights:
    """The tensors of a checkpoint, by the names that `transformers` gives them, with errors that help.

    Args:
        payload: a state dict, or a checkpoint with one in it.
        format: None takes what the keys look like.

    Raises:
        DataError: no tensors, or keys of no known family.
    """

    def __init__(self, payload: Any, format: Format | None) -> None:
        if not isinstance(payload, Mapping):
            raise DataError(f"a state dict or a path is needed, got {type(payload).__name__}; give its state_dict()")
        self.payload: Mapping[str, Any] = payload
        state: Mapping[str, Any] = payload
        while inner := [state[name] for name in _WRAPPERS if isinstance(state.get(name), Mapping)]:
            state = inner[0]
        if not any(isinstance(value, Tensor) for value in state.values()):
            raise DataError(f"no tensors by name in it; its entries are {_some(state)}")
        self.names: dict[str, str] = {}  # name known here -> name in the source
        self.tensors: dict[str, Tensor] = {}
        for key, value in state.items():
            if isinstance(value, Tensor):
                name = str(key)
                for old, new in _RENAMED:
                    name = re.sub(old, new, name)
                self.names[name] = str(key)
                self.tensors[name] = value.detach()
        self.detected: Format | None = next(
            (kind for kind, mark in _MARKS if any(re.search(mark, name) for name in self.tensors)), None
        )
        if format is None and self.detected is None:
            raise DataError(f"keys of no known format; some are {_some(self.names.values())}; give format=")
        self.format: Format = format or self.detected or "encodec"

    def roots(self, name: str) -> list[str]:
        """The prefixes under which `name` occurs."""
        pattern = re.compile(rf"(|.*\.){re.escape(name)}")
        return [match[1] for match in map(pattern.fullmatch, self.tensors) if match]

    def root(self, name: str) -> str:
        """The one prefix under which `name` occurs; raises DataError."""
        roots = self.roots(name)
        if len(roots) > 1:
            where = ", ".join(repr(root) for root in roots[:4])
            raise DataError(f"{len(roots)} quantizers in it, under {where}; give the state dict of one")
        if not roots:
            raise self.missing(name)
        return roots[0]

    def part(self, part: str, name: str) -> str:
        """The prefix of `name` within a `part` of a model; none where the state dict is that of the part alone."""
        return "" if name in self.tensors else self.root(part + name) + part

    def missing(self, name: str) -> DataError:
        near = get_close_matches(name, self.tensors, n=1, cutoff=0.0)
        nearest = f"; the nearest key is {self.names[near[0]]!r}" if near else ""
        looks = self.detected or "no known format"
        hint = f"; the keys look like {looks!r}" if looks != self.format else ""
        return DataError(f"no {name!r}, which format {self.format!r} needs{nearest}{hint}")

    def get(self, name: str) -> Tensor:
        """A tensor in float32; raises DataError where it is missing, not real, or holds NaN or infinity."""
        value = self.stored(name).float()
        if not value.isfinite().all():
            raise DataError(f"{self.names[name]!r} holds values that are not finite")
        return value

    def stored(self, name: str) -> Tensor:
        """A dense tensor of real numbers as it is stored; raises DataError where it is missing or of another kind."""
        if name not in self.tensors:
            raise self.missing(name)
        value = self.tensors[name]
        kinds = {
            "complex": value.is_complex(),
            "quantized": value.is_quantized,
            "sparse": value.layout != torch.strided,
            "without values (meta)": value.is_meta,
        }
        for kind, found in kinds.items():
            if found:
                raise DataError(f"{self.names[name]!r} is {kind}, not a dense tensor of real numbers")
        return value

    def optional(self, name: str) -> Tensor | None:
        """As `get`, but None where it is missing."""
        return self.get(name) if name in self.tensors else None

    def matrix(self, name: str, columns: int | None = None) -> Tensor:
        """A tensor [rows, columns] in float32; trailing dimensions of size 1 are dropped."""
        value = self.get(name)
        while value.ndim > 2 and value.shape[-1] == 1:
            value = value.squeeze(-1)
        if value.ndim != 2 or (columns is not None and value.shape[1] != columns):
            expected = f"[rows, {'columns' if columns is None else columns}]"
            raise DataError(f"{self.names[name]!r} must be {expected}, got {list(value.shape)}")
        return value

    def stages(self, prefix: str, leaf: str, wanted: int | None) -> int:
        """How many of `prefix`0`leaf`, `prefix`1`leaf`, ... to read; raises DataError where `wanted` is too many."""
        count = 0
        while f"{prefix}{count}{leaf}" in self.tensors:
            count += 1
        if wanted is not None and wanted > count:
            raise DataError(f"num_quantizers is {wanted}, but there are {count} under {prefix!r}")
        return count if wanted is None else wanted


def _some(keys: Any) -> str:
    names = sorted(map(str, keys))
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_weights(path: Path, format: Format | None) -> Mapping[str, Any]:
    """The contents of a file or a checkpoint directory; raises DataError."""
    from spinlock_fast.checkpoints.directory import BEST, FINAL, SAFETENSORS, load_restricted
    from spinlock_fast.checkpoints.run_directory import check_integrity, find

    if os.path.isdir(path):
        names = (BEST, FINAL, SAFETENSORS, "diffusion_pytorch_model.safetensors")
        found = [place for name in names if (place := find(path, name)).exists()]
        if not found:
            raise DataError(f"{path}: none of {', '.join(names)} is in this directory")
        check_integrity(path, found[0].name)
        path = found[0]
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        return load_restricted(path)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        refused = name[1] if name else "an unknown type"
    if format in (None, "spinlock") and refused.split(".")[0] in ("numpy", "pathlib", "spinlock"):
        from spinlock_fast.compat.original import read_original

        return read_original(path)
    raise DataError(f"{path}: holds {refused}, which is not loaded; save the state dict alone and give that")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read as safetensors: {' '.join(str(error).split())[:200]}") from None
