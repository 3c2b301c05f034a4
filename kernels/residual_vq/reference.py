"""Residual quantization in plain PyTorch (Zeghidour et al. 2021, algorithm 1).

Stage q quantizes y_q = r_q (or r_q / |r_q| where `cosine`) to its nearest code e_q, and r_{q+1} = r_q - e_q, r_0 = x.
Nearest is argmin_k |y - e_k|^2, or argmax_k y.e_k where `cosine`; ties go to the lowest index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spinlock_fast.kernels._common.export import exporting
from spinlock_fast.kernels._common.rotation import rotate

# Lengths are clamped to at least this.
MIN_LENGTH = 1e-6
# Rows are processed in blocks of at most this many distances, which bounds memory.
_MAX_DISTANCES = 1 << 22
# Gradients of the output, and their numbers in the native and Triton kernels.
GRADIENTS = {"none": 0, "straight_through": 1, "rotation": 2}

# quantized [N, D], codes [N, Q], squared errors [Q], counts [sum K], sums [sum K, D]
Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Stages(NamedTuple):
    """Codebook sizes of the stages, and options of the quantization."""

    num_codes: Sequence[int]
    mask: Tensor | None  # [N] bool; False excludes a row
    cosine: bool  # stages normalise their residual and compare dot products
    gradient: str  # a key of GRADIENTS


class Averages(NamedTuple):
    """State of G codebooks that a training step updates together with the codes, see `ema_update.averages`."""

    cluster_size: Tensor  # [G, K]
    code_sum: Tensor  # [G, K, D]
    usage: Tensor  # [G, K] int64


def assign(x: Tensor, codebook: Tensor, stages: Stages, with_sums: bool) -> Result:
    """quantized [N, D], codes [N, Q], squared errors [Q], counts [sum K], sums [sum K, D].

    The last two are empty without `with_sums`.
    """
    num_codes, mask, cosine, gradient = stages
    residual, excluded = x, None if mask is None else ~mask[:, None]
    quantized = torch.zeros_like(x)
    codes, errors, counts, sums = [], [], [], []
    for stage_codebook in codebook.split(list(num_codes)):
        y = unit(residual) if cosine else residual
        code = nearest(y, stage_codebook, cosine)
        if mask is not None:
            code = code.masked_fill(~mask, -1)
        e = code_vectors(stage_codebook, code)
        errors.append(exclude((y - e).square(), excluded).sum())
        if with_sums:
            stage_counts, stage_sums = tally(y, code, len(stage_codebook))
            counts.append(stage_counts)
            sums.append(stage_sums)
        value = stage_output(exclude(e, excluded), residual, gradient)
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


def backward(grad: Tensor, grad_errors: Tensor, x: Tensor, codebook: Tensor, codes: Tensor, stages: Stages) -> Tensor:
    """[N, D] gradient with respect to x: the sum over stages of J_q^T grad + 2 grad_errors_q (y_q - e_q).

    J_q is zero, the identity or the scaled rotation of the stage. Codes are constants, so the gradient with respect to
    a residual is also the gradient with respect to x.
    """
    num_codes, mask, cosine, gradient = stages
    grad_x, residual = torch.zeros_like(x), x
    for q, stage_codebook in enumerate(codebook.split(list(num_codes))):
        e = code_vectors(stage_codebook, codes[:, q])
        norm = lengths(residual) if cosine else torch.ones_like(residual[:, :1])
        y = residual / norm
        if gradient == "rotation":
            y_unit, e_unit, bisector = _directions(y, e)
            grad_y = rotate(grad, lengths(e) / lengths(y), e_unit, y_unit, bisector)
        else:
            grad_y = grad if gradient == "straight_through" else torch.zeros_like(grad)
        grad_y = grad_y + 2.0 * grad_errors[q] * (y - e)
        if cosine:
            along = (grad_y * y).sum(1, keepdim=True)
            grad_y = grad_y - torch.where(norm > MIN_LENGTH, along, 0.0) * y
        grad_x = grad_x + grad_y / norm
        residual = residual - stage_output(e, residual, gradient)
    return exclude(grad_x, None if mask is None else ~mask[:, None])


def surrogate(x: Tensor, codebook: Tensor, codes: Tensor, stages: Stages) -> tuple[Tensor, Tensor]:
    """quantized [N, D] and squared errors [Q] of `assign` as differentiable functions of x.

    Codes are constants. All operations are PyTorch's own, so autograd differentiates them any number of times and
    torch.func transforms them. `backward` is the gradient of this function.
    """
    num_codes, mask, cosine, gradient = stages
    excluded = None if mask is None else ~mask[:, None]
    residual, quantized = x, torch.zeros_like(x)
    errors = []
    for q, stage_codebook in enumerate(codebook.detach().split(list(num_codes))):
        e = exclude(code_vectors(stage_codebook, codes[:, q]), excluded)
        y = unit(residual) if cosine else residual
        errors.append(exclude(y - e, excluded).square().sum())
        value = stage_output(e, residual, gradient)
        quantized = quantized + value
        if gradient != "none":
            estimate = rotate_to(y, e) if gradient == "rotation" else y
            quantized = quantized + exclude(estimate - estimate.detach(), excluded)
        residual = residual - value
    return quantized, torch.stack(errors)


def code_vectors(codebook: Tensor, code: Tensor) -> Tensor:
    """[N, D] rows of the codebook, NaN where the code is -1."""
    return codebook[code.clamp(min=0)].masked_fill((code < 0)[:, None], torch.nan)


def exclude(rows: Tensor, excluded: Tensor | None) -> Tensor:
    """Rows with zeros where `excluded` [N, 1] is True."""
    return rows if excluded is None else rows.masked_fill(excluded, 0.0)


def stage_output(e: Tensor, residual: Tensor, gradient: str) -> Tensor:
    """Output of a stage: its code, but 0 for a residual of 0 under the rotation trick, since R 0 = 0."""
    return e.masked_fill((residual == 0).all(1, keepdim=True), 0.0) if gradient == "rotation" else e


def nearest(y: Tensor, codebook: Tensor, cosine: bool) -> Tensor:
    """[N] int64 nearest row of codebook [K, D] to each row of y [N, D]; -1 where y is not finite."""
    if cosine:
        centred, norms = y, torch.zeros_like(codebook[:, 0])
    else:  # distances between centred vectors lose less to rounding
        centre = codebook.nan_to_num(0.0, 0.0, 0.0).mean(0)
        centred, codebook = y - centre, codebook - centre
        norms = codebook.square().sum(1)
    # An exported graph has one block for any number of rows.
    blocks = [centred] if exporting() else centred.split(max(1, _MAX_DISTANCES // codebook.shape[0]))
    codes = [torch.addmm(norms, block, codebook.T, alpha=-2.0).nan_to_num(torch.inf).argmin(1) for block in blocks]
    return torch.cat(codes).masked_fill(~torch.isfinite(centred).all(1), -1)


def tally(y: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Number of rows of each code [K] and sums of these rows [K, D]; rows with code -1 are left out."""
    target = torch.where(codes < 0, size, codes)
    counts = y.new_zeros(size + 1).index_add_(0, target, torch.ones_like(y[:, 0]))
    sums = y.new_zeros(size + 1, y.shape[1]).index_add_(0, target, y)
    return counts[:size], sums[:size]


def lengths(x: Tensor) -> Tensor:
    """[N, 1] Euclidean norms, at least MIN_LENGTH."""
    norms: Tensor = x.norm(dim=-1, keepdim=True)
    return norms.clamp(min=MIN_LENGTH)


def unit(x: Tensor) -> Tensor:
    """x / |x| along the last dimension."""
    return x / lengths(x)


def _directions(y: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors of y and e, and their bisector."""
    y_unit, e_unit = unit(y), unit(e)
    return y_unit, e_unit, unit(y_unit + e_unit)


def rotate_to(source: Tensor, target: Tensor) -> Tensor:
    """`target` with the gradient of the rotation and scaling that carry `source` to it (arXiv 2410.06424)."""
    fixed_source, fixed_target = source.detach(), target.detach()
    scale = lengths(fixed_target) / lengths(fixed_source)
    return rotate(source, scale, *_directions(fixed_source, fixed_target))
