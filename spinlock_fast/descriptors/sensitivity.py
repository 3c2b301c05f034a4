"""Sensitivity of one step of an operator to its input: Lipschitz quotients, gains, linearity."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_RELATIVE = (1e-4, 1e-3, 1e-2)
_SCALES = (0.5, 0.75, 1.25, 1.5)
_TINY = 1e-12


def sensitivity_features(step: Callable[[Tensor], Tensor], states: Tensor, direction: Tensor) -> Tensor:
    """The 10 columns of the group operator_sensitivity: [M, O, 10].

    Args:
        step: Phi, one step without noise and dropout: [M, O, 3, G, G] -> the same.
        states: u, the inputs [M, O, 3, G, G].
        direction: perturbation of unit mean square [O, 3, G, G].
    """
    size = _norm(states)
    base = step(states)
    quotients = []
    for relative in _RELATIVE:
        length = relative * size + _TINY
        moved = step(states + length[:, :, None, None, None] * direction)
        quotients.append(_norm(moved - base) / length)
    scaled = [step(scale * states) for scale in _SCALES]
    gains = [_norm(out) / (scale * size + _TINY) for scale, out in zip(_SCALES, scaled, strict=True)]
    return torch.stack(
        [
            *quotients,
            *gains,
            _linearity(base, scaled),
            gains[-1] / (gains[0] + _TINY),
            _spread(base) / (_spread(states) + _TINY),
        ],
        2,
    )


def _linearity(base: Tensor, scaled: list[Tensor]) -> Tensor:
    """R^2 of s Phi(u) as a prediction of Phi(s u), pooled over the scales; at least -1."""
    errors = [_norm(out - scale * base).square() for scale, out in zip(_SCALES, scaled, strict=True)]
    spreads = [_spread(out).square() for out in scaled]
    return (1.0 - torch.stack(errors).sum(0) / (torch.stack(spreads).sum(0) + _TINY)).clamp(min=-1.0)


def _norm(u: Tensor) -> Tensor:
    return u.square().mean((2, 3, 4)).sqrt()


def _spread(u: Tensor) -> Tensor:
    return (u - u.mean((2, 3, 4), keepdim=True)).square().mean((2, 3, 4)).sqrt()
