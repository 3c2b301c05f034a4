"""The partial decoders in plain PyTorch, differentiated by autograd.

Decoder g reconstructs the features from codebook g alone: P_g(e) = relu(e W1_g + b1_g) W2_g + b2_g. The loss is the
mean over codebooks, rows and features of (P_g(e_g) - x)^2.

Rows with the same code have the same P. Let n_k be the number of rows of code k, and m_k the mean of their x. Then

    sum_b |P(e_k(b)) - x_b|^2  =  sum_k n_k |P_k - m_k|^2  +  sum_b |x_b - m_k(b)|^2,

where the second sum does not depend on the decoders. Hence dP_k = 2 n_k (P_k - m_k), one row per code; the gradient of
the code of row b is ((P_k - x_b) W2^T * relu'_k) W1^T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spinlock_fast.kernels._common.higher_order import gradients
from spinlock_fast.kernels._common.layout import CodebookLayout


class Decoders(NamedTuple):
    """Parameters of the G partial decoders."""

    w1: Tensor  # [sum D, H] a row per latent dimension
    b1: Tensor  # [G, H]
    w2: Tensor  # [G, H, F]
    b2: Tensor  # [G, F]


def reconstructions(quantized: Tensor, decoders: Decoders, layout: CodebookLayout) -> Tensor:
    """Features from each codebook alone: [B, sum D] -> [G, B, F]."""
    w1, b1, w2, b2 = decoders
    parts = []
    for g in range(layout.groups):
        columns = layout.column_slice(g)
        hidden = torch.relu(quantized[:, columns] @ w1[columns] + b1[g])
        parts.append(hidden @ w2[g] + b2[g])
    return torch.stack(parts)


def partial_loss(x: Tensor, quantized: Tensor, decoders: Decoders, layout: CodebookLayout) -> Tensor:
    """Mean of (P_g(e_g) - x)^2 over codebooks, rows x [B, F] and features; quantized [B, sum D]."""
    return (reconstructions(quantized, decoders, layout) - x).square().mean()


def loss_of_codes(x: Tensor, quantized: Tensor, codes: Tensor, decoders: Decoders, layout: CodebookLayout) -> Tensor:
    """`partial_loss`; NaN where one of the codes [B, G] is outside its codebook."""
    sizes = layout.indices(codes.device).num_codes
    loss = partial_loss(x, torch.nan_to_num(quantized, 0.0, 0.0, 0.0), decoders, layout)
    return loss.masked_fill(((codes < 0) | (codes >= sizes)).any(), torch.nan)


def loss_gradients(
    x: Tensor,
    codes: Tensor,
    inputs: Sequence[Tensor],
    layout: CodebookLayout,
    grads: Sequence[Tensor],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of `loss_of_codes` that can be differentiated again.

    Args:
        x: [B, F].
        codes: [B, G].
        inputs: quantized, w1, b1, w2, b2.
        grads: gradient of the loss.
        needed: whether the gradient of each input is needed.
    """

    def formula(quantized: Tensor, *parameters: Tensor) -> Tensor:
        return loss_of_codes(x, quantized, codes, Decoders(*parameters), layout)

    return gradients(formula, inputs, grads, needed)
