"""Residual codes by beam search: several candidates a row are followed through the stages, the best is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# A stage's quantizer: rows [b, n, j, D], its number, the sum so far -> quantized [b, n, j, k, D], codes and losses
# [b, n, j, k].
Stage = Callable[[Tensor, int, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Beam:
    """Candidates of each row."""

    scores: Tensor  # [b, n, j]
    residual: Tensor  # [b, n, j, D]
    quantized: Tensor  # [b, n, j, D]
    codes: Tensor  # [b, n, j, stages so far]
    losses: Tensor  # [b, n, j, stages so far]
    inputs: Tensor  # [b, n, j, stages so far, D]

    @staticmethod
    def of(rows: Tensor) -> Beam:
        one, none = rows[:, :, None], rows[:, :, None, :0]
        return Beam(
            torch.zeros_like(one[..., 0]),
            one,
            torch.zeros_like(one),
            none.to(torch.int64),
            none.float(),
            one[..., None, :][..., :0, :],
        )

    def grown(self, quantized: Tensor, codes: Tensor, losses: Tensor, weight: Tensor, fraction: float) -> Beam:
        """Every candidate followed by each of its k codes: [b, n, j * k]."""
        k = codes.shape[-1]
        counts = quantized.detach() if fraction <= 0 else fraction * quantized + (1.0 - fraction) * quantized.detach()
        inputs = torch.cat([self.inputs, self.residual[..., None, :]], -2)
        codes = torch.cat([self.codes[..., None, :].expand(*codes.shape, -1), codes[..., None]], -1)
        paid = torch.cat([self.losses[..., None, :].expand(*losses.shape, -1), losses[..., None]], -1)
        return Beam(
            (self.scores[..., None] - losses * weight).flatten(2),
            (self.residual[..., None, :] - counts).flatten(2, 3),
            (self.quantized[..., None, :] + quantized).flatten(2, 3),
            codes.flatten(2, 3),
            paid.flatten(2, 3),
            inputs[..., None, :, :].expand(*inputs.shape[:3], k, *inputs.shape[3:]).flatten(2, 3),
        )

    def best(self, size: int) -> Beam:
        """The `size` candidates of the highest scores."""
        if self.scores.shape[-1] <= size:
            return self
        scores, index = self.scores.topk(size, -1)

        def select(values: Tensor) -> Tensor:
            at = index.view(*index.shape, *([1] * (values.ndim - 3))).expand(*index.shape, *values.shape[3:])
            return values.gather(2, at)

        parts = (self.residual, self.quantized, self.codes, self.losses, self.inputs)
        return Beam(scores, *(select(part) for part in parts))


def beam_search(
    rows: Tensor, stage: Stage, stages: int, size: int, weights: Tensor, fraction: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best path: quantized [b, n, D], codes [b, n, q], losses [b, n, q], input of each stage [b, n, q, D]."""
    beam = Beam.of(rows)
    for q in range(stages):
        found = stage(beam.residual, q, beam.quantized)
        beam = beam.grown(*found, weights[q], fraction).best(size if q < stages - 1 else 1)
    return tuple(part[:, :, 0] for part in (beam.quantized, beam.codes, beam.losses, beam.inputs))  # type: ignore[return-value]


def update_stages(layers: Sequence[nn.Module], inputs: Tensor, codes: Tensor, mask: Tensor | None) -> None:
    """Moves each stage's averages by the codes of the best path."""
    for layer, stage_input, code in zip(layers, inputs.unbind(-2), codes.unbind(-1), strict=False):
        layer.update_rows(stage_input, code, mask)  # type: ignore[operator]
