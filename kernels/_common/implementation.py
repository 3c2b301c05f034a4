"""Choice of the implementation of an operator that has all three: `cpu`, `triton_*` and `pytorch`."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from spinlock_fast.kernels._common.backend import Backend, runs_triton
from spinlock_fast.kernels._common.native import native_supports

Implementation = Literal["cpu", "triton", "pytorch"]


def choose_implementation(backend: Backend, *tensors: Tensor) -> Implementation:
    """Native kernels for float32 on a CPU, Triton for float32 on a GPU, PyTorch operations otherwise.

    Args:
        backend: "auto", "triton" or "reference" (PyTorch operations), see `resolve_backend`.
        tensors: floating-point arguments of the operator.
    """
    if backend == "auto" and native_supports(*tensors):
        return "cpu"
    return "triton" if runs_triton(backend, *tensors) else "pytorch"
