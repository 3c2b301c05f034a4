"""One randomly initialised network on the torus, evaluated by the native kernels of `csrc/simulate` on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spinlock_fast.kernels._common.native import address, library, native_supports
from spinlock_fast.simulate.operators import ACTIVATIONS, NORM_EPS, draw_weights
from spinlock_fast.simulate.parameters import Theta

_CHANNELS = range(2, 17)  # torch adds up the values of one channel, and the products of many, in another order


class SingleOperator:
    """The network of an operator; the same values as `OperatorTile` bit for bit.

    Args:
        theta: the operator.
        seed: seed of the data set.
        gain: see `draw_weights`.
    """

    def __init__(self, theta: Theta, seed: int, gain: float) -> None:
        self.hidden_layers, self.channels = theta.num_layers - 1, theta.base_channels
        # [k, k, in, out]
        self._layers = [(w.permute(2, 3, 1, 0).contiguous(), b) for w, b in draw_weights(theta, seed, gain)]
        self._activate = _gelu if theta.activation == "gelu" else ACTIVATIONS[theta.activation]
        self._normalization = theta.normalization

    @staticmethod
    def supports(thetas: Sequence[Theta], device: torch.device) -> bool:
        """Whether these operators are one that this class evaluates."""
        small = len(thetas) == 1 and thetas[0].base_channels in _CHANNELS
        return small and device.type == "cpu" and native_supports()

    def __call__(self, u: Tensor, mask: Tensor | None) -> Tensor:
        """f(u): [M, 1, 3, G, G] -> the same shape, with dropout masks [M, 1, hidden layers, C] or without."""
        h, scale = u.flatten(0, 1).contiguous(), None
        for depth, (weight, bias) in enumerate(self._layers[:-1]):
            h = self._activate(self._normalize(_convolve(h, scale, weight, bias)))
            scale = None if mask is None else mask[:, 0, depth].contiguous()
        return _convolve(h, scale, *self._layers[-1])[:, None]

    def _normalize(self, h: Tensor) -> Tensor:
        """Instance or layer normalization of [M, C, G, G], or none."""
        if self._normalization == "none":
            return h
        M, C, G, _ = h.shape
        first, second = torch.empty(2, M, C)
        library.channel_sums(address(h), M, C, G * G, address(first), address(second))
        first /= G * G
        second /= G * G
        if self._normalization == "layer":
            first, second = (value.sum(1, keepdim=True) / C for value in (first, second))
        scale = (second - first.square()).clamp_(min=0.0).add_(NORM_EPS).rsqrt_()
        return h.sub_(first[..., None, None]).mul_(scale[..., None, None])


def _gelu(h: Tensor) -> Tensor:
    # torch leaves contiguous tensors to oneDNN, whose values differ in the last bits.
    return F.gelu(h.mT).mT


def _convolve(x: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolution on the torus of scale [M, in] times x [M, in, G, G]: [M, out, G, G]."""
    M, inputs, G, _ = x.shape
    k, outputs = len(weight), len(bias)
    out = torch.empty(M, outputs, G, G)
    library.torus_convolution(
        address(x), address(scale), address(weight), address(bias), M, inputs, outputs, G, k, address(out)
    )
    return out
