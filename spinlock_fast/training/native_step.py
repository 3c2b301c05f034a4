"""Losses and gradients of a training step by the native CPU kernels, without autograd.

The same terms as those of `loss_terms` and its backward pass. Checks of arguments, dispatch and autograd are left out:
they take half as long as the kernels for 64 rows. The first layer of the shared decoder is evaluated once per code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from spinlock_fast.kernels._common.native import native_supports
from spinlock_fast.kernels.code_decoders import cpu as code_decoders
from spinlock_fast.kernels.code_mlp import cpu as code_mlp
from spinlock_fast.kernels.grouped_mlp import cpu as grouped_mlp
from spinlock_fast.kernels.latent_projection import cpu as latent_projection
from spinlock_fast.kernels.topo_loss import cpu as topo_loss
from spinlock_fast.kernels.vq_assign import Assignment
from spinlock_fast.kernels.vq_assign import cpu as vq_assign
from spinlock_fast.models.losses import TOPO_PRE_WEIGHT, LossTerms, LossWeights, code_orthogonality
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE
from spinlock_fast.quantize.quantization_loss import commitment_factors


def supports(model: CategoricalHierarchicalVQVAE, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether `loss_and_gradients` can train the model, which has these parameters, with its present options."""
    quantizer = model.quantizer
    return (
        type(model) is CategoricalHierarchicalVQVAE
        and model.training
        and not model.config.extra_inputs
        and quantizer.use_ema
        and not (quantizer.rotation_trick or quantizer.shared or quantizer.needs_initialization)
        and quantizer.requested_backend == "auto"
        and native_supports(*parameters, quantizer.embedding)
        and all(parameter.requires_grad for parameter in parameters)
    )


@torch.no_grad()
def loss_and_gradients(
    model: CategoricalHierarchicalVQVAE, target: Tensor, x: Tensor, topo_samples: int, weights: LossWeights
) -> tuple[LossTerms, Tensor]:
    """Computes the loss terms, sets the gradients of the parameters and updates the codes.

    Args:
        model: one that `supports` accepts.
        target: [B, F] float32 reconstruction targets.
        x: [B, F] float32 inputs.
        topo_samples: number of leading rows that enter the topographic term.
        weights: of the terms. Parameters of terms of weight 0 get no gradient.

    Returns:
        The terms, and the latents [B, sum D].
    """
    encoder = _Encoder(model, x)
    latents, quantizer = encoder.latents, model.quantizer
    layout, embedding = quantizer.layout, quantizer.embedding
    quantized, codes, errors, counts, sums = vq_assign.assign(
        latents, embedding, layout, None, quantizer.centred, with_sums=True
    )
    assignment = Assignment(codes, quantized, errors, counts, sums)
    error_factors = commitment_factors(errors, len(x), layout, quantizer.commitment_weight)
    vq = (errors * error_factors).sum()
    reconstruction, grad_quantized = _reconstruction(model, codes, target, weights.reconstruction)

    decoders = model.code_decoders
    partial, *saved = code_decoders.forward(target, codes, embedding, decoders, layout)
    if weights.informativeness != 0.0:
        grad = partial.new_tensor(weights.informativeness)
        grad_codes, *gradients = code_decoders.backward(grad, saved, decoders, layout, needs_quantized=True)
        _set_gradients(decoders, gradients)
        assert grad_codes is not None
        grad_quantized += grad_codes
    grad_errors = (error_factors * weights.vq)[None]
    grad_latents = vq_assign.backward(grad_quantized, grad_errors, latents, quantized, codes, layout)

    sample = slice(0, topo_samples)
    pre, post, *saved = topo_loss.forward(target[sample], latents[sample], codes[sample], embedding, layout)
    if weights.topographic != 0.0:
        grad_pre = pre.new_tensor(-weights.topographic * TOPO_PRE_WEIGHT)
        grad_post = pre.new_tensor(-weights.topographic * (1.0 - TOPO_PRE_WEIGHT))
        grad_latents[sample] += topo_loss.backward(grad_pre, grad_post, saved, layout)
    encoder.backward(grad_latents)

    quantizer.update(assignment, len(x))  # after all that reads the codes of this step
    topographic = 1.0 - torch.lerp(post, pre, TOPO_PRE_WEIGHT)
    return LossTerms(reconstruction, vq, code_orthogonality(quantizer), partial, topographic), latents


