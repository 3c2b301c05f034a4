"""The native CPU kernels of `csrc/training`: supported tensors, and tensors as memory addresses."""

from __future__ import annotations

import ctypes
import os

import torch
from torch import Tensor, nn

from spinlock_fast import _native as library
from spinlock_fast.kernels._common.backend import VARIABLE

__all__ = ["address", "draw_seed", "library", "native_supports", "operand"]


def _share_threads_of_torch() -> None:
    """Runs the loops of the kernels on torch's OpenMP threads, if its runtime is found."""
    try:
        library.use_openmp(ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, ctypes.c_void_p).value or 0)
    except (OSError, AttributeError):
        library.use_openmp(0)


_share_threads_of_torch()


def native_supports(*tensors: Tensor) -> bool:
    """Whether the native kernels can compute on these tensors: float32 CPU memory, eager mode, no autocast.

    The memory of tensor subclasses (FakeTensor, DTensor) and lazily negated tensors cannot be read directly. A backend
    set by the environment variable SPINLOCK_FAST_BACKEND disables the kernels.
    """
    return (
        os.environ.get(VARIABLE, "auto") == "auto"
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and all(
            t.dtype == torch.float32 and t.is_cpu and type(t) in (Tensor, nn.Parameter) and not t.is_neg()
            for t in tensors
        )
        and not torch.is_autocast_enabled("cpu")
    )


def address(tensor: Tensor | None) -> int:
    """Address of the first entry of a contiguous tensor; 0 for None."""
    if tensor is None:
        return 0
    if not (tensor.is_cpu and tensor.is_contiguous()):
        raise ValueError(f"native kernels need contiguous CPU memory, got {tensor.device}, strides {tensor.stride()}")
    return tensor.data_ptr()


def operand(matrix: Tensor) -> tuple[int, int, int]:
    """Address, row stride and column stride of a matrix."""
    return matrix.data_ptr(), matrix.stride(0), matrix.stride(1)


def draw_seed() -> Tensor:
    """int64 seed for dropout, drawn from torch's CPU generator."""
    return torch.empty((), dtype=torch.int64, device="cpu").random_()
