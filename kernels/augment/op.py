"""Augmentation of the rows of a batch: checks of arguments, random numbers, choice of the implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from spinlock_fast.kernels._common.backend import Backend, runs_triton
from spinlock_fast.kernels._common.dropout import BatchSlice
from spinlock_fast.kernels._common.guard import FLOAT, INDEX, check, check_batch
from spinlock_fast.kernels.augment import reference


def augmented_rows(
    x: Tensor,
    rows: Tensor,
    mixup_scale: float = 0.0,
    noise_std: float = 0.0,
    mixup_decay: Tensor | None = None,
    backend: Backend = "auto",
    batch: BatchSlice | None = None,
    next_row: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Training targets and model inputs of a batch: mixup with extrapolation, and additive noise on the inputs.

    Row i of the targets is x_i + u_i (x_j - x_i), u_i ~ U(-m, m), where x_j is the next row of the batch (after the
    last one: `next_row`, or the first one): interpolation and extrapolation of DeVries and Taylor, 2017. The rows of
    the batch should be in random order.

    Args:
        x: [N, F] all rows.
        rows: [B] int64, the rows of the batch. On a GPU an index out of range gives a row of NaN.
        mixup_scale: m; 0 disables mixup.
        noise_std: standard deviation of the Gaussian noise; 0 disables it.
        mixup_decay: one element, multiplies `mixup_scale`; read on the device.
        backend: "auto", "triton" or "reference", see `resolve_backend`. Their random numbers differ.
        batch: place of `rows` in a larger batch, for which random numbers are drawn; None if `rows` is the batch.
        next_row: [1] int64, the row that follows the last one; None for the first of `rows`.

    Returns:
        Targets and inputs, [B, F] each; the same tensor without noise.
    """
    check(
        "augmented_rows",
        ("x", x, ("N", "F"), FLOAT),
        ("rows", rows, ("B",), INDEX),
        ("next_row", next_row, (1,), INDEX),
    )
    check_batch("augmented_rows", rows.shape[0], batch)
    if mixup_decay is not None:
        check("augmented_rows", ("x", x, ("N", "F"), FLOAT), ("mixup_decay", mixup_decay.reshape(-1), (1,), FLOAT))
    if (mixup_scale or noise_std) and runs_triton(backend, x):
        from spinlock_fast.kernels.augment import triton_forward

        return triton_forward.augmented_rows(x, rows, mixup_scale, noise_std, mixup_decay, batch, next_row)
    u = noise = None
    B, F = rows.shape[0], x.shape[1]
    first, total = batch or (0, B)
    if mixup_scale:
        uniform = torch.rand(total, 1, dtype=x.dtype, device=x.device)[first : first + B]
        u = mixup_scale * (2.0 * uniform - 1.0)
        if mixup_decay is not None:
            u = u * mixup_decay.to(x.dtype)
    if noise_std:
        noise = noise_std * torch.randn(total, F, dtype=x.dtype, device=x.device)[first : first + B]
    return reference.augmented_rows(x, rows, u, noise, next_row)
