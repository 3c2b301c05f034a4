"""Choice of the backend that computes an operation."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "reference"]
BACKENDS: tuple[Backend, ...] = ("auto", "triton", "reference")
VARIABLE = "SPINLOCK_FAST_BACKEND"

_HAS_TRITON = importlib.util.find_spec("triton") is not None

log = logging.getLogger(__name__)


def check_backend(name: str) -> None:
    """Raises ValueError unless `name` is a backend."""
    _check(name, "backend")


def _check(name: str, setting: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{setting} must be one of {', '.join(BACKENDS)}, got {name!r}")


def resolve_backend(name: str, *tensors: Tensor) -> str:
    """The backend for tensors of one device: "triton" or "reference".

    On a CPU, native kernels replace the reference where they support the arguments (see `native.native_supports`);
    SPINLOCK_FAST_BACKEND=reference disables them.

    Args:
        name: "triton", "reference", or "auto": the environment variable SPINLOCK_FAST_BACKEND if set, else Triton on
            CUDA devices and the reference elsewhere.
        tensors: arguments of the operation. Triton supports float32, float16 and bfloat16; "auto" selects the
            reference for float64.

    Raises:
        ValueError: `name` or the environment variable is not a backend.
        RuntimeError: `name` is "triton" and Triton cannot run on these tensors.
    """
    check_backend(name)
    automatic = name == "auto"
    has_float64 = any(tensor.dtype == torch.float64 for tensor in tensors)
    if name == "auto":
        name = os.environ.get(VARIABLE, "auto")
        _check(name, VARIABLE)
        if has_float64:  # the variable applies to all operations, including those that Triton does not support
            name = "reference"
    device = tensors[0].device
    # Kernels would read the memory of lazily negated tensors without the sign.
    negated = not torch.compiler.is_compiling() and any(tensor.is_neg() for tensor in tensors)
    if name == "auto":
        name = "triton" if device.type == "cuda" and not negated and _HAS_TRITON else "reference"
    elif name == "triton":
        if not _HAS_TRITON:
            raise RuntimeError("backend triton: the package triton is not installed")
        if has_float64:
            raise RuntimeError("backend triton: float64 is supported by backend reference only")
        if negated:
            raise RuntimeError("backend triton: lazily negated tensors are not supported, call resolve_neg() first")
        if device.type != "cuda" and not _interpreted():
            raise RuntimeError(f"backend triton: needs a CUDA device, the tensors are on {device.type}")
    if automatic and not torch.compiler.is_compiling():
        native = name == "reference" and device.type == "cpu" and not has_float64
        native = native and os.environ.get(VARIABLE, "auto") == "auto"
        _log_once("native" if native else name, device.type)
    return name


def runs_triton(name: str, *tensors: Tensor) -> bool:
    """Whether Triton computes an operation that supports float32 only and is not an operator of torch.compile."""
    return (
        not torch.compiler.is_compiling()
        and all(tensor.dtype == torch.float32 for tensor in tensors)
        and resolve_backend(name, *tensors) == "triton"
    )


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _log_once(name: str, device: str) -> None:
    log.info("backend %s on %s", name, device)
