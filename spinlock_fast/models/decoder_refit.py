"""Least squares for the last layer of the decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spinlock_fast.data.host_rows import Rows
from spinlock_fast.kernels._common.single_thread import single_thread
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE

_ROWS_AT_ONCE = 8192


@torch.no_grad()
def refit_decoder(model: CategoricalHierarchicalVQVAE, x: Rows, penalty: float) -> None:
    """Fits the last layer of the shared decoder to rows x [N, F], in place; the tokens stay as they are.

    Mixed and noisy rows, and the last steps' own noise, leave the trained layer beside the least squares of the rows as
    they are. Ridge regression towards the trained weights follows the rows where they tell much and stays elsewhere.

    Args:
        model: trained; changed.
        x: training rows, finite, for the model's device.
        penalty: above 0, as a share of the inputs' mean variance.
    """
    was_training = model.training
    model.eval()
    last = decoder_output(model)
    try:
        # Sums over blocks of rows: all of them at once would take N times the width of every layer.
        count, total = 0, torch.zeros((), dtype=torch.float64, device=x.device)
        for rows in x.split(_ROWS_AT_ONCE):
            hidden = decoder_inputs(model, rows)
            both = torch.cat([hidden, rows - last(hidden)], 1).double()
            both = torch.cat([both, both.new_ones(len(both), 1)], 1)
            with single_thread(x.device):
                total = total + both.T @ both
            count += len(rows)
    finally:
        model.train(was_training)
    H, means = last.in_features, total[-1, :-1] / count
    moments = total[:-1, :-1] - count * torch.outer(means, means)
    with single_thread(x.device):
        weights, constant = _solve(moments[:H, :H], moments[:H, H:], means[:H], means[H:], penalty)
    last.weight.add_(weights.T)
    last.bias.add_(constant)


def decoder_output(model: CategoricalHierarchicalVQVAE) -> nn.Linear:
    """The last layer of the shared decoder."""
    last = model.shared_decoder[-1]
    assert isinstance(last, nn.Linear)
    return last


def decoder_inputs(model: CategoricalHierarchicalVQVAE, x: Tensor) -> Tensor:
    """What the last layer of the shared decoder reads of rows x [N, F], without dropout: [N, hidden]."""
    first, activation, *_ = model.shared_decoder
    hidden: Tensor = activation(first(model.quantize(model.encode(x))[0]))
    return hidden


def least_squares(inputs: Tensor, targets: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Ridge regression: weights [in, out] and constant [out]; the penalty is a share of the inputs' mean variance."""
    centre, goal = inputs.mean(0), targets.mean(0)
    a = inputs - centre
    return _solve(a.T @ a, a.T @ (targets - goal), centre, goal, penalty)


def _solve(gram: Tensor, cross: Tensor, centre: Tensor, goal: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    ridge = penalty * gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    weights = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), cross)
    return weights, goal - centre @ weights
