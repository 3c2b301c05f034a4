"""A training step of one codebook in eager mode on the CPU: a plain autograd function around one native call.

It returns what `VectorQuantize` returns, in the shapes of the input, and updates the moving averages in the same call:
for small batches, host time is most of a step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spinlock_fast.kernels._common.higher_order import gradients, in_transform, needs_graph
from spinlock_fast.kernels._common.native import address, library, native_supports
from spinlock_fast.kernels._common.operator import is_plain_call
from spinlock_fast.kernels.residual_vq import reference
from spinlock_fast.kernels.residual_vq.reference import GRADIENTS, Stages


class StepOptions(NamedTuple):
    """Options of `quantize_step`."""

    cosine: bool  # normalises rows and selects the code with the largest dot product
    gradient: str  # a key of GRADIENTS; with "none", `quantized` has no gradient
    weight: float  # the loss is `weight` times the mean squared error
    heads: int  # vectors per position, which share the codebook
    decay: float  # of the moving averages
    epsilon: float  # of their Laplace smoothing


class Averages(NamedTuple):
    """State that the step updates together with the codes, see `ema_update.averages`."""

    cluster_size: Tensor  # [K]
    code_sum: Tensor  # [K, D]
    usage: Tensor  # [K] int64


# quantized [..., heads * D], codes [...] ([..., heads] with several heads), loss scalar
Result = tuple[Tensor, Tensor, Tensor]


def supports(x: Tensor, codebook: Tensor) -> bool:
    """Whether `quantize_step` can compute on these tensors."""
    return (
        is_plain_call((x, codebook))
        and native_supports(x, codebook)
        and codebook.is_contiguous()
        and not in_transform()
    )


def quantize_step(
    x: Tensor,
    codebook: Tensor,
    options: StepOptions,
    averages: Averages | None = None,
    counts: Tensor | None = None,
    sums: Tensor | None = None,
) -> Result:
    """Nearest codes of x, see `op.residual_vq`.

    Args:
        x: [..., heads * D] float32, not empty, see `supports`.
        codebook: [K, D], or with leading dimensions of size 1.
        options: of the step.
        averages: updated with the batch, and then the codes; None for no update.
        counts: [K] rows of each code in the batch, written unless None.
        sums: [K, D] sums of these rows, written unless None.
    """
    if x.requires_grad and torch.is_grad_enabled():
        return _Step.apply(x, codebook, options, averages, counts, sums)  # type: ignore[no-untyped-call, no-any-return]
    return _run(x.contiguous(), codebook, options, averages, counts, sums, None, None)


def _run(
    x: Tensor,
    codebook: Tensor,
    options: StepOptions,
    averages: Averages | None,
    counts: Tensor | None,
    sums: Tensor | None,
    saved_codebook: Tensor | None,
    saved_codes: Tensor | None,
) -> Result:
    cosine, gradient, weight, heads, decay, epsilon = options
    K, D = codebook.shape[-2:]
    shape = x.shape[:-1]
    codes = x.new_empty((*shape, heads) if heads > 1 else shape, dtype=torch.int64)
    quantized, loss = torch.empty_like(x), x.new_empty(())
    state = (0, 0, 0) if averages is None else (address(averages[0]), address(averages[1]), address(averages[2]))
    library.quantize_step(
        x.data_ptr(), codes.numel(), D, codebook.data_ptr(), K, cosine, GRADIENTS[gradient], weight, codes.data_ptr(),
        quantized.data_ptr(), loss.data_ptr(), address(saved_codebook), address(saved_codes), address(counts),
        address(sums), *state, 1.0 - decay, epsilon, torch.get_num_threads(),
    )  # fmt: skip
    return quantized, codes, loss


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codebook: Tensor, options: StepOptions, averages: Any, counts: Any, sums: Any
    ) -> Any:
        x, saved_codebook = x.contiguous(), torch.empty_like(codebook)
        # A copy, since callers may change the codes that they get.
        saved_codes = x.new_empty(x.numel() // codebook.shape[-1], dtype=torch.int64)
        result = _run(x, codebook, options, averages, counts, sums, saved_codebook, saved_codes)
        ctx.save_for_backward(x, saved_codebook, saved_codes)
        ctx.options = options
        ctx.set_materialize_grads(False)
        quantized, codes, _ = result
        ctx.mark_non_differentiable(*((codes, quantized) if options.gradient == "none" else (codes,)))
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, codebook, codes = ctx.saved_tensors
        cosine, gradient, weight, *_ = ctx.options
        grad, _, grad_loss = grads
        K, D = codebook.shape[-2:]
        rows = codes.numel()
        grad = torch.zeros_like(x) if grad is None else grad.contiguous()
        grad_loss = x.new_zeros(()) if grad_loss is None else grad_loss
        if not needs_graph(grads) and native_supports(grad, grad_loss, x, codebook):
            grad_x = torch.empty_like(x)
            library.quantize_step_backward(
                grad.data_ptr(), grad_loss.data_ptr(), x.data_ptr(), rows, D, codebook.data_ptr(), K, codes.data_ptr(),
                cosine, GRADIENTS[gradient], weight, grad_x.data_ptr(), torch.get_num_threads(),
            )  # fmt: skip
            return grad_x, *(None,) * 5
        stages = Stages([K], None, cosine, gradient)

        def surrogate(latents: Tensor) -> tuple[Tensor, Tensor]:
            quantized, errors = reference.surrogate(
                latents.reshape(rows, D), codebook.view(K, D), codes.view(rows, 1), stages
            )
            return quantized.view(x.shape), errors[0] / (rows * D) * weight

        return *gradients(surrogate, [x], [grad, grad_loss], [True]), *(None,) * 5
