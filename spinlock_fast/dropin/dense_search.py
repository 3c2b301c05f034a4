"""Code search through the distances of all rows to all codes: the unfused reference path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from spinlock_fast.kernels.residual_vq import residual_vq

# Random codes are drawn for blocks of rows with at most this many distances.
_DISTANCES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Selection:
    """Codes selected for the rows of H codebooks."""

    codes: Tensor  # [H, N] or [H, N, k] int64
    vectors: Tensor  # [H, N, D] or [H, N, k, D] code vectors, differentiable in the codebook
    similarities: Tensor | None  # [H, N, K]: negative distances, or cosines


def similarities(rows: Tensor, codebook: Tensor, cosine: bool) -> Tensor:
    """Negative distances, or dot products, [H, N, K] of rows [H, N, D] and codes [H, K, D] or [H, N, K, D]."""
    if codebook.ndim == 4:
        if cosine:
            return torch.einsum("hnd,hnkd->hnk", rows, codebook)
        return -F.pairwise_distance(rows[:, :, None], codebook)
    products = rows @ codebook.transpose(1, 2)
    if cosine:
        return products
    squares = rows.square().sum(-1)[:, :, None] + codebook.square().sum(-1)[:, None] - 2.0 * products
    return -squares.clamp(min=1e-8).sqrt()


@torch.no_grad()
def _ranking_scores(rows: Tensor, codebook: Tensor, cosine: bool, similarity: Tensor) -> Tensor:
    """Scores ordered as `similarity`, without the rounding error of |row|^2: as accurate as the fused search."""
    if cosine or codebook.ndim == 4:
        return similarity
    mean = codebook.mean(1, keepdim=True)
    centred = codebook - mean
    return 2.0 * (rows - mean) @ centred.transpose(1, 2) - centred.square().sum(-1)[:, None]


def gather_codes(codebook: Tensor, codes: Tensor) -> Tensor:
    """Code vectors [H, N, (k,) D] of a codebook [H, K, D] or [H, N, K, D]."""
    if codebook.ndim == 4:
        index = codes[..., None] if codes.ndim == 2 else codes
        vectors = codebook.gather(2, index[..., None].expand(*index.shape, codebook.shape[-1]))
        return vectors[:, :, 0] if codes.ndim == 2 else vectors
    return torch.stack([F.embedding(code, head) for code, head in zip(codes, codebook, strict=True)])


def select_codes(
    rows: Tensor,
    codebook: Tensor,
    cosine: bool,
    *,
    temperature: float = 1.0,
    stochastic: bool = False,
    differentiable: bool = False,
    k: int | None = None,
) -> Selection:
    """Selects the nearest code, a random code, or the k nearest codes, with all distances in memory.

    Args:
        rows: [H, N, D].
        codebook: [H, K, D], or [H, N, K, D] for one codebook per row.
        cosine: compares by dot product.
        temperature: of the softmax over similarities.
        stochastic: draws codes from that softmax by adding Gumbel noise.
        differentiable: vectors carry the gradient of that softmax (Jang et al. 2017).
        k: selects the k nearest codes.
    """
    similarity = similarities(rows, codebook, cosine)
    if stochastic:
        scores = similarity / temperature + gumbel_noise(similarity)
    else:
        scores = _ranking_scores(rows, codebook, cosine, similarity)
    codes = scores.argmax(-1) if k is None else scores.topk(k, -1).indices
    vectors = gather_codes(codebook, codes)
    if differentiable:
        p = (similarity / temperature).softmax(-1)
        zero = p - p.detach()
        mixture = zero @ codebook if codebook.ndim == 3 else torch.einsum("hnk,hnkd->hnd", zero, codebook)
        vectors = vectors + (mixture if k is None else mixture[:, :, None])
    return Selection(codes, vectors, similarity)


@torch.no_grad()
def sample_codes(rows: Tensor, codebook: Tensor, cosine: bool, temperature: float) -> Tensor:
    """[H, N] codes drawn from the softmax of similarities over temperature, in blocks of rows."""
    H, N, _ = rows.shape
    block = max(1, _DISTANCES_AT_ONCE // codebook.shape[1])
    codes = torch.empty(H, N, dtype=torch.int64, device=rows.device)
    for h in range(H):
        for start in range(0, N, block):
            similarity = similarities(rows[h : h + 1, start : start + block], codebook[h : h + 1], cosine)
            scores = similarity / temperature + gumbel_noise(similarity)
            codes[h, start : start + block] = scores.argmax(-1)[0]
    return codes


@torch.no_grad()
def nearest_codes(rows: Tensor, codebook: Tensor, cosine: bool) -> Tensor:
    """[H, N] nearest codes, found by the fused kernel without a distance matrix."""
    pairs = zip(rows.detach().unbind(), codebook.detach().unbind(), strict=True)
    return torch.stack([residual_vq(r, [c], cosine=cosine, with_sums=False).codes[:, 0] for r, c in pairs])


def gumbel_noise(like: Tensor) -> Tensor:
    """Standard Gumbel noise of the shape and dtype of `like`."""
    uniform = torch.zeros_like(like).uniform_(0, 1)
    return -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()
