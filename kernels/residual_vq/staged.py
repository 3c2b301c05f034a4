"""Residual quantization on a GPU stage by stage, by the kernels of `vq_assign`: for rows too wide for one tile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spinlock_fast.kernels._common.guard import launches
from spinlock_fast.kernels.layout import CodebookLayout
from spinlock_fast.kernels.residual_vq.reference import Result, unit
from spinlock_fast.kernels.vq_assign import dispatch


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
    residual, total = x, torch.zeros_like(x)
    codes, errors, counts, sums = [], [], [], []
    hidden = None if mask is None else ~mask[:, None]
    for book in codebook.split(list(num_codes)):
        y = unit(residual) if cosine else residual
        given, points = _by_distance(y, book) if cosine else (y, book)
        layout = CodebookLayout.of([len(book)], [points.shape[1]])
        code, _, _, n, s = dispatch.assign(given, points.flatten(), layout, mask, not cosine, with_sums)
        e = book[code[:, 0].clamp(min=0)].masked_fill(code < 0, torch.nan)
        off = (y - e).square()
        errors.append((off if hidden is None else off.masked_fill(hidden, 0.0)).sum())
        counts.append(n.sum(0))
        sums.append(s.sum(0).view(len(book) if with_sums else 0, -1)[:, : x.shape[1]])
        value = e if hidden is None else e.masked_fill(hidden, 0.0)
        if gradient == "rotation":
            value = value.masked_fill((residual == 0).all(1, keepdim=True), 0.0)
        total, residual = total + value, residual - value
        codes.append(code)
    return total, torch.cat(codes, 1), torch.stack(errors), torch.cat(counts), torch.cat(sums).view(-1, x.shape[1])


def _by_distance(y: Tensor, book: Tensor) -> tuple[Tensor, Tensor]:
    """Points whose nearest is the one of the greatest dot product: one more entry makes all codes equally long."""
    squares = book.square().sum(1, keepdim=True)
    return F.pad(y, (0, 1)), torch.cat([book, (squares.max() - squares).clamp(min=0.0).sqrt()], 1)
