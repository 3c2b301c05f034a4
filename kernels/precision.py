"""How float32 matrix products are computed on a CUDA device, for a while."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


@contextmanager
def cuda_matmul(tf32: bool) -> Iterator[None]:
    """TF32 products (ten bits of fraction, on tensor cores) or full float32; the caller's settings come back after.

    The setting is process-wide: other threads see it meanwhile. CPU products are not touched.
    """
    matmul = torch.backends.cuda.matmul
    newer = matmul.fp32_precision
    older = _read(lambda: matmul.allow_tf32)
    everywhere = _read(torch.get_float32_matmul_precision)
    try:
        allow_tf32(tf32)
        yield
    finally:
        allow_tf32(bool(older))
        if everywhere == "medium":  # which the line above cannot say
            torch.set_float32_matmul_precision("medium")
        matmul.fp32_precision = newer


def full_float32(device: torch.device) -> AbstractContextManager[None]:
    """`cuda_matmul(tf32=False)` for an operator on `device`; on a CPU nothing, which costs nothing."""
    return nullcontext() if device.type == "cpu" else cuda_matmul(tf32=False)


def _read(setting: Callable[[], Any]) -> Any:
    """None where the caller used the newer of torch's two interfaces alone: then the older refuses to be read."""
    try:
        return setting()
    except RuntimeError:
        return None


def allow_tf32(tf32: bool) -> None:
    """Until it is set again; inside `cuda_matmul`, which restores it."""
    # torch.compile reads the older interface and fails where the newer says something else: this one sets both.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please use the new API settings")
        torch.backends.cuda.matmul.allow_tf32 = tf32
