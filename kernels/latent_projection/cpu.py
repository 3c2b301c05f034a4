"""The steps of the projection by the native CPU kernels, without padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spinlock_fast.kernels._common.dropout import BatchSlice, draw_seed
from spinlock_fast.kernels._common.native import address, library
from spinlock_fast.kernels._common.ragged import Ragged


def scaled_output_linear(
    x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, outputs: Ragged
) -> tuple[Tensor, ...]:
    """The output [B, sum n], and the weights times gain."""
    x, gain, shift, weight, bias = (tensor.contiguous() for tensor in (x, gain, shift, weight, bias))
    _, B, width = x.shape
    scaled, out = torch.empty_like(weight), x.new_empty(B, outputs.total)
    library.output_linear(
        address(x), address(gain), address(shift), address(weight), address(bias), list(outputs.sizes), B, width,
        address(scaled), address(out), torch.get_num_threads(),
    )  # fmt: skip
    return out, scaled


def scaled_output_linear_backward(
    grad: Tensor, tensors: Sequence[Tensor], saved: Sequence[Tensor], outputs: Ragged, needs_x: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of x, gain, shift, weight, bias."""
    x, gain, shift, weight, _ = (tensor.contiguous() for tensor in tensors)
    (scaled,) = saved
    _, B, width = x.shape
    grad = grad.contiguous()
    grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.empty_like(weight), x.new_empty(outputs.total)
    grad_gain, grad_shift = torch.empty_like(gain), torch.empty_like(shift)
    library.output_linear_backward(
        address(grad), address(x), address(gain), address(shift), address(weight), address(scaled),
        list(outputs.sizes), B, width, address(grad_x), address(grad_gain), address(grad_shift), address(grad_weight),
        address(grad_bias), torch.get_num_threads(),
    )  # fmt: skip
    return grad_x, grad_gain, grad_shift, grad_weight, grad_bias


def ragged_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    segments: Ragged,
    eps: float,
    dropout: float,
    batch: BatchSlice | None,
) -> tuple[Tensor | None, ...]:
    """The output; the normalised values [B, sum n], reciprocal deviations [B, segments] and the seed of dropout."""
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    B = x.shape[0]
    seed = draw_seed(x.device) if dropout > 0.0 else None
    normed, deviation, out = torch.empty_like(x), x.new_empty(B, segments.groups), torch.empty_like(x)
    library.segments(
        address(x), B, list(segments.sizes), address(weight), address(bias), eps, dropout, address(seed),
        batch.first if batch else 0, address(normed), address(deviation), address(out), torch.get_num_threads(),
    )  # fmt: skip
    return out, normed, deviation, seed


def ragged_layer_norm_backward(
    grad: Tensor,
    weight: Tensor,
    saved: Sequence[Tensor | None],
    segments: Ragged,
    dropout: float,
    batch: BatchSlice | None,
    needs_x: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias."""
    normed, deviation, seed = saved
    assert normed is not None
    grad, weight = grad.contiguous(), weight.contiguous()
    grad_x, grad_weight, grad_bias = torch.empty_like(normed), torch.empty_like(weight), torch.empty_like(weight)
    library.segments_backward(
        address(grad), address(normed), address(deviation), normed.shape[0], list(segments.sizes), address(weight),
        dropout, address(seed), batch.first if batch else 0, address(grad_x), address(grad_weight), address(grad_bias),
        torch.get_num_threads(),
    )  # fmt: skip
    return grad_x, grad_weight, grad_bias


def normalize_(x: Tensor, eps: float) -> Tensor:
    """Normalises the last dimension of x in place; returns the reciprocal deviations."""
    deviation = x.new_empty(x.shape[:-1])
    library.normalize(address(x), deviation.numel(), x.shape[-1], eps, address(deviation), torch.get_num_threads())
    return deviation


def normalize_backward(grad: Tensor, normed: Tensor, deviation: Tensor) -> Tensor:
    """Gradient of the input of `normalize_`."""
    grad = grad.contiguous()
    grad_x = torch.empty_like(grad)
    library.normalize_backward(
        address(grad), address(normed), address(deviation), deviation.numel(), grad.shape[-1], address(grad_x),
        torch.get_num_threads(),
    )  # fmt: skip
    return grad_x
