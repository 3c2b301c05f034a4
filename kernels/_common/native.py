"""When the CPU kernels of `csrc/training` serve, and how tensors are handed to them: as addresses."""

from __future__ import annotations

import ctypes
import os

import torch
from torch import Tensor, nn

from spinlock_fast import _native as library
from spinlock_fast.kernels._common.backend import VARIABLE

__all__ = ["address", "library", "native_supports", "operand"]


def _share_threads_of_torch() -> None:
    """Loops of the kernels run on torch's own OpenMP threads, where its runtime can be found."""
    try:
        library.use_openmp(ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, ctypes.c_void_p).value or 0)
    except (OSError, AttributeError):
        library.use_openmp(0)


_share_threads_of_torch()


def native_supports(*tensors: Tensor) -> bool:
    """Whether all tensors are float32 on the CPU with memory of their own, outside of torch.compile and dispatch modes.

    Subclasses (FakeTensor, DTensor) and lazily negated tensors hold no memory that could be read as it is. A backend
    chosen by the environment variable of `backend` turns the kernels off.
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
    """Where the first entry of a contiguous tensor lies; 0 for None."""
    if tensor is None:
        return 0
    if not (tensor.is_cpu and tensor.is_contiguous()):
        raise ValueError(f"a native kernel reads contiguous memory of the CPU, got strides {tensor.stride()}")
    return tensor.data_ptr()


def operand(matrix: Tensor) -> tuple[int, int, int]:
    """Address and strides of a matrix, in any order of dimensions."""
    return matrix.data_ptr(), matrix.stride(0), matrix.stride(1)
