"""The mathematics of the grouped layers in plain PyTorch: a loop over the groups, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from spinlock_fast.kernels._common.higher_order import gradients


def grouped_mlp(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, sizes: Sequence[int], keep: Tensor | None = None
) -> Tensor:
    """relu(x_g W1_g + b1_g) * keep_g W2_g + b2_g for every group g.

    Args:
        x: [B, sum n] the inputs of group 0, then of group 1, ...
        w1: [sum n, H]; b1: [G, H]; w2: [G, H, E]; b2: [G, E].
        sizes: n of each group.
        keep: [G, B, H] 0 where a hidden value is dropped, 1 / (1 - p) elsewhere.

    Returns:
        [G, B, E].
    """
    out = []
    for g, (inputs, weight) in enumerate(zip(x.split(list(sizes), 1), w1.split(list(sizes)), strict=True)):
        hidden = torch.relu(inputs @ weight + b1[g])
        out.append((hidden if keep is None else hidden * keep[g]) @ w2[g] + b2[g])
    return torch.stack(out)


def mlp_gradients(
    inputs: Sequence[Tensor],
    hidden: Tensor,
    scale: float,
    sizes: Sequence[int],
    grads: Sequence[Tensor],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of `grouped_mlp` that can be differentiated again.

    Args:
        inputs: x, w1, b1, w2, b2.
        hidden: [G, B, H] as the forward pass left them: 0 where cut off or dropped.
        scale: 1 / (1 - p).
        sizes: n of each group.
        grads: of the output, one.
        needed: whether the gradient of each input is asked for.
    """
    keep = (hidden.detach() != 0).to(hidden.dtype) * scale

    def formula(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return grouped_mlp(x, w1, b1, w2, b2, sizes, keep)

    return gradients(formula, inputs, grads, needed)


def scaled_output_linear(
    x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, sizes: Sequence[int]
) -> Tensor:
    """(x_g * gain_g + shift_g) W_g^T + b_g side by side.

    Args:
        x: [G, B, in]; gain, shift: [G, in]; weight: [sum n, in]; bias: [sum n].
        sizes: n of each group.

    Returns:
        [B, sum n].
    """
    parts = zip(x, gain, shift, weight.split(list(sizes)), bias.split(list(sizes)), strict=True)
    return torch.cat([functional.linear(y * scale + offset, w, b) for y, scale, offset, w, b in parts], 1)


def ragged_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, sizes: Sequence[int], eps: float) -> Tensor:
    """Layer normalisation of each segment of the columns of x [B, sum n], with weight and bias [sum n]."""
    parts = zip(*(values.split(list(sizes), -1) for values in (x, weight, bias)), sizes, strict=True)
    return torch.cat([functional.layer_norm(a, (n,), w, b, eps) for a, w, b, n in parts], 1)


def normalize(x: Tensor, eps: float) -> Tensor:
    """Layer normalisation over the last dimension, without scale and shift."""
    return functional.layer_norm(x, x.shape[-1:], eps=eps)


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
    """`normalize`, `scaled_output_linear` and `ragged_layer_norm`, one after the other, without dropout."""
    latents = scaled_output_linear(normalize(x, eps), gain, shift, weight, bias, outputs)
    return ragged_layer_norm(latents, part_weight, part_bias, parts, part_eps)
