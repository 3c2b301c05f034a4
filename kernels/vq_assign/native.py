"""`reference.assign` on a CPU: ragged, without distances of all rows to all codes in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from spinlock_fast.kernels._common.guard import rows_of
from spinlock_fast.kernels.layout import CodebookLayout
from spinlock_fast.kernels.native import address, library


def assign(
    z: Tensor, codebook: Tensor, layout: CodebookLayout, mask: Tensor | None, centred: bool, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """codes [N, G], quantized [N, sum D], squared_error [1, G], counts [1, sum K], sums [1, sum K D]."""
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
    return codes, quantized, error, counts, sums


def backward(
    grad_quantized: Tensor, grad_error: Tensor, z: Tensor, quantized: Tensor, codes: Tensor, layout: CodebookLayout
) -> Tensor:
    """`reference.backward`, straight through."""
    grad_quantized, grad_error, z = grad_quantized.contiguous(), grad_error.contiguous(), z.contiguous()
    quantized, codes = quantized.contiguous(), codes.contiguous()
    of_z = torch.empty_like(z)
    library.assign_backward(
        address(grad_quantized), address(grad_error), address(z), address(quantized), address(codes), z.shape[0],
        list(layout.dims), address(of_z), torch.get_num_threads(),
    )  # fmt: skip
    return of_z
