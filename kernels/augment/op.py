"""Rows of a batch as a model is to give them and as it sees them."""

from __future__ import annotations

import torch
from torch import Tensor

from spinlock_fast.kernels._common.backend import Backend, runs_triton
from spinlock_fast.kernels._common.guard import FLOAT, INDEX, check


def augmented_rows(
    x: Tensor,
    rows: Tensor,
    mixing: float = 0.0,
    noise: float = 0.0,
    fade: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Rows between two rows, or a little beyond one, and the same with noise.

    Row i of the first result is x_i + u_i (x_j - x_i), where x_j is the next row of the batch (the first one after the
    last) and u_i uniform in -mixing..mixing: interpolation and extrapolation of DeVries and Taylor 2017. The rows of a
    batch should be in random order, so that the next one serves as any other.

    Args:
        x: [N, F].
        rows: [B] int64, those of the batch. On a GPU one that is not there gives NaN.
        mixing: largest u; 0 leaves rows as they are.
        noise: standard deviation of what is added to the second result, normal and independent; 0 for none.
        fade: of one element, a factor of `mixing`.
        backend: "auto", "triton" or "reference", see `resolve_backend`. Their random numbers differ.

    Returns:
        Two matrices [B, F]; one and the same without noise.
    """
    check("augmented_rows", ("x", x, ("N", "F"), FLOAT), ("rows", rows, ("B",), INDEX))
    if fade is not None:
        check("augmented_rows", ("x", x, ("N", "F"), FLOAT), ("fade", fade.reshape(-1), (1,), FLOAT))
    if (mixing or noise) and runs_triton(backend, x):
        from spinlock_fast.kernels.augment import triton

        return triton.augmented_rows(x, rows, mixing, noise, fade)
    batch = x.index_select(0, rows)
    if mixing:
        u = mixing * (2.0 * torch.rand(batch.shape[0], 1, dtype=x.dtype, device=x.device) - 1.0)
        if fade is not None:
            u = u * fade.to(x.dtype)
        batch = torch.lerp(batch, batch.roll(-1, 0), u)
    return batch, batch + noise * torch.randn_like(batch) if noise else batch
