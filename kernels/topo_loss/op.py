"""The topographic correlations without a pair matrix per codebook, and their gradient written by hand.

Distances of codes need no pair of rows: a table of K x K distances per codebook holds them all. With the one-hot
matrix O [S, G K] of the codes, d_e is one product of gathered table rows with O, and its gradient one product with O
the other way. The pair matrices of latents exist for a few codebooks at a time; the backward pass forms them anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from spinlock_fast.kernels._common.backend import resolve_backend
from spinlock_fast.kernels._common.guard import FLOAT, INDEX, check, check_codes
from spinlock_fast.kernels._common.higher_order import in_transform, needs_graph
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.native import native_supports
from spinlock_fast.kernels._common.precision import full_float32
from spinlock_fast.kernels.topo_loss import native, reference
from spinlock_fast.kernels.topo_loss.reference import rounding, varies

# Entries of the pair matrices that exist at once: of the size of a cache on a CPU, few launches elsewhere.
_PAIRS_AT_ONCE = {"cpu": 1 << 20}
_PAIRS_AT_ONCE_ELSEWHERE = 1 << 24


def topographic_correlations(
    x: Tensor, latents: Tensor, codes: Tensor, codebook: Tensor, layout: CodebookLayout
) -> tuple[Tensor, Tensor]:
    """How well distances survive encoding and quantization.

    Args:
        x: [S, F] features; they get no gradient.
        latents: [S, sum D]; distances of codes pass their gradient straight through to them.
        codes: [S, G] int64, the codes of the latents; -1 anywhere makes the second correlation 0.
        codebook: [sum K D] the code vectors that `codes` refer to; they get no gradient.
        layout: sizes of the group.

    Returns:
        corr(d_x, d_z) and corr(d_z, d_e), where d_x are distances of features and d_z, d_e the means
        over codebooks of distances of latents and of codes; 0 where one of the two is constant.
    """
    x, latents, codebook = _checked("topographic_correlations", x, latents, codes, codebook, layout)
    if in_transform():
        return reference.correlations_of_codes(x.detach(), latents, codes, codebook, layout)
    function: type[torch.autograd.Function] = _Correlations
    if native_supports(x, latents, codebook):
        function = native.Correlations
    elif _runs_triton(x, latents, codebook):
        from spinlock_fast.kernels.topo_loss import cuda

        function = cuda.Correlations
    else:
        check_codes("topographic_correlations", codes, layout)
    # Distances need all of float32: TF32 keeps ten bits of fraction.
    with full_float32(x.device):
        pre, post = function.apply(x.detach(), latents, codes, codebook.detach(), layout)
    return pre, post


def topographic_loss(
    x: Tensor, latents: Tensor, codes: Tensor, codebook: Tensor, layout: CodebookLayout, pre_weight: float
) -> Tensor:
    """1 - pre_weight * pre - (1 - pre_weight) * post of `topographic_correlations`, which says what the rest is."""
    x, latents, codebook = _checked("topographic_loss", x, latents, codes, codebook, layout)
    if not in_transform() and not native_supports(x, latents, codebook) and _runs_triton(x, latents, codebook):
        from spinlock_fast.kernels.topo_loss import cuda

        loss: Tensor = cuda.Loss.apply(x.detach(), latents, codes, codebook.detach(), layout, pre_weight)  # type: ignore[no-untyped-call]
        return loss
    pre, post = topographic_correlations(x, latents, codes, codebook, layout)
    return 1.0 - torch.lerp(post, pre, pre_weight)


def _checked(
    operator: str, x: Tensor, latents: Tensor, codes: Tensor, codebook: Tensor, layout: CodebookLayout
) -> tuple[Tensor, Tensor, Tensor]:
    """Floating point arguments of at least float32, which fit each other."""
    check(
        operator,
        ("x", x, ("S", "F"), FLOAT),
        ("latents", latents, ("S", layout.total_dims), FLOAT),
        ("codes", codes, ("S", layout.groups), INDEX),
        ("codebook", codebook, (layout.total_entries,), FLOAT),
    )
    x, latents, codebook = (t.float() if t.itemsize == 2 else t for t in (x, latents, codebook))
    return x, latents, codebook


def _runs_triton(x: Tensor, latents: Tensor, codebook: Tensor) -> bool:
    same = x.dtype == latents.dtype == codebook.dtype == torch.float32
    return same and resolve_backend("auto", x) == "triton" and len(x) > 0


class _Correlations(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, latents: Tensor, codes: Tensor, codebook: Tensor, layout: CodebookLayout
    ) -> tuple[Tensor, Tensor]:
        given = x, latents, codes, codebook
        codebook = codebook.to(latents.dtype)
        d_x = _distances((x - x.mean(0))[None])[0]
        points = layout.pad_columns(latents - latents.mean(0))  # [G, S, D_max]
        d_z = torch.zeros_like(d_x, dtype=latents.dtype)
        for block in _blocks(points):
            d_z += _distances(block).sum(0)
        d_z /= layout.groups
        vectors, first = _centred_codes(codebook, layout)
        rows = _distances(vectors).flatten(0, 1)[first + codes.clamp(min=0)]  # [S, G, K_max]
        one_hot = _one_hot(codes, first, layout).to(latents.dtype)  # [S, G * K_max]
        d_e = rows.flatten(1) @ one_hot.t() / layout.groups
        d_e.masked_fill_((codes < 0).any(), torch.nan)
        x_unit, _, x_varies = _standardized(d_x)
        z_unit, z_deviation, z_varies = _standardized(d_z)
        e_unit, e_deviation, e_varies = _standardized(d_e)
        pre_counts, post_counts = x_varies & z_varies, z_varies & e_varies
        pairs = max(d_x.numel() - d_x.shape[0], 1)
        pre = torch.where(pre_counts, (x_unit * z_unit).sum() / pairs, 0.0)
        post = torch.where(post_counts, (z_unit * e_unit).sum() / pairs, 0.0)
        ctx.layout = layout
        ctx.save_for_backward(
            *given, points, vectors, x_unit, z_unit, e_unit, z_deviation, e_deviation, pre_counts, post_counts, pre,
            post,
        )  # fmt: skip
        return pre, post

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, None, None, None]:
        with full_float32(ctx.saved_tensors[0].device):
            return None, _gradient(ctx, *grads), None, None, None


def _gradient(ctx: Any, *grads: Tensor) -> Tensor | None:
    layout: CodebookLayout = ctx.layout
    (
        x, latents, codes, codebook, points, vectors, x_unit, z_unit, e_unit, z_deviation, e_deviation, pre_counts,
        post_counts, pre, post
    ) = ctx.saved_tensors  # fmt: skip
    if needs_graph(grads):
        return reference.correlation_gradient(x, latents, codes, codebook, layout, grads)
    S, G = codes.shape
    # dr/db = (a - r b) / sigma_b for standardized a, b; a pair stands in the matrix twice.
    share = 2.0 / (max(S * (S - 1), 1) * G)
    to_pre = torch.where(pre_counts, share * grads[0], 0.0)
    to_post = torch.where(post_counts, share * grads[1], 0.0)
    of_z = (to_pre * x_unit + to_post * e_unit - (to_pre * pre + to_post * post) * z_unit) / z_deviation
    of_e = to_post * (z_unit - post * e_unit) / e_deviation
    # Their means are 0 but for rounding, which all pairs of a row would add up.
    pairs = max(S * (S - 1), 1)
    of_z -= of_z.sum() / pairs
    of_e -= of_e.sum() / pairs
    grad = torch.cat([_pull(block, of_z) for block in _blocks(points)])  # [G, S, D_max]
    grad += _pull_codes(codes, vectors, of_e, layout)
    return layout.pack_columns(grad)


def _blocks(points: Tensor) -> Iterator[Tensor]:
    """[G, S, D] a few G at a time."""
    at_once = _PAIRS_AT_ONCE.get(points.device.type, _PAIRS_AT_ONCE_ELSEWHERE)
    yield from points.split(max(1, at_once // max(points.shape[1] ** 2, 1)))


def _distances(points: Tensor) -> Tensor:
    """[G, S, S] distances between the rows of centred points [G, S, D]; 0 where rounding is all there is."""
    norms = points.square().sum(-1)
    both = norms[:, :, None] + norms[:, None, :]
    square = torch.baddbmm(both, points, points.transpose(1, 2), alpha=-2.0)
    return square.masked_fill_(square <= both.mul_(rounding(points)), 0.0).sqrt_()


def _pull(points: Tensor, weight: Tensor) -> Tensor:
    """sum over j of weight_ij (z_i - z_j) / d_ij, for points [G, S, D] and a symmetric weight [S, S]."""
    distances = _distances(points)
    pull = torch.where(distances > 0.0, weight / distances, 0.0)
    return torch.baddbmm(points * pull.sum(-1, keepdim=True), pull, points, alpha=-1.0)


def _pull_codes(codes: Tensor, vectors: Tensor, weight: Tensor, layout: CodebookLayout) -> Tensor:
    """`_pull` of the codes of rows, [G, S, D_max]: rows of one code pull as one."""
    G, K, _ = vectors.shape
    first = torch.arange(G, device=codes.device) * K
    chosen = first + codes.clamp(min=0)
    distances = _distances(vectors).flatten(0, 1)[chosen]  # [S, G, K]
    gathered = (weight @ _one_hot(codes, first, layout).to(weight.dtype)).view(-1, G, K)
    pull = torch.where(distances > 0.0, gathered / distances, 0.0).transpose(0, 1)  # [G, S, K]
    own = vectors.flatten(0, 1)[chosen.t()]  # [G, S, D]
    return torch.baddbmm(own * pull.sum(-1, keepdim=True), pull, vectors, alpha=-1.0)


def _centred_codes(codebook: Tensor, layout: CodebookLayout) -> tuple[Tensor, Tensor]:
    """Code vectors [G, K_max, D_max] about the mean of their codebook, and the first row [G] of each codebook."""
    index = layout.indices(codebook.device)
    padded = layout.pad_codebook(torch.nan_to_num(codebook, 0.0, 0.0, 0.0))
    mean = padded.sum(1, keepdim=True) / index.num_codes[:, None, None].to(padded.dtype)
    first = torch.arange(layout.groups, device=codebook.device) * layout.max_codes
    return (padded - mean) * index.code_mask[:, :, None], first


def _one_hot(codes: Tensor, first: Tensor, layout: CodebookLayout) -> Tensor:
    """[S, G * K_max]; a row without a code in some codebook is zero there."""
    one_hot = torch.zeros(codes.shape[0], layout.groups * layout.max_codes, device=codes.device, dtype=torch.float32)
    return one_hot.scatter_(1, first + codes.clamp(min=0), (codes >= 0).to(one_hot.dtype))


def _standardized(distances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distances [S, S] made mean 0, deviation 1 over the pairs i != j; the deviation; and whether it counts."""
    S = distances.shape[0]
    pairs = max(S * (S - 1), 1)
    mean = distances.sum() / pairs  # the diagonal is 0
    centred = (distances - mean).fill_diagonal_(0.0)
    variance = centred.square().sum() / pairs
    counts = varies(mean, variance)
    deviation = torch.where(counts, variance, 1.0).sqrt()
    return centred.div_(deviation), deviation, counts
