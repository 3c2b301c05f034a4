"""Randomly initialised convolutional networks on the torus, evaluated in tiles of operators.

A tile of O operators is one network of grouped convolutions, zero-padded to the largest depth, width and kernel of the
tile. Operators in a tile affect each other only by rounding; tiles consist of fixed operator indices,
so that results do not depend on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.simulate.initial_conditions import CHANNELS
from spinlock_fast.simulate.noise import Purpose, generator
from spinlock_fast.simulate.parameters import Theta

NORM_EPS = 1e-3
_LANES = 16
_WINDOW = 0.8
_BIAS = 0.3  # standard deviation of the biases


def draw_weights(theta: Theta, seed: int, gain: float) -> list[tuple[Tensor, Tensor]]:
    """Weight [out, in, k, k] and bias [out] of every layer, determined by (seed, operator index).

    Weights are normal with standard deviation gain / sqrt(fan-in) (gain sqrt 2 in He et al. 2015), multiplied by a
    Gaussian window of unit energy, which favours patterns wider than a pixel. Biases have standard deviation 0.3.
    """
    rng = generator(seed, Purpose.WEIGHTS, theta.index)
    widths = [CHANNELS, *[theta.base_channels] * (theta.num_layers - 1), CHANNELS]
    window = _window(theta.kernel_size)
    layers = []
    for inputs, outputs in pairwise(widths):
        shape = (outputs, inputs, theta.kernel_size, theta.kernel_size)
        scale = gain / math.sqrt(inputs)
        weight = torch.from_numpy(rng.standard_normal(shape) * window).mul_(scale).float()
        bias = torch.from_numpy(rng.standard_normal(outputs)).mul_(_BIAS).float()
        layers.append((weight, bias))
    return layers


def _window(size: int) -> NDArray[np.float64]:
    """Gaussian window [size, size] of standard deviation (size - 1) / 2 * _WINDOW whose squares sum to one."""
    x = np.arange(size) - size // 2
    row = np.exp(-0.5 * (x / (_WINDOW * (size // 2))) ** 2)
    window: NDArray[np.float64] = np.outer(row, row)
    window /= np.sqrt(np.square(window).sum())
    return window


def _tanh(x: Tensor) -> Tensor:
    # Equal to tanh, and several times faster than torch.tanh on a CPU.
    return torch.sigmoid(2.0 * x).mul_(2.0).sub_(1.0)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": _tanh,
    "sine": torch.sin,
}


def _wrap(x: Tensor, r: int) -> Tensor:
    """Circular padding by r: [B, C, G, G] -> [B, C, G + 2r, G + 2r] in channels-last memory format.

    oneDNN needs two thirds of the time in this format, and `F.pad` three times as long as this function.
    """
    B, C, G, _ = x.shape
    shape = (B, C, G + 2 * r, G + 2 * r)
    out = torch.empty(shape, device=x.device, memory_format=torch.channels_last)
    out[:, :, r:-r, r:-r] = x
    out[:, :, r:-r, :r], out[:, :, r:-r, -r:] = x[..., -r:], x[..., :r]
    out[:, :, :r], out[:, :, -r:] = out[:, :, G : G + r], out[:, :, r : 2 * r]
    return out


def _pack(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weights that compute p neighbouring points as p * out channels, for a convolution of stride p.

    oneDNN computes up to 16 output channels in the time of one on AVX-512. With p * out <= 16 the convolution takes a
    third to two thirds of the time.
    """
    channels, inputs, k, _ = weight.shape
    points = max(p for p in (1, 2, 4) if p == 1 or p * channels <= _LANES)
    packed = torch.zeros(points, channels, inputs, k, k + points - 1)
    for p in range(points):
        packed[p, ..., p : p + k] = weight
    return packed.flatten(0, 1).contiguous(memory_format=torch.channels_last), bias.repeat(points)


