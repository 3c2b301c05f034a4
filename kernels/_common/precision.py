"""Context managers for the arithmetic of an operator: TF32 matrix products on CUDA devices, autocast."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


@contextmanager
def cuda_matmul(tf32: bool) -> Iterator[None]:
    """TF32 matrix products (10-bit mantissa, tensor cores) or full float32; restores the caller's settings on exit.

    The setting is process-wide, so other threads are affected too. CPU products are not.
    """
    matmul = torch.backends.cuda.matmul
    fp32_precision = matmul.fp32_precision
    previous_allow_tf32 = _read(lambda: matmul.allow_tf32)
    global_precision = _read(torch.get_float32_matmul_precision)
    try:
        allow_tf32(tf32)
        yield
    finally:
        allow_tf32(bool(previous_allow_tf32))
        if global_precision == "medium":  # `allow_tf32` sets "high" or "highest" alone
            torch.set_float32_matmul_precision("medium")
        matmul.fp32_precision = fp32_precision


def full_float32(device: torch.device) -> AbstractContextManager[None]:
    """`cuda_matmul(tf32=False)` for an operator on `device`; a null context on a CPU."""
    return nullcontext() if device.type == "cpu" else cuda_matmul(tf32=False)


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Disables autocast on the type of `device`; a null context where it is off, since entering one takes time."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


def _read(setting: Callable[[], Any]) -> Any:
    """The value of a setting; None where torch refuses to read it because only its newer interface has been used."""
    try:
        return setting()
    except RuntimeError:
        return None


def allow_tf32(tf32: bool) -> None:
    """Sets TF32 matrix products on or off, for use inside `cuda_matmul`, which restores the caller's setting."""
    # The older interface sets both of torch's settings; torch.compile fails where they disagree.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please use the new API settings")
        torch.backends.cuda.matmul.allow_tf32 = tf32
