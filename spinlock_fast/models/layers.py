"""Layers that apply to all categories, or all codebooks, in batched operations.

Parameters are packed without padding: a category or codebook of n features owns n rows. The modules hold the parameters
and define each layer; `spinlock_fast.models.vqvae` evaluates several layers in one fused kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spinlock_fast.kernels.grouped_mlp import Ragged, ragged_layer_norm, scaled_output_linear


def _uniform(shape: Sequence[int], bound: Tensor) -> nn.Parameter:
    # As torch.nn.Linear: U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
    values = 2.0 * torch.rand(*shape) - 1.0
    return nn.Parameter(values * bound.to(values))


class RaggedInputLinear(nn.Module):
    """G linear layers of different input widths: packed [B, sum n] -> [G, B, out]."""

    def __init__(self, sizes: Sequence[int], out_features: int) -> None:
        super().__init__()
        self.inputs = Ragged.of(sizes)
        fan_in = torch.tensor([float(n) for n in sizes], device="cpu")
        group_of_row = torch.tensor([g for g, n in enumerate(sizes) for _ in range(n)], device="cpu")
        self.weight = _uniform((sum(sizes), out_features), fan_in.rsqrt()[group_of_row][:, None])  # a row per input
        self.bias = _uniform((len(sizes), out_features), fan_in.rsqrt()[:, None])

    def forward(self, x: Tensor) -> Tensor:
        inputs = self.inputs
        return torch.baddbmm(self.bias[:, None, :], inputs.pad_columns(x), inputs.pad_rows(self.weight))


class RaggedOutputLinear(nn.Module):
    """G linear layers of different output widths: [G, B, in] -> packed [B, sum n]."""

    def __init__(self, in_features: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.outputs = Ragged.of(sizes)
        bound = torch.tensor(float(in_features)).rsqrt()
        self.weight = _uniform((sum(sizes), in_features), bound)  # a row per output
        self.bias = _uniform((sum(sizes),), bound)

    def forward(self, x: Tensor) -> Tensor:
        ones = x.new_ones(x.shape[0], x.shape[2])
        return scaled_output_linear(x, ones, torch.zeros_like(ones), self.weight, self.bias, self.outputs)


class GroupedLinear(nn.Module):
    """G linear layers of the same shape: [G, B, in] -> [G, B, out]."""

    def __init__(self, groups: int, in_features: int, out_features: int) -> None:
        super().__init__()
        bound = torch.tensor(float(in_features)).rsqrt()
        self.weight = _uniform((groups, in_features, out_features), bound)
        self.bias = _uniform((groups, out_features), bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias[:, None, :], x, self.weight)


class GroupedLayerNorm(nn.Module):
    """Layer normalisation with separate parameters per group: [G, B, D] -> [G, B, D]."""

    def __init__(self, groups: int, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(groups, dim))
        self.bias = nn.Parameter(torch.zeros(groups, dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = nn.functional.layer_norm(x, x.shape[-1:], eps=self.eps)
        return torch.addcmul(self.bias[:, None, :], normed, self.weight[:, None, :])


class RaggedLayerNorm(nn.Module):
    """Layer normalisation of each segment of packed columns [B, sum D]."""

    def __init__(self, sizes: Sequence[int], eps: float = 1e-5) -> None:
        super().__init__()
        self.segments = Ragged.of(sizes)
        self.weight = nn.Parameter(torch.ones(sum(sizes)))
        self.bias = nn.Parameter(torch.zeros(sum(sizes)))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ragged_layer_norm(x, self.weight, self.bias, self.segments, self.eps)
