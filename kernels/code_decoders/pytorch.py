"""The partial decoders in PyTorch operations on padded codebooks: any device, float32 or float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.code_decoders.reference import Decoders

# Entries of the one-hot matrix of codes that exist at once: rows are processed in blocks.
_ONE_HOT_ENTRIES = 1 << 24


def forward(
    x: Tensor, codes: Tensor, codebook: Tensor, decoders: Decoders, layout: CodebookLayout
) -> tuple[Tensor, ...]:
    """The loss, and what `backward` reads."""
    w1, b1, w2, b2 = decoders
    mean = x.mean(0)
    x = x - mean  # centred: the sums over codes cancel less
    vectors, w1 = _pad(codebook.to(w1.dtype), w1, layout)
    hidden = torch.baddbmm(b1[:, None], vectors, w1).relu_()  # [G, K, H]
    decoded = torch.baddbmm((b2 - mean)[:, None], hidden, w2)  # [G, K, F]
    counts, sums = code_statistics(x, codes, layout)
    code_means = sums / counts.clamp(min=1.0)
    residual = decoded - code_means
    scatter = layout.groups * x.square().sum() - (counts * code_means.square()).sum()
    loss = ((counts * residual.square()).sum() + scatter) / (layout.groups * x.numel())
    sizes = layout.indices(codes.device).num_codes
    loss = loss.masked_fill(((codes < 0) | (codes >= sizes)).any(), torch.nan)
    return loss, x, codes, vectors, w1, hidden, decoded, residual * counts


def backward(
    grad: Tensor, saved: Sequence[Tensor], decoders: Decoders, layout: CodebookLayout, needs_quantized: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of quantized, w1, b1, w2, b2."""
    x, codes, vectors, w1, hidden, decoded, residual = saved
    w2 = decoders.w2
    scale = grad * (2.0 / max(layout.groups * x.numel(), 1))
    grad_decoded = residual * scale
    grad_hidden = (grad_decoded @ w2.transpose(1, 2)).masked_fill_(hidden == 0.0, 0.0)
    grad_quantized = None
    if needs_quantized:
        grad_quantized = _quantized_gradient(x, codes, decoded, hidden, w1, w2, layout).mul_(scale)
    return (
        grad_quantized,
        (vectors.transpose(1, 2) @ grad_hidden).flatten(0, 1)[layout.indices(x.device).packed_columns],
        grad_hidden.sum(1),
        hidden.transpose(1, 2) @ grad_decoded,
        grad_decoded.sum(1),
    )


def _quantized_gradient(
    x: Tensor, codes: Tensor, decoded: Tensor, hidden: Tensor, w1: Tensor, w2: Tensor, layout: CodebookLayout
) -> Tensor:
    """((P_k - x_b) W2^T * relu'_k) W1^T for the code k of every row b and codebook, [B, sum D]."""
    G, K, H = hidden.shape
    active = (hidden > 0.0).to(x.dtype)
    decoded_w2 = decoded @ w2.transpose(1, 2)  # [G, K, H]
    row = torch.arange(G, device=x.device) * K + codes.clamp(0, K - 1)  # [B, G]
    x_w2 = (x @ w2.flatten(0, 1).view(G * H, -1).t()).view(-1, G, H)  # [B, G, H]
    difference = (decoded_w2.flatten(0, 1)[row] - x_w2).mul_(active.flatten(0, 1)[row])  # [B, G, H]
    return layout.pack_columns(difference.transpose(0, 1) @ w1.transpose(1, 2))


def code_statistics(x: Tensor, codes: Tensor, layout: CodebookLayout) -> tuple[Tensor, Tensor]:
    """Counts [G, K_max, 1] and sums [G, K_max, F] of the rows of every code; rows with code -1 are skipped."""
    G, K = layout.groups, layout.max_codes
    first = torch.arange(G, device=x.device) * K
    counts = x.new_zeros(G * K)
    sums = x.new_zeros(G * K, x.shape[1])
    rows = max(1, _ONE_HOT_ENTRIES // (G * K))
    for block, block_codes in zip(x.split(rows), codes.split(rows), strict=True):
        one_hot = x.new_zeros(block.shape[0], G * K)
        one_hot.scatter_(1, first + block_codes.clamp(0, K - 1), (block_codes >= 0).to(x.dtype))
        counts += one_hot.sum(0)
        sums.addmm_(one_hot.t(), block)
    return counts.view(G, K, 1), sums.view(G, K, -1)


def decode_codes(codebook: Tensor, decoders: Decoders, layout: CodebookLayout) -> Tensor:
    """P_g of all codes, [G, K_max, F]."""
    vectors, w1 = _pad(codebook, decoders.w1, layout)
    hidden = torch.baddbmm(decoders.b1[:, None], vectors, w1).relu_()
    return torch.baddbmm(decoders.b2[:, None], hidden, decoders.w2)


def _pad(codebook: Tensor, w1: Tensor, layout: CodebookLayout) -> tuple[Tensor, Tensor]:
    """Codes [G, K_max, D_max], with 0 for entries that are not finite, and first weights [G, D_max, H]."""
    index = layout.indices(w1.device)
    vectors = layout.pad_codebook(torch.nan_to_num(codebook, 0.0, 0.0, 0.0))
    rows = torch.cat([w1, w1.new_zeros(1, w1.shape[1])])[index.columns]
    return vectors, rows
