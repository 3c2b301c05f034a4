"""Gradient estimators for the code selection: code vectors that pass a gradient to the latents."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from spinlock_fast.kernels.residual_vq.reference import lengths, unit


def rotation_trick(source: Tensor, target: Tensor) -> Tensor:
    """`target`, with the gradient of the rotation and scaling that maps `source` to it (arXiv 2410.06424)."""
    with torch.no_grad():
        s, t = unit(source), unit(target)
        bisector = unit(s + t)
        scale = lengths(target) / lengths(source)
    along = (source * bisector).sum(-1, keepdim=True)
    back = (source * s).sum(-1, keepdim=True)
    rotated: Tensor = scale * (source - 2.0 * along * bisector + 2.0 * back * t)
    return rotated


def directional_reparam(source: Tensor, target: Tensor, variance: float = 5e-3) -> Tensor:
    """source + |target - source| times a noisy unit direction; both sides receive a gradient (DiVeQ)."""
    error = target - source
    noisy = error + sqrt(variance) * torch.randn_like(error)
    output: Tensor = source + unit(noisy).detach() * error.norm(dim=-1, keepdim=True)
    return output


def straight_through(source: Tensor, target: Tensor) -> Tensor:
    """`target`, with the gradient of `source` (Bengio et al. 2013)."""
    return source + (target - source).detach()
