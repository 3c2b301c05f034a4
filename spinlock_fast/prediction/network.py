"""The network: theta and u0 -> logits of every codebook."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spinlock_fast.prediction.settings import PredictorConfig

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class _ResidualBlock(nn.Module):
    """[B, C_in, *space] -> [B, C_out, *half of space] (He et al. 2016).

    Periodic axes are padded by the opposite end, others by their last value: half-sample mirroring, as for descriptors.
    """

    def __init__(self, periodic: Sequence[bool], channels_in: int, channels_out: int) -> None:
        super().__init__()
        convolution = _CONVOLUTIONS[len(periodic)]
        self.periodic = tuple(periodic)
        self.conv1 = convolution(channels_in, channels_out, 3, stride=2, bias=False)
        self.norm1 = nn.GroupNorm(1, channels_out)
        self.conv2 = convolution(channels_out, channels_out, 3, bias=False)
        self.norm2 = nn.GroupNorm(1, channels_out)
        self.skip = convolution(channels_in, channels_out, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        main = torch.relu(self.norm1(self.conv1(self._padded(x))))
        return torch.relu(self.norm2(self.conv2(self._padded(main))) + self.skip(x))

    def _padded(self, x: Tensor) -> Tensor:
        """x with one more point at both ends of every axis."""
        for mode, chosen in (("circular", True), ("replicate", False)):
            ends = [int(wraps is chosen) for wraps in reversed(self.periodic) for _ in range(2)]  # the last axis first
            if any(ends):
                x = F.pad(x, ends, mode)
        return x


class InputShape(NamedTuple):
    """The inputs of a network: P parameters, and C channels on a grid of some dimensions (C = 0: no field).

    `periodic` is of each axis of the grid; empty: all are periodic.
    """

    parameters: int
    channels: int
    dimensions: int
    periodic: tuple[bool, ...] = ()


class InputNetwork(nn.Module):
    """theta [B, P] and u0 [B, C, *space], standardised -> [B, outputs]; either may have no columns or channels.

    u0 passes a residual network and its mean over space, theta is appended, and an MLP of one hidden layer follows.
    """

    def __init__(self, shape: InputShape, outputs: int, config: PredictorConfig) -> None:
        super().__init__()
        stages = config.stages if shape.channels else 0
        widths = [shape.channels, *(config.channels * 2**i for i in range(stages))]
        periodic = shape.periodic or (True,) * shape.dimensions
        self.field = nn.Sequential(*(_ResidualBlock(periodic, a, b) for a, b in pairwise(widths)))
        self.mlp = nn.Sequential(
            nn.Linear(shape.parameters + widths[-1], config.hidden_dim),
            nn.GELU(),
            nn.Linear(config.hidden_dim, config.hidden_dim),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden_dim, outputs),
        )

    def forward(self, theta: Tensor, field: Tensor | None) -> Tensor:
        inputs = [theta] if field is None else [theta, self.field(field).flatten(2).mean(2)]
        out: Tensor = self.mlp(torch.cat(inputs, 1))
        return out


class TokenNetwork(nn.Module):
    """Logits of every codebook; those of a level may depend on the tokens of the levels before it.

    log p(t_g | inputs, earlier tokens) = log softmax(a_g(inputs) + sum over earlier levels g' of T_g'g[t_g'])[t_g].

    Args:
        shape: of the inputs.
        num_codes: [G] codes of each codebook.
        earlier: [G] codebooks of the same category and of lower levels; empty lists without this dependence.
    """

    def __init__(
        self,
        shape: InputShape,
        num_codes: Sequence[int],
        earlier: Sequence[Sequence[int]],
        config: PredictorConfig,
    ) -> None:
        super().__init__()
        self.num_codes, self.earlier = list(num_codes), [list(before) for before in earlier]
        self.inputs = InputNetwork(shape, sum(num_codes), config)
        self.pairs = nn.ParameterDict(
            {
                f"{before}_{g}": nn.Parameter(torch.zeros(num_codes[before], num_codes[g]))
                for g, all_before in enumerate(self.earlier)
                for before in all_before
            }
        )

    def forward(self, theta: Tensor, field: Tensor | None, tokens: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """Logits [B, K_g] of each codebook, and tokens [B, G].

        Args:
            tokens: [B, G] of the earlier levels; None: the most probable ones, level by level.
        """
        own = self.inputs(theta, field).split(self.num_codes, 1)
        logits: list[Tensor] = []
        chosen: list[Tensor] = []
        for g, all_before in enumerate(self.earlier):
            total = own[g]
            for before in all_before:
                total = total + self.pairs[f"{before}_{g}"][chosen[before] if tokens is None else tokens[:, before]]
            logits.append(total)
            chosen.append(total.argmax(1) if tokens is None else tokens[:, g])
        return logits, torch.stack(chosen, 1)