class _Encoder:
    """The encoder's latents [B, sum D] of rows x, and what its backward pass reads."""

    def __init__(self, model: CategoricalHierarchicalVQVAE, x: Tensor) -> None:
        self.layers = first, hidden_dropout, second, norm, head, dropout, head_norm = model.encoder_layers
        self.x = model.encoder_inputs(x)
        self.embedding, self.hidden = grouped_mlp.forward(
            self.x, first.weight, first.bias, second.weight, second.bias, first.inputs, hidden_dropout.p, None
        )
        self.deviation = latent_projection.normalize_(self.embedding, norm.eps)
        projected, self.scaled = latent_projection.scaled_output_linear(
            self.embedding, norm.weight, norm.bias, head.weight, head.bias, head.outputs
        )
        latents, *self.normalized = latent_projection.ragged_layer_norm(
            projected, head_norm.weight, head_norm.bias, head_norm.segments, head_norm.eps, dropout.p, None
        )
        assert latents is not None
        self.latents = latents

    def backward(self, grad_latents: Tensor) -> None:
        """Sets the gradients of the parameters."""
        first, hidden_dropout, second, norm, head, dropout, head_norm = self.layers
        grad, *gradients = latent_projection.ragged_layer_norm_backward(
            grad_latents, head_norm.weight, self.normalized, head_norm.segments, dropout.p, None, needs_x=True
        )
        _set_gradients((head_norm.weight, head_norm.bias), gradients)
        assert grad is not None
        parameters = norm.weight, norm.bias, head.weight, head.bias
        grad, *gradients = latent_projection.scaled_output_linear_backward(
            grad, (self.embedding, *parameters), (self.scaled,), head.outputs, needs_x=True
        )
        _set_gradients(parameters, gradients)
        assert grad is not None
        grad = latent_projection.normalize_backward(grad, self.embedding, self.deviation)
        parameters = first.weight, first.bias, second.weight, second.bias
        _, *gradients = grouped_mlp.backward(
            grad, (self.x, *parameters), (self.hidden,), first.inputs, hidden_dropout.p, needs_x=False
        )
        _set_gradients(parameters, gradients)


def _reconstruction(
    model: CategoricalHierarchicalVQVAE, codes: Tensor, target: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    """Mean squared error of the shared decoder, and the gradient of the code vectors; sets those of the parameters."""
    first, _, dropout, second = cast(tuple[nn.Linear, nn.ReLU, nn.Dropout, nn.Linear], tuple(model.shared_decoder))
    codebook, layout = model.quantizer.embedding, model.quantizer.layout
    w1, w2 = first.weight.t(), second.weight.t()
    decoded, hidden = code_mlp.forward(codes, codebook, w1, first.bias, w2, second.bias, layout, dropout.p)
    difference = decoded.sub_(target)
    error = difference.square().mean(1).mean()
    if weight == 0.0:
        return error, torch.zeros(len(codes), layout.total_dims)
    grad = difference.mul_(2.0 * weight / max(difference.numel(), 1))
    grad_codes, *gradients = code_mlp.backward(grad, codes, codebook, w1, w2, hidden, layout, dropout.p)
    grad_w1, grad_b1, grad_w2, grad_b2 = gradients
    parameters = first.weight, first.bias, second.weight, second.bias
    _set_gradients(parameters, (grad_w1.t(), grad_b1, grad_w2.t(), grad_b2))
    return error, grad_codes


def _set_gradients(parameters: Iterable[Tensor], gradients: Iterable[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
