"""The projection in plain PyTorch: a loop over the groups, differentiated by autograd.

For group g with embedding x_g, and part s of the columns of all groups side by side:

    y_g = (x_g - mean(x_g)) / sqrt(var(x_g) + eps)
    l   = [(y_g * gain_g + shift_g) W_g^T + b_g  for every g]
    z_s = (l_s - mean(l_s)) / sqrt(var(l_s) + part_eps) * part_weight_s + part_bias_s
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def scaled_output_linear(
    x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, sizes: Sequence[int]
) -> Tensor:
    """(x_g * gain_g + shift_g) W_g^T + b_g of all groups side by side, [B, sum n].

    Args:
        x: [G, B, in]; gain, shift: [G, in]; weight: [sum n, in]; bias: [sum n].
        sizes: n of each group.
    """
    parts = zip(x, gain, shift, weight.split(list(sizes)), bias.split(list(sizes)), strict=True)
    return torch.cat([functional.linear(y * scale + offset, w, b) for y, scale, offset, w, b in parts], 1)


def ragged_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, sizes: Sequence[int], eps: float) -> Tensor:
    """Layer normalisation of each segment of the columns of x [B, sum n], with weight and bias [sum n]."""
    parts = zip(*(values.split(list(sizes), -1) for values in (x, weight, bias)), sizes, strict=True)
    return torch.cat([functional.layer_norm(a, (n,), w, b, eps) for a, w, b, n in parts], 1)


def normalize(x: Tensor, eps: float) -> Tensor:
    """Layer normalisation over the last dimension, without weight and bias."""
    return functional.layer_norm(x, x.shape[-1:], eps=eps)


def normalize_gradient(
    grad_y: Tensor | None, grad_deviation: Tensor | None, y: Tensor, deviation: Tensor
) -> Tensor | None:
    """Gradient of x from those of y = (x - mean) r and r = 1 / sqrt(variance + eps), from y and r alone.

    Args:
        grad_y, y: [..., D].
        grad_deviation, deviation: [...] of r.
    """
    r = deviation[..., None]
    grad_x = None
    if grad_y is not None:
        along = (grad_y * y).mean(-1, keepdim=True)
        grad_x = (grad_y - grad_y.mean(-1, keepdim=True) - y * along) * r
    if grad_deviation is not None:
        through_r = -grad_deviation[..., None] * r.square() * y / y.shape[-1]
        grad_x = through_r if grad_x is None else grad_x + through_r
    return grad_x


def project(
    x: Tensor,
    gain: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    part_weight: Tensor,
    part_bias: Tensor,
    outputs: Sequence[int],
    parts: Sequence[int],
    eps: float,
    part_eps: float,
) -> Tensor:
    """`normalize`, `scaled_output_linear` and `ragged_layer_norm`, without dropout: [G, B, in] -> [B, sum n]."""
    latents = scaled_output_linear(normalize(x, eps), gain, shift, weight, bias, outputs)
    return ragged_layer_norm(latents, part_weight, part_bias, parts, part_eps)
