"""Ridge regression of the decoder's output layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spinlock_fast.data.host_rows import Rows
from spinlock_fast.kernels._common.single_thread import single_thread
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE

_ROWS_PER_BLOCK = 8192


@torch.no_grad()
def refit_decoder(model: CategoricalHierarchicalVQVAE, x: Rows, penalty: float) -> None:
    """Refits the output layer of the shared decoder to rows x [N, F], in place; tokens do not change.

    Augmentation and the noise of the last steps leave the trained layer away from the least-squares solution of the
    rows themselves. This is ridge regression with the trained weights as the prior mean.

    Args:
        model: a trained model, changed in place.
        x: [N, F] training rows, finite, for the model's device.
        penalty: above 0, relative to the mean variance of the layer's inputs.
    """
    was_training = model.training
    model.eval()
    output = decoder_output_layer(model)
    try:
        # Moments are summed over blocks of rows, to bound the memory of activations.
        count, total = 0, torch.zeros((), dtype=torch.float64, device=x.device)
        for rows in x.split(_ROWS_PER_BLOCK):
            hidden = decoder_hidden(model, rows)
            columns = torch.cat([hidden, rows - output(hidden)], 1).double()
            columns = torch.cat([columns, columns.new_ones(len(columns), 1)], 1)
            with single_thread(x.device):
                total = total + columns.T @ columns
            count += len(rows)
    finally:
        model.train(was_training)
    H, means = output.in_features, total[-1, :-1] / count
    moments = total[:-1, :-1] - count * torch.outer(means, means)
    with single_thread(x.device):
        weights, intercept = _solve_ridge(moments[:H, :H], moments[:H, H:], means[:H], means[H:], penalty)
    output.weight.add_(weights.T)
    output.bias.add_(intercept)


def decoder_output_layer(model: CategoricalHierarchicalVQVAE) -> nn.Linear:
    """The output layer of the shared decoder."""
    output = model.shared_decoder[-1]
    assert isinstance(output, nn.Linear)
    return output


def decoder_hidden(model: CategoricalHierarchicalVQVAE, x: Tensor) -> Tensor:
    """Hidden activations of the shared decoder for rows x [N, F], without dropout: [N, hidden]."""
    layer, activation, *_ = model.shared_decoder
    hidden: Tensor = activation(layer(model.quantize(model.encode(x))[0]))
    return hidden


def least_squares(inputs: Tensor, targets: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Ridge regression of targets [N, out] on inputs [N, in].

    Args:
        penalty: relative to the mean variance of the inputs.

    Returns:
        weights [in, out] and intercept [out].
    """
    input_mean, target_mean = inputs.mean(0), targets.mean(0)
    centred = inputs - input_mean
    return _solve_ridge(centred.T @ centred, centred.T @ (targets - target_mean), input_mean, target_mean, penalty)


def _solve_ridge(
    gram: Tensor, cross: Tensor, input_mean: Tensor, target_mean: Tensor, penalty: float
) -> tuple[Tensor, Tensor]:
    """Weights and intercept from centred second moments."""
    ridge = penalty * gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    weights = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), cross)
    return weights, target_mean - input_mean @ weights
