"""The mathematics of residual quantization in plain PyTorch (Zeghidour et al. 2021, algorithm 1).

Stage q quantizes y_q = r_q (or r_q / |r_q| where `cosine`) to its nearest code e_q, and r_{q+1} = r_q - e_q, r_0 = x.
Nearest is the least |y - e|^2, or the greatest y.e where `cosine`; of equally near codes the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Lengths are taken to be at least this.
SHORT = 1e-6
# Distances are formed for so many rows at a time that this many numbers exist at once.
_DISTANCES_AT_ONCE = 1 << 22

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def assign(
    x: Tensor,
    codebook: Tensor,
    num_codes: Sequence[int],
    mask: Tensor | None,
    cosine: bool,
    gradient: str,
    with_sums: bool,
) -> Result:
    """quantized [N, D], codes [N, Q], squared errors [Q], counts [sum K], sums [sum K, D].

    The last two are empty without `with_sums`.
    """
    residual, valid = x, None if mask is None else mask[:, None]
    quantized = torch.zeros_like(x)
    codes, errors, counts, sums = [], [], [], []
    for book in codebook.split(list(num_codes)):
        y = unit(residual) if cosine else residual
        code = nearest(y, book, cosine)
        if mask is not None:
            code = code.masked_fill(~mask, -1)
        e = book[code.clamp(min=0)].masked_fill((code < 0)[:, None], torch.nan)
        off = (y - e).square()
        errors.append((off if valid is None else off.masked_fill(~valid, 0.0)).sum())
        if with_sums:
            n, s = tally(y, code, len(book))
            counts.append(n)
            sums.append(s)
        value = e if valid is None else e.masked_fill(~valid, 0.0)
        if gradient == "rotation":
            value = value.masked_fill((residual == 0).all(1, keepdim=True), 0.0)  # as R 0 is
        quantized = quantized + value
        residual = residual - value
        codes.append(code)
    return (
        quantized,
        torch.stack(codes, 1),
        torch.stack(errors),
        torch.cat(counts) if with_sums else x.new_empty(0),
        torch.cat(sums) if with_sums else x.new_empty(0, x.shape[1]),
    )


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
    """[N, D] the gradient of x: each stage passes that of its output on, and pulls its input to its code.

    What a stage leaves over has the gradient of what it was given: its code counts as a constant.
    """
    total, residual = torch.zeros_like(x), x
    for q, book in enumerate(codebook.split(list(num_codes))):
        code = codes[:, q]
        e = book[code.clamp(min=0)].masked_fill((code < 0)[:, None], torch.nan)
        norm = lengths(residual) if cosine else torch.ones_like(residual[:, :1])
        y = residual / norm
        if gradient == "rotation":
            of_y = rotate_back(grad, y, e)
        else:
            of_y = grad if gradient == "straight_through" else torch.zeros_like(grad)
        of_y = of_y + 2.0 * grad_errors[q] * (y - e)
        if cosine:
            along = (of_y * y).sum(1, keepdim=True)
            of_y = of_y - torch.where(norm > SHORT, along, 0.0) * y
        total = total + of_y / norm
        if gradient == "rotation":
            e = e.masked_fill((residual == 0).all(1, keepdim=True), 0.0)
        residual = residual - e
    return total if mask is None else total.masked_fill(~mask[:, None], 0.0)


def passed_on(
    x: Tensor,
    codebook: Tensor,
    codes: Tensor,
    num_codes: Sequence[int],
    mask: Tensor | None,
    cosine: bool,
    gradient: str,
) -> tuple[Tensor, Tensor]:
    """quantized [N, D] and squared errors [Q] of `assign` as functions of x; codes count as constants.

    Plain operations: autograd differentiates them any number of times, torch.func transforms them. `backward` is the
    gradient of this.
    """
    hidden = None if mask is None else ~mask[:, None]
    residual, total = x, torch.zeros_like(x)
    errors = []
    for q, book in enumerate(codebook.detach().split(list(num_codes))):
        code = codes[:, q]
        e = book[code.clamp(min=0)].masked_fill((code < 0)[:, None], torch.nan)
        e = e if hidden is None else e.masked_fill(hidden, 0.0)
        y = unit(residual) if cosine else residual
        off, value, passed = y - e, e, y
        if gradient == "rotation":
            passed = _rotated(y, e)
            value = e.masked_fill((residual == 0).all(1, keepdim=True), 0.0)  # as R 0 is
        extra = passed - passed.detach()
        if hidden is not None:
            off, extra = off.masked_fill(hidden, 0.0), extra.masked_fill(hidden, 0.0)
        errors.append(off.square().sum())
        total = total + (value if gradient == "none" else value + extra)
        residual = residual - value
    return total, torch.stack(errors)


def nearest(y: Tensor, book: Tensor, cosine: bool) -> Tensor:
    """[N] int64 nearest row of book [K, D] to each row of y [N, D]; -1 where y is not finite."""
    if cosine:
        moved, norms = y, torch.zeros_like(book[:, 0])
    else:  # distances between points about their middle lose less to rounding
        centre = book.nan_to_num(0.0, 0.0, 0.0).mean(0)
        moved, book = y - centre, book - centre
        norms = book.square().sum(1)
    rows = max(1, _DISTANCES_AT_ONCE // book.shape[0])
    found = [
        torch.addmm(norms, block, book.T, alpha=-2.0).nan_to_num(torch.inf).argmin(1) for block in moved.split(rows)
    ]
    return torch.cat(found).masked_fill(~torch.isfinite(moved).all(1), -1)


def tally(y: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Rows of each code [K] and their sums [K, D]; a code of -1 counts nowhere."""
    target = torch.where(codes < 0, size, codes)
    counts = y.new_zeros(size + 1).index_add_(0, target, torch.ones_like(y[:, 0]))
    sums = y.new_zeros(size + 1, y.shape[1]).index_add_(0, target, y)
    return counts[:size], sums[:size]


def lengths(x: Tensor) -> Tensor:
    """[N, 1]."""
    norms: Tensor = x.norm(dim=-1, keepdim=True)
    return norms.clamp(min=SHORT)


def unit(x: Tensor) -> Tensor:
    return x / lengths(x)


def _rotated(y: Tensor, e: Tensor) -> Tensor:
    """|e| / |y| R y, where rotation and lengths count as constants; `rotate_back` is its gradient."""
    y_unit, e_unit, size = unit(y.detach()), unit(e), lengths(e) / lengths(y.detach())
    between = unit(y_unit + e_unit)
    along, back = (y * between).sum(-1, keepdim=True), (y * y_unit).sum(-1, keepdim=True)
    turned: Tensor = size * (y - 2.0 * along * between + 2.0 * back * e_unit)
    return turned


def rotate_back(grad: Tensor, y: Tensor, e: Tensor) -> Tensor:
    """|e| / |y| R^T grad, where the rotation R carries y to the direction of e (arXiv 2410.06424, section 4.2)."""
    y_unit, e_unit = unit(y), unit(e)
    between = unit(y_unit + e_unit)
    along, back = (grad * between).sum(-1, keepdim=True), (grad * e_unit).sum(-1, keepdim=True)
    turned: Tensor = lengths(e) / lengths(y) * (grad - 2.0 * along * between + 2.0 * back * y_unit)
    return turned
