"""Layers that act on every category, or every codebook, at once.

Parameters are packed without padding: what a category or codebook of n features owns are n rows. For a
batched matrix product the rows are gathered into a padded tensor whose padding is zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def pack_indices(sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Index tensors between packed rows [sum n] and padded rows [G, n_max].

    Returns:
        gather [G, n_max] (sum n where padded) and packed [sum n], positions in the flattened [G * n_max].
    """
    counts = torch.tensor(list(sizes))
    mask = torch.arange(int(counts.max())) < counts[:, None]
    gather = torch.full(mask.shape, int(counts.sum()))
    gather[mask] = torch.arange(int(counts.sum()))
    return gather, mask.flatten().nonzero().flatten()


def gather_rows(rows: Tensor, gather: Tensor) -> Tensor:
    """[sum n, ...] -> [G, n_max, ...], zero where padded."""
    padded = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])[gather.flatten()]
    return padded.view(*gather.shape, *rows.shape[1:])


def _uniform(shape: Sequence[int], bound: Tensor) -> nn.Parameter:
    # The initialisation of torch.nn.Linear: U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
    return nn.Parameter((2.0 * torch.rand(*shape) - 1.0) * bound)


class RaggedInputLinear(nn.Module):
    """G linear layers of different input widths: packed [B, sum n] -> [G, B, out]."""

    gather: Tensor

    def __init__(self, sizes: Sequence[int], out_features: int) -> None:
        super().__init__()
        fan_in = torch.tensor([float(n) for n in sizes])
        book = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(list(sizes)))
        self.weight = _uniform((sum(sizes), out_features), fan_in.rsqrt()[book][:, None])  # a row per input
        self.bias = _uniform((len(sizes), out_features), fan_in.rsqrt()[:, None])
        self.register_buffer("gather", pack_indices(sizes)[0], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        inputs = gather_rows(x.t(), self.gather).transpose(1, 2)  # [G, B, n_max]
        return torch.baddbmm(self.bias[:, None, :], inputs, gather_rows(self.weight, self.gather))


class RaggedOutputLinear(nn.Module):
    """G linear layers of different output widths: [G, B, in] -> packed [B, sum n]."""

    gather: Tensor
    packed: Tensor

    def __init__(self, in_features: int, sizes: Sequence[int]) -> None:
        super().__init__()
        bound = torch.tensor(float(in_features)).rsqrt()
        self.weight = _uniform((sum(sizes), in_features), bound)  # a row per output
        self.bias = _uniform((sum(sizes),), bound)
        gather, packed = pack_indices(sizes)
        self.register_buffer("gather", gather, persistent=False)
        self.register_buffer("packed", packed, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        padded = x @ gather_rows(self.weight, self.gather).transpose(1, 2)  # [G, B, n_max]
        flat = padded.permute(1, 0, 2).reshape(x.shape[1], self.gather.numel())
        return flat[:, self.packed] + self.bias


class GroupedLinear(nn.Module):
    """G linear layers of one shape: [G, B, in] -> [G, B, out]."""

    def __init__(self, groups: int, in_features: int, out_features: int) -> None:
        super().__init__()
        bound = torch.tensor(float(in_features)).rsqrt()
        self.weight = _uniform((groups, in_features, out_features), bound)
        self.bias = _uniform((groups, out_features), bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias[:, None, :], x, self.weight)


class GroupedLayerNorm(nn.Module):
    """Layer normalisation with parameters of its own per group: [G, B, D] -> [G, B, D]."""

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

    gather: Tensor
    packed: Tensor
    mask: Tensor
    sizes: Tensor

    def __init__(self, sizes: Sequence[int], eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(sum(sizes)))
        self.bias = nn.Parameter(torch.zeros(sum(sizes)))
        self.eps = eps
        gather, packed = pack_indices(sizes)
        self.register_buffer("gather", gather, persistent=False)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("mask", gather < sum(sizes), persistent=False)
        self.register_buffer("sizes", torch.tensor([float(n) for n in sizes]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        padded = gather_rows(x.t(), self.gather).permute(2, 0, 1)  # [B, G, D_max]
        sizes = self.sizes[None, :, None].to(x.dtype)
        centred = (padded - padded.sum(-1, keepdim=True) / sizes) * self.mask
        variance = centred.square().sum(-1, keepdim=True) / sizes
        normed = (centred * (variance + self.eps).rsqrt()).flatten(1)[:, self.packed]
        return torch.addcmul(self.bias, normed, self.weight)
