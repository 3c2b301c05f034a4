"""Frozen encoder networks from raw values of a family to columns.

Module names match those of the original project, so that its encoder weights load unchanged.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from spinlock_fast.config.random_streams import seed_torch
from spinlock_fast.config.schema import (
    EncoderParams,
    IdentityEncoderParams,
    MLPEncoderParams,
    StatisticsEncoderParams,
    TemporalCNNEncoderParams,
)
from spinlock_fast.features.statistics_encoder import StatisticsEncoder

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


class MLPEncoder(nn.Module):
    """[B, ...] -> [B, output_dim]; trailing dimensions are flattened.

    Linear, BatchNorm, activation, Dropout per hidden layer; Linear, BatchNorm at the end.
    """

    def __init__(self, row_shape: Sequence[int], params: MLPEncoderParams) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = math.prod(row_shape)
        for hidden in params.hidden_dims:
            layers.append(nn.Linear(width, hidden))
            if params.batch_norm:
                layers.append(nn.BatchNorm1d(hidden))
            layers.append(_ACTIVATIONS[params.activation]())
            if params.dropout > 0:
                layers.append(nn.Dropout(params.dropout))
            width = hidden
        layers.append(nn.Linear(width, params.output_dim))
        if params.batch_norm:
            layers.append(nn.BatchNorm1d(params.output_dim))
        self.encoder = nn.Sequential(*layers)
        self.output_dim = params.output_dim

    def forward(self, x: Tensor) -> Tensor:
        encoded: Tensor = self.encoder(x.flatten(1))
        return encoded


class _ResidualBlock(nn.Module):
    """[B, C_in, T] -> [B, C_out, ceil(T / 2)] (He et al. 2016, in one dimension)."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(channels_in, channels_out, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm1d(channels_out)
        self.conv2 = nn.Conv1d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm1d(channels_out)
        self.skip = nn.Sequential(
            nn.Conv1d(channels_in, channels_out, 1, stride=2, bias=False), nn.BatchNorm1d(channels_out)
        )

    def forward(self, x: Tensor) -> Tensor:
        main = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(main + self.skip(x))


class TemporalCNNEncoder(nn.Module):
    """[B, T, D] -> [B, embedding_dim]: a convolutional network of three residual blocks along T."""

    def __init__(self, row_shape: Sequence[int], params: TemporalCNNEncoderParams) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(
            nn.Conv1d(row_shape[-1], 32, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.MaxPool1d(3, stride=2, padding=1),
        )
        self.stage2 = _ResidualBlock(32, 64)
        self.stage3 = _ResidualBlock(64, 128)
        self.stage4 = _ResidualBlock(128, 256)
        self.fc = nn.Linear(256, params.embedding_dim)
        self.bn_final = nn.BatchNorm1d(params.embedding_dim)
        self.output_dim = params.embedding_dim

    def forward(self, x: Tensor) -> Tensor:
        h = self.stage4(self.stage3(self.stage2(self.stage1(x.transpose(1, 2)))))
        encoded: Tensor = self.bn_final(self.fc(h.mean(-1)))
        return encoded


class IdentityEncoder(nn.Module):
    """[B, ...] -> [B, number of values]: flattened raw values."""

    def __init__(self, row_shape: Sequence[int], params: IdentityEncoderParams) -> None:
        super().__init__()
        self.output_dim = math.prod(row_shape)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


Encoder = MLPEncoder | TemporalCNNEncoder | IdentityEncoder | StatisticsEncoder


def build_encoder(row_shape: Sequence[int], params: EncoderParams) -> Encoder:
    """An encoder in eval mode without gradients, with weights from torch's random state.

    Raises:
        ValueError: TemporalCNNEncoder or StatisticsEncoder for rows that are not [T, D].
    """
    encoder: Encoder
    if isinstance(params, MLPEncoderParams):
        encoder = MLPEncoder(row_shape, params)
    elif isinstance(params, TemporalCNNEncoderParams):
        if len(row_shape) != 2:
            raise ValueError(f"TemporalCNNEncoder needs a 3-D dataset [N, T, D], got rows of shape {tuple(row_shape)}")
        encoder = TemporalCNNEncoder(row_shape, params)
    elif isinstance(params, StatisticsEncoderParams):
        encoder = StatisticsEncoder(row_shape)
    elif isinstance(params, IdentityEncoderParams):
        encoder = IdentityEncoder(row_shape, params)
    else:
        raise ValueError("encoder auto: no encoder was chosen")
    return encoder.eval().requires_grad_(False)


def seeded_encoder(row_shape: Sequence[int], params: EncoderParams, family: str, seed: int) -> Encoder:
    """`build_encoder` with weights determined by (family, seed)."""
    state = np.random.SeedSequence([seed, zlib.crc32(family.encode())]).generate_state(2, np.uint32)
    with torch.random.fork_rng(devices=[]):
        seed_torch(int(state[0]) << 31 | int(state[1]) >> 1)
        return build_encoder(row_shape, params)
