"""The steps of the projection in batched PyTorch operations on padded groups: any device and type."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spinlock_fast.kernels._common.ragged import Ragged


def scaled_output_linear(
    x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, outputs: Ragged
) -> tuple[Tensor, ...]:
    """The output [B, sum n], the padded weights [G, n_max, in], and these times gain."""
    weight = outputs.pad_rows(weight)
    scaled = weight * gain[:, None]
    offset = outputs.pad_rows(bias) + (weight @ shift[:, :, None])[:, :, 0]
    return outputs.pack_columns(torch.baddbmm(offset[:, None], x, scaled.transpose(1, 2))), weight, scaled


def scaled_output_linear_backward(
    grad: Tensor, tensors: Sequence[Tensor], saved: Sequence[Tensor], outputs: Ragged, needs_x: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of x, gain, shift, weight, bias."""
    x, gain, shift = tensors[:3]
    weight, scaled = saved
    padded = outputs.pad_columns(grad)  # [G, B, n_max]
    grad_bias = grad.sum(0)
    grad_offset = outputs.pad_rows(grad_bias)[:, :, None]
    grad_scaled = padded.transpose(1, 2) @ x  # [G, n_max, in]
    return (
        padded @ scaled if needs_x else None,
        (grad_scaled * weight).sum(1),
        (grad_offset * weight).sum(1),
        outputs.pack_rows((grad_scaled * gain[:, None]).addcmul_(grad_offset, shift[:, None])),
        grad_bias,
    )


def ragged_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, segments: Ragged, eps: float) -> tuple[Tensor, ...]:
    """The output, the normalised values and the reciprocal deviations, [B, sum n] each."""
    centred = x - _segment_means(x, segments)
    deviation = (_segment_means(centred.square(), segments) + eps).rsqrt_()
    normed = centred * deviation  # not in place: autograd may read `centred`
    return torch.addcmul(bias, normed, weight), normed, deviation


def ragged_layer_norm_backward(
    grad: Tensor, weight: Tensor, saved: Sequence[Tensor], segments: Ragged, needs_x: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias."""
    normed, deviation = saved
    grad_normed = grad * weight
    grad_x = None
    if needs_x:
        along = _segment_means(grad_normed * normed, segments)
        grad_x = (grad_normed - _segment_means(grad_normed, segments)).addcmul_(normed, along, value=-1.0)
        grad_x.mul_(deviation)
    return grad_x, (grad * normed).sum(0), grad.sum(0)


def _segment_means(x: Tensor, segments: Ragged) -> Tensor:
    """[B, sum n], in every column the mean over its segment."""
    index = segments.indices(x.device)
    sums = segments.pad_columns(x).sum(-1)  # [G, B]
    return (sums / index.sizes[:, None].to(x.dtype)).t().index_select(1, index.group)
