"""Beam search over residual stages: keeps several candidate code sequences per row and returns the best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Quantizes one stage: rows [b, n, j, D], stage number, sum of earlier stages [b, n, j, D] -> quantized
# [b, n, j, k, D], codes [b, n, j, k], losses [b, n, j, k].
QuantizeStage = Callable[[Tensor, int, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Beam:
    """The j candidates of each row after some stages."""

    scores: Tensor  # [b, n, j]
    residual: Tensor  # [b, n, j, D]
    quantized: Tensor  # [b, n, j, D]
    codes: Tensor  # [b, n, j, stages]
    losses: Tensor  # [b, n, j, stages]
    inputs: Tensor  # [b, n, j, stages, D]

    @staticmethod
    def initial(rows: Tensor) -> Beam:
        """One candidate per row, before the first stage."""
        one, empty = rows[:, :, None], rows[:, :, None, :0]
        return Beam(
            scores=torch.zeros_like(one[..., 0]),
            residual=one,
            quantized=torch.zeros_like(one),
            codes=empty.to(torch.int64),
            losses=empty.float(),
            inputs=one[..., None, :][..., :0, :],
        )

    def extend(self, quantized: Tensor, codes: Tensor, losses: Tensor, weight: Tensor, grad_fraction: float) -> Beam:
        """Extends every candidate by each of its k codes: [b, n, j * k]."""
        k = codes.shape[-1]
        passed = partial_gradient(quantized, grad_fraction)
        inputs = torch.cat([self.inputs, self.residual[..., None, :]], -2)
        all_codes = torch.cat([self.codes[..., None, :].expand(*codes.shape, -1), codes[..., None]], -1)
        all_losses = torch.cat([self.losses[..., None, :].expand(*losses.shape, -1), losses[..., None]], -1)
        return Beam(
            scores=(self.scores[..., None] - losses * weight).flatten(2),
            residual=(self.residual[..., None, :] - passed).flatten(2, 3),
            quantized=(self.quantized[..., None, :] + quantized).flatten(2, 3),
            codes=all_codes.flatten(2, 3),
            losses=all_losses.flatten(2, 3),
            inputs=inputs[..., None, :, :].expand(*inputs.shape[:3], k, *inputs.shape[3:]).flatten(2, 3),
        )

    def prune(self, size: int) -> Beam:
        """The `size` candidates with the highest scores."""
        if self.scores.shape[-1] <= size:
            return self
        scores, index = self.scores.topk(size, -1)

        def select(values: Tensor) -> Tensor:
            at = index.view(*index.shape, *([1] * (values.ndim - 3))).expand(*index.shape, *values.shape[3:])
            return values.gather(2, at)

        parts = (self.residual, self.quantized, self.codes, self.losses, self.inputs)
        return Beam(scores, *(select(part) for part in parts))


def partial_gradient(x: Tensor, fraction: float) -> Tensor:
    """x with its gradient scaled by `fraction`."""
    return x.detach() if fraction <= 0 else fraction * x + (1.0 - fraction) * x.detach()


def beam_search(
    rows: Tensor, quantize_stage: QuantizeStage, stages: int, size: int, weights: Tensor, grad_fraction: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best candidate: quantized [b, n, D], codes [b, n, q], losses [b, n, q], stage inputs [b, n, q, D].

    Args:
        rows: [b, n, D].
        quantize_stage: quantizes one stage.
        stages: number of stages q.
        size: beam size.
        weights: [q] weight of each stage's loss in the score.
        grad_fraction: fraction of the gradient that passes through the quantized vectors to the next residual.
    """
    beam = Beam.initial(rows)
    for q in range(stages):
        quantized, codes, losses = quantize_stage(beam.residual, q, beam.quantized)
        beam = beam.extend(quantized, codes, losses, weights[q], grad_fraction).prune(size if q < stages - 1 else 1)
    return beam.quantized[:, :, 0], beam.codes[:, :, 0], beam.losses[:, :, 0], beam.inputs[:, :, 0]
