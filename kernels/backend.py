"""Which implementation computes an operation."""

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
    """Raises ValueError where `name` is no backend."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")


def resolve_backend(name: str, *tensors: Tensor) -> str:
    """Which backend serves tensors of one device: "triton" or "reference".

    On a CPU the native kernels of `csrc/training` stand in for the reference where they can (see `native.serves`);
    SPINLOCK_FAST_BACKEND=reference leaves everything to PyTorch.

    Args:
        name: an explicit choice, or "auto": the environment variable SPINLOCK_FAST_BACKEND where it is
            set, else Triton on CUDA devices and the reference elsewhere.
        tensors: what is computed on. Triton serves float32, float16 and bfloat16; "auto" leaves float64 to the
            reference.

    Raises:
        ValueError: no such backend.
        RuntimeError: "triton" was asked for where it cannot run.
    """
    check_backend(name)
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    if name == "auto":
        name = os.environ.get(VARIABLE, "auto")
        if name not in BACKENDS:
            raise ValueError(f"{VARIABLE} must be one of {', '.join(BACKENDS)}, got {name!r}")
        if wide:  # the variable is for all operations, also for those that Triton does not serve
            name = "reference"
    device = tensors[0].device
    # Negated when they are read: kernels would see the memory as it is.
    lazy = not torch.compiler.is_compiling() and any(tensor.is_neg() for tensor in tensors)
    if name == "auto":
        name = "triton" if device.type == "cuda" and not lazy and _HAS_TRITON else "reference"
    elif name == "triton":
        if not _HAS_TRITON:
            raise RuntimeError("backend triton: the package triton is not installed")
        if wide:
            raise RuntimeError("backend triton: float64 is computed by backend reference alone")
        if lazy:
            raise RuntimeError("backend triton: a lazily negated tensor has to be resolved first (resolve_neg)")
        if device.type != "cuda" and not _interpreted():
            raise RuntimeError(f"backend triton: needs a CUDA device, the tensors are on {device.type}")
    if not torch.compiler.is_compiling():
        native = (
            name == "reference" and device.type == "cpu" and os.environ.get(VARIABLE, "auto") == "auto" and not wide
        )
        _say_once("native" if native else name, device.type)
    return name


def runs_triton(name: str, *tensors: Tensor) -> bool:
    """Whether Triton serves an operation on float32 alone, whose kernels torch.compile does not see through."""
    return (
        not torch.compiler.is_compiling()
        and all(tensor.dtype == torch.float32 for tensor in tensors)
        and resolve_backend(name, *tensors) == "triton"
    )


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _say_once(name: str, device: str) -> None:
    log.info("backend %s on %s", name, device)