class OperatorTile:
    """The networks of some operators, evaluated as one.

    Args:
        thetas: the operators, O of them.
        seed: seed of the data set.
        gain: see `draw_weights`.
        device: device of the networks.
    """

    def __init__(self, thetas: Sequence[Theta], seed: int, gain: float, device: torch.device) -> None:
        self._thetas = thetas
        self.count = len(thetas)
        self.hidden_layers = max(theta.num_layers for theta in thetas) - 1
        self.channels = max(theta.base_channels for theta in thetas)
        self._radius = max(theta.kernel_size for theta in thetas) // 2
        layers = self._padded(seed, gain)
        if self.count == 1 and device.type == "cpu":
            layers = [_pack(w, b) for w, b in layers]
        self._layers = [(w.to(device), b.to(device)) for w, b in layers]
        # Number of hidden layers of each operator: [O, 1, 1, 1], broadcast over [M, O, C, G, G].
        self._depth = self._per_operator([theta.num_layers - 1 for theta in thetas], device)
        self._width = self._per_operator([theta.base_channels for theta in thetas], device)
        self._instance_norm = self._per_operator([theta.normalization == "instance" for theta in thetas], device)
        self._layer_norm = self._per_operator([theta.normalization == "layer" for theta in thetas], device)
        self._activation_masks = {
            name: self._per_operator([theta.activation == name for theta in thetas], device)
            for name in ACTIVATIONS
            if any(theta.activation == name for theta in thetas)
        }

    def __call__(self, u: Tensor, mask: Tensor | None) -> Tensor:
        """f(u): [M, O, 3, G, G] -> the same shape, with dropout masks [M, O, hidden layers, C] or without."""
        h = u
        for depth, (weight, bias) in enumerate(self._layers[:-1]):
            new = self._activate(self._normalize(self._convolve(h, weight, bias)))
            if mask is not None:
                new *= mask[:, :, depth, :, None, None]
            shallow = depth > 0 and any(theta.num_layers - 1 <= depth for theta in self._thetas)
            h = torch.where(self._depth > depth, new, h) if shallow else new
        return self._convolve(h, *self._layers[-1])

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        M, count, C, G, _ = x.shape
        padded = _wrap(x.reshape(M, count * C, G, G), self._radius)
        # Weights wider than high compute several neighbouring points, see `_pack`.
        points = weight.shape[3] - weight.shape[2] + 1
        y = F.conv2d(padded, weight, bias, stride=(1, points), groups=count)
        if points > 1:
            y = y.permute(0, 2, 3, 1).reshape(M, G, G, -1).permute(0, 3, 1, 2)
        return y.reshape(M, count, -1, G, G)

    def _normalize(self, h: Tensor) -> Tensor:
        """Instance (Ulyanov et al. 2016) or layer normalization (Ba et al. 2016) over channels and space, or none."""
        kinds = {theta.normalization for theta in self._thetas}
        if kinds == {"none"}:
            return h
        first, second = h.mean((3, 4), keepdim=True), h.square().mean((3, 4), keepdim=True)  # [M, O, C, 1, 1]
        # Padded channels are zero: sums over channels are divided by the actual width.
        mean = torch.where(self._layer_norm, first.sum(2, keepdim=True) / self._width, first)
        square = torch.where(self._layer_norm, second.sum(2, keepdim=True) / self._width, second)
        scale = (square - mean.square()).clamp_(min=0.0).add_(NORM_EPS).rsqrt_()
        if kinds <= {"instance", "layer"}:
            return (h - mean).mul_(scale)
        return torch.where(self._instance_norm | self._layer_norm, (h - mean) * scale, h)

    def _activate(self, h: Tensor) -> Tensor:
        names = list(self._activation_masks)
        out = ACTIVATIONS[names[0]](h)
        for name in names[1:]:
            out = torch.where(self._activation_masks[name], ACTIVATIONS[name](h), out)
        return out

    def _padded(self, seed: int, gain: float) -> list[tuple[Tensor, Tensor]]:
        """Zero-padded weight [O * out, in, k, k] and bias [O * out] of every layer of the tile."""
        C, k = self.channels, 2 * self._radius + 1
        widths = [CHANNELS, *[C] * self.hidden_layers, CHANNELS]
        layers = [(torch.zeros(self.count, o, i, k, k), torch.zeros(self.count, o)) for i, o in pairwise(widths)]
        for row, theta in enumerate(self._thetas):
            own = draw_weights(theta, seed, gain)
            edge = self._radius - theta.kernel_size // 2
            inside = slice(edge, k - edge)
            for (w, b), (weight, bias) in zip([*layers[: len(own) - 1], layers[-1]], own, strict=True):
                w[row, : weight.shape[0], : weight.shape[1], inside, inside] = weight
                b[row, : len(bias)] = bias
        return [(w.flatten(0, 1).contiguous(memory_format=torch.channels_last), b.flatten()) for w, b in layers]

    def _per_operator(self, values: Sequence[float | bool], device: torch.device) -> Tensor:
        return torch.tensor(values, device=device).view(-1, 1, 1, 1)
