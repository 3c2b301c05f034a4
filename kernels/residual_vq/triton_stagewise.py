"""Residual quantization on a GPU stage by stage with the kernels of `vq_assign`, for rows too wide for one tile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spinlock_fast.kernels._common.guard import launches
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.residual_vq import reference
from spinlock_fast.kernels.residual_vq.reference import Result
from spinlock_fast.kernels.vq_assign import triton_forward as vq_assign


@launches
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
    residual, quantized, D = x, torch.zeros_like(x), x.shape[1]
    codes, errors, counts, sums = [], [], [], []
    excluded = None if mask is None else ~mask[:, None]
    for stage_codebook in codebook.split(list(num_codes)):
        y = reference.unit(residual) if cosine else residual
        rows, points = _as_distances(y, stage_codebook) if cosine else (y, stage_codebook)
        layout = CodebookLayout.of([len(points)], [points.shape[1]])
        _, code, _, stage_counts, stage_sums = vq_assign.assign(
            rows, points.flatten(), layout, mask, not cosine, with_sums
        )
        e = reference.code_vectors(stage_codebook, code[:, 0])
        errors.append(reference.exclude((y - e).square(), excluded).sum())
        counts.append(stage_counts.sum(0))
        sums.append(stage_sums.sum(0).view(len(points) if with_sums else 0, -1)[:, :D])
        output = reference.stage_output(reference.exclude(e, excluded), residual, gradient)
        quantized, residual = quantized + output, residual - output
        codes.append(code)
    return quantized, torch.cat(codes, 1), torch.stack(errors), torch.cat(counts), torch.cat(sums).view(-1, D)


def _as_distances(y: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and codes with one more entry, such that the nearest code is the one with the largest dot product.

    The entry gives all codes the same length L, so |y - e|^2 = |y|^2 + L^2 - 2 y.e.
    """
    squares = codebook.square().sum(1, keepdim=True)
    return F.pad(y, (0, 1)), torch.cat([codebook, (squares.max() - squares).clamp(min=0.0).sqrt()], 1)
