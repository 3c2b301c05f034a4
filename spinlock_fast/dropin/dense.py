"""Choices that need the distances of rows to all codes: the reference path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from spinlock_fast.kernels.residual_vq import residual_vq

# Random choices are made for so many distances at a time.
_DISTANCES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Choice:
    """Codes chosen for rows of H codebooks."""

    codes: Tensor  # [H, N] or [H, N, k] int64
    values: Tensor  # [H, N, D] or [H, N, k, D] code vectors, with the gradient of the codes
    distances: Tensor | None  # [H, N, K] minus the distances, or cosines


def similarities(rows: Tensor, codes: Tensor, cosine: bool) -> Tensor:
    """Minus the distances [H, N, K], or the dot products, of rows [H, N, D] to codes [H, K, D] or [H, N, K, D]."""
    if codes.ndim == 4:
        if cosine:
            return torch.einsum("hnd,hnkd->hnk", rows, codes)
        return -F.pairwise_distance(rows[:, :, None], codes)
    products = rows @ codes.transpose(1, 2)
    if cosine:
        return products
    squares = rows.square().sum(-1)[:, :, None] + codes.square().sum(-1)[:, None] - 2.0 * products
    return -squares.clamp(min=1e-8).sqrt()


@torch.no_grad()
def _ranking(rows: Tensor, codes: Tensor, cosine: bool, likeness: Tensor) -> Tensor:
    """Scores in the order of `likeness`, without the rounding of its |row|^2: the fused path chooses as finely."""
    if cosine or codes.ndim == 4:
        return likeness
    centre = codes.mean(1, keepdim=True)
    codes = codes - centre
    return 2.0 * (rows - centre) @ codes.transpose(1, 2) - codes.square().sum(-1)[:, None]


def take(codes: Tensor, index: Tensor) -> Tensor:
    """Code vectors [H, N, (k,) D] of codes [H, K, D] or [H, N, K, D]."""
    if codes.ndim == 4:
        many = index[..., None] if index.ndim == 2 else index
        values = codes.gather(2, many[..., None].expand(*many.shape, codes.shape[-1]))
        return values[:, :, 0] if index.ndim == 2 else values
    return torch.stack([F.embedding(i, book) for i, book in zip(index, codes, strict=True)])


def choose(
    rows: Tensor,
    codes: Tensor,
    cosine: bool,
    *,
    temperature: float = 1.0,
    noisy: bool = False,
    differentiable: bool = False,
    k: int | None = None,
) -> Choice:
    """The nearest code, a random one, or the k nearest, with all distances in memory.

    Args:
        rows: [H, N, D].
        codes: [H, K, D], or [H, N, K, D]: those of each row.
        cosine: by dot product.
        noisy: draw from the softmax of similarities over `temperature`, by adding Gumbel noise.
        differentiable: values carry the gradient of that softmax (Jang et al. 2017).
        k: the k best instead of one.
    """
    likeness = similarities(rows, codes, cosine)
    score = likeness / temperature + gumbel(likeness) if noisy else _ranking(rows, codes, cosine, likeness)
    index = score.argmax(-1) if k is None else score.topk(k, -1).indices
    values = take(codes, index)
    if differentiable:
        soft = (likeness / temperature).softmax(-1)
        extra = soft - soft.detach()
        mixed = extra @ codes if codes.ndim == 3 else torch.einsum("hnk,hnkd->hnd", extra, codes)
        values = values + (mixed if k is None else mixed[:, :, None])
    return Choice(index, values, likeness)


@torch.no_grad()
def sample(rows: Tensor, codes: Tensor, cosine: bool, temperature: float) -> Tensor:
    """[H, N] codes drawn by the softmax of similarities over temperature, some rows at a time."""
    H, N, _ = rows.shape
    block = max(1, _DISTANCES_AT_ONCE // codes.shape[1])
    index = torch.empty(H, N, dtype=torch.int64, device=rows.device)
    for h in range(H):
        for start in range(0, N, block):
            part = similarities(rows[h : h + 1, start : start + block], codes[h : h + 1], cosine)
            index[h, start : start + block] = (part / temperature + gumbel(part)).argmax(-1)[0]
    return index


@torch.no_grad()
def nearest(rows: Tensor, codes: Tensor, cosine: bool) -> Tensor:
    """[H, N] the nearest codes, without distances in memory."""
    pairs = zip(rows.detach().unbind(), codes.detach().unbind(), strict=True)
    return torch.stack([residual_vq(r, [c], cosine=cosine, with_sums=False).codes[:, 0] for r, c in pairs])


def gumbel(like: Tensor) -> Tensor:
    """Noise of the standard Gumbel distribution, of the shape of `like`."""
    uniform = torch.zeros_like(like).uniform_(0, 1)
    return -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()


def cross_entropy(distances: Tensor, codes: Tensor) -> Tensor:
    """Of the softmax of distances [H, N, K] with codes [H, N]; those of -1 do not count. 0 where none does."""
    total = F.cross_entropy(distances.flatten(0, 1), codes.flatten(), ignore_index=-1, reduction="sum")
    return total / (codes != -1).sum().clamp(min=1)
