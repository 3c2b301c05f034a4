"""The grouped networks in plain PyTorch: a loop over the groups, differentiated by autograd.

y_g = (relu(x_g W1_g + b1_g) * keep_g) W2_g + b2_g
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spinlock_fast.kernels._common.higher_order import gradients


def grouped_mlp(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, sizes: Sequence[int], keep: Tensor | None = None
) -> Tensor:
    """The networks of all groups, [G, B, E].

    Args:
        x: [B, sum n] the inputs of group 0, then of group 1, ...
        w1: [sum n, H]; b1: [G, H]; w2: [G, H, E]; b2: [G, E].
        sizes: n of each group.
        keep: [G, B, H] dropout mask: 0 for dropped hidden values, 1 / (1 - p) for others.
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
        hidden: [G, B, H] of the forward pass, 0 where ReLU or dropout set it to 0.
        scale: 1 / (1 - p).
        sizes: n of each group.
        grads: gradient of the output.
        needed: whether the gradient of each input is needed.
    """
    keep = (hidden.detach() != 0).to(hidden.dtype) * scale

    def formula(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return grouped_mlp(x, w1, b1, w2, b2, sizes, keep)

    return gradients(formula, inputs, grads, needed)
