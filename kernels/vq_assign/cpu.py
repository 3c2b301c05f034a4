"""`reference` by the native CPU kernels: reads the packed layout directly and stores no [N, K] distances."""

from __future__ import annotations

import torch
from torch import Tensor

from spinlock_fast.kernels._common.guard import rows_of
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.native import address, library
from spinlock_fast.kernels.vq_assign.reference import Result


def assign(
    z: Tensor, codebook: Tensor, layout: CodebookLayout, mask: Tensor | None, centred: bool, with_sums: bool
) -> Result:
    """`reference.assign`."""
    z, codebook = rows_of(z), codebook.contiguous()
    mask = mask.contiguous() if mask is not None else None
    N, G = z.shape[0], layout.groups
    codes = z.new_empty(N, G, dtype=torch.int64)
    quantized, error = z.new_empty(N, layout.total_dims), z.new_empty(1, G)
    counts = z.new_empty(1, layout.total_codes if with_sums else 0)
    sums = z.new_empty(1, layout.total_entries if with_sums else 0)
    library.assign(
        z.data_ptr(), z.stride(0), N, address(codebook), address(mask), centred, list(layout.num_codes),
        list(layout.dims), address(codes), address(quantized), address(error),
        address(counts) if with_sums else 0, address(sums), torch.get_num_threads(),
    )  # fmt: skip
    return quantized, codes, error, counts, sums


def backward(
    grad_quantized: Tensor, grad_error: Tensor, z: Tensor, quantized: Tensor, codes: Tensor, layout: CodebookLayout
) -> Tensor:
    """`reference.backward`, straight-through."""
    grad_quantized, grad_error, z, quantized, codes = (
        t.contiguous() for t in (grad_quantized, grad_error, z, quantized, codes)
    )
    grad_z = torch.empty_like(z)
    library.assign_backward(
        address(grad_quantized), address(grad_error), address(z), address(quantized), address(codes), z.shape[0],
        list(layout.dims), address(grad_z), torch.get_num_threads(),
    )  # fmt: skip
    return grad_z
