"""`reference` by the native CPU kernels: blocks of rows pass all stages, and no [N, K] distances are stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spinlock_fast.kernels._common.guard import rows_of
from spinlock_fast.kernels._common.native import address, library
from spinlock_fast.kernels.residual_vq.reference import GRADIENTS, Result


def assign(
    x: Tensor,
    codebook: Tensor,
    num_codes: Sequence[int],
    mask: Tensor | None,
    cosine: bool,
    gradient: str,
    with_sums: bool,
) -> Result:
    """`reference.assign`."""
    x = rows_of(x)
    codebook, mask = codebook.contiguous(), mask.contiguous() if mask is not None else None
    (N, D), Q = x.shape, len(num_codes)
    codes = x.new_empty(N, Q, dtype=torch.int64)
    quantized, errors = x.new_empty(N, D), x.new_empty(Q)
    total = codebook.shape[0] if with_sums else 0
    counts, sums = x.new_empty(total), x.new_empty(total, D)
    library.residual_assign(
        x.data_ptr(), x.stride(0), N, D, address(codebook), list(num_codes), address(mask), cosine,
        GRADIENTS[gradient], address(codes), address(quantized), address(errors),
        address(counts) if with_sums else 0, address(sums),
        torch.get_num_threads(),
    )  # fmt: skip
    return quantized, codes, errors, counts, sums


def backward(
    grad: Tensor,
    grad_errors: Tensor,
    x: Tensor,
    codebook: Tensor,
    codes: Tensor,
    num_codes: Sequence[int],
    mask: Tensor | None,
    cosine: bool,
    gradient: str,
) -> Tensor:
    """`reference.backward`."""
    x = rows_of(x)
    grad, grad_errors, codebook, codes = (t.contiguous() for t in (grad, grad_errors, codebook, codes))
    mask = mask.contiguous() if mask is not None else None
    grad_x = x.new_empty(x.shape)
    library.residual_backward(
        address(grad), address(grad_errors), x.data_ptr(), x.stride(0), x.shape[0], x.shape[1], address(codebook),
        list(num_codes), address(mask), address(codes), cosine, GRADIENTS[gradient], address(grad_x),
        torch.get_num_threads(),
    )  # fmt: skip
    return grad_x
