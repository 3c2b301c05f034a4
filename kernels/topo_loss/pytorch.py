"""The topographic correlations in PyTorch operations, without a pair matrix per codebook, on any device.

Distances of codes need no pair of rows: one table of K x K distances per codebook contains them all. With the one-hot
matrix O [S, G K] of the codes, d_e is the product of the gathered table rows with O, and its gradient is the product
of a pair weight with O. The pair matrices of latents exist for a few codebooks at a time; the backward pass computes
them again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.precision import full_float32
from spinlock_fast.kernels.topo_loss.reference import rounding, varies

# Entries of the pair matrices that exist at once: on a CPU as many as fit a cache, elsewhere for few launches.
_PAIRS_AT_ONCE = {"cpu": 1 << 20}
_PAIRS_AT_ONCE_ELSEWHERE = 1 << 24


def forward(x: Tensor, latents: Tensor, codes: Tensor, codebook: Tensor, layout: CodebookLayout) -> tuple[Tensor, ...]:
    """Both correlations, and what `backward` reads."""
    codebook = codebook.to(latents.dtype)
    d_x = _distances((x - x.mean(0))[None])[0]
    points = layout.pad_columns(latents - latents.mean(0))  # [G, S, D_max]
    d_z = torch.zeros_like(d_x, dtype=latents.dtype)
    for block in _blocks(points):
        d_z += _distances(block).sum(0)
    d_z /= layout.groups
    vectors, first = _centred_codes(codebook, layout)
    table_rows = _distances(vectors).flatten(0, 1)[first + codes.clamp(min=0)]  # [S, G, K_max]
    one_hot = _one_hot(codes, first, layout).to(latents.dtype)  # [S, G * K_max]
    d_e = table_rows.flatten(1) @ one_hot.t() / layout.groups
    d_e.masked_fill_((codes < 0).any(), torch.nan)
    x_unit, _, x_varies = _standardized(d_x)
    z_unit, z_deviation, z_varies = _standardized(d_z)
    e_unit, e_deviation, e_varies = _standardized(d_e)
    pre_counts, post_counts = x_varies & z_varies, z_varies & e_varies
    pairs = max(d_x.numel() - d_x.shape[0], 1)
    pre = torch.where(pre_counts, (x_unit * z_unit).sum() / pairs, 0.0)
    post = torch.where(post_counts, (z_unit * e_unit).sum() / pairs, 0.0)
    units = x_unit, z_unit, e_unit
    return pre, post, pre, post, codes, points, vectors, *units, z_deviation, e_deviation, pre_counts, post_counts


def backward(grad_pre: Tensor, grad_post: Tensor, saved: Sequence[Tensor], layout: CodebookLayout) -> Tensor:
    """Gradient of the latents [S, sum D]."""
    with full_float32(saved[0].device):
        return _latents_gradient(grad_pre, grad_post, saved, layout)


def _latents_gradient(grad_pre: Tensor, grad_post: Tensor, saved: Sequence[Tensor], layout: CodebookLayout) -> Tensor:
    (
        pre, post, codes, points, vectors, x_unit, z_unit, e_unit, z_deviation, e_deviation, pre_counts, post_counts
    ) = saved  # fmt: skip
    S, G = codes.shape
    # dr/db = (a - r b) / sigma_b for standardized a, b; every pair occurs twice in the matrix.
    factor = 2.0 / (max(S * (S - 1), 1) * G)
    to_pre = torch.where(pre_counts, factor * grad_pre, 0.0)
    to_post = torch.where(post_counts, factor * grad_post, 0.0)
    grad_d_z = (to_pre * x_unit + to_post * e_unit - (to_pre * pre + to_post * post) * z_unit) / z_deviation
    grad_d_e = to_post * (z_unit - post * e_unit) / e_deviation
    # Their means are 0 up to rounding, which the sums over all pairs of a row would amplify.
    pairs = max(S * (S - 1), 1)
    grad_d_z -= grad_d_z.sum() / pairs
    grad_d_e -= grad_d_e.sum() / pairs
    grad = torch.cat([_distance_gradient(block, grad_d_z) for block in _blocks(points)])  # [G, S, D_max]
    grad += _code_distance_gradient(codes, vectors, grad_d_e, layout)
    return layout.pack_columns(grad)


def _blocks(points: Tensor) -> Iterator[Tensor]:
    """Splits [G, S, D] into blocks of a few codebooks."""
    at_once = _PAIRS_AT_ONCE.get(points.device.type, _PAIRS_AT_ONCE_ELSEWHERE)
    yield from points.split(max(1, at_once // max(points.shape[1] ** 2, 1)))


def _distances(points: Tensor) -> Tensor:
    """[G, S, S] distances between the rows of centred points [G, S, D]; 0 within the rounding error."""
    norms = points.square().sum(-1)
    both = norms[:, :, None] + norms[:, None, :]
    square = torch.baddbmm(both, points, points.transpose(1, 2), alpha=-2.0)
    return square.masked_fill_(square <= both.mul_(rounding(points)), 0.0).sqrt_()


def _distance_gradient(points: Tensor, weight: Tensor) -> Tensor:
    """sum_j weight_ij (z_i - z_j) / d_ij for points [G, S, D] and a symmetric weight [S, S]."""
    distances = _distances(points)
    scaled = torch.where(distances > 0.0, weight / distances, 0.0)
    return torch.baddbmm(points * scaled.sum(-1, keepdim=True), scaled, points, alpha=-1.0)


def _code_distance_gradient(codes: Tensor, vectors: Tensor, weight: Tensor, layout: CodebookLayout) -> Tensor:
    """`_distance_gradient` of the codes of all rows, [G, S, D_max]; rows of the same code are summed first."""
    G, K, _ = vectors.shape
    first = torch.arange(G, device=codes.device) * K
    chosen = first + codes.clamp(min=0)
    distances = _distances(vectors).flatten(0, 1)[chosen]  # [S, G, K]
    gathered = (weight @ _one_hot(codes, first, layout).to(weight.dtype)).view(-1, G, K)
    scaled = torch.where(distances > 0.0, gathered / distances, 0.0).transpose(0, 1)  # [G, S, K]
    own = vectors.flatten(0, 1)[chosen.t()]  # [G, S, D]
    return torch.baddbmm(own * scaled.sum(-1, keepdim=True), scaled, vectors, alpha=-1.0)


def _centred_codes(codebook: Tensor, layout: CodebookLayout) -> tuple[Tensor, Tensor]:
    """Code vectors [G, K_max, D_max] minus the mean of their codebook, and the first row [G] of each codebook."""
    index = layout.indices(codebook.device)
    padded = layout.pad_codebook(torch.nan_to_num(codebook, 0.0, 0.0, 0.0))
    mean = padded.sum(1, keepdim=True) / index.num_codes[:, None, None].to(padded.dtype)
    first = torch.arange(layout.groups, device=codebook.device) * layout.max_codes
    return (padded - mean) * index.code_mask[:, :, None], first


def _one_hot(codes: Tensor, first: Tensor, layout: CodebookLayout) -> Tensor:
    """[S, G * K_max]; the row is zero in a codebook where its code is -1."""
    one_hot = torch.zeros(codes.shape[0], layout.groups * layout.max_codes, device=codes.device, dtype=torch.float32)
    return one_hot.scatter_(1, first + codes.clamp(min=0), (codes >= 0).to(one_hot.dtype))


def _standardized(distances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distances [S, S] with mean 0 and deviation 1 over the pairs i != j; the deviation; whether they vary."""
    S = distances.shape[0]
    pairs = max(S * (S - 1), 1)
    mean = distances.sum() / pairs  # the diagonal is 0
    centred = (distances - mean).fill_diagonal_(0.0)
    variance = centred.square().sum() / pairs
    counts = varies(mean, variance)
    deviation = torch.where(counts, variance, 1.0).sqrt()
    return centred.div_(deviation), deviation, counts
