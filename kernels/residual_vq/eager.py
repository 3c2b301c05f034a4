"""A training step of `VectorQuantize` in eager mode: a plain autograd function around one native call, or few launches.

It returns what `VectorQuantize` returns, in the shapes of the input, and updates the moving averages in the same call:
for small batches, host time is most of a step.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from spinlock_fast.kernels._common.backend import resolve_backend
from spinlock_fast.kernels._common.higher_order import gradients, in_transform, needs_graph
from spinlock_fast.kernels._common.native import address, library, native_supports
from spinlock_fast.kernels._common.operator import is_plain_call
from spinlock_fast.kernels.residual_vq import reference
from spinlock_fast.kernels.residual_vq.reference import GRADIENTS, Averages, Stages

Implementation = Literal["cpu", "triton"]


class StepOptions(NamedTuple):
    """Options of `quantize_step`."""

    cosine: bool  # normalises rows and selects the code with the largest dot product
    gradient: str  # a key of GRADIENTS; with "none", `quantized` has no gradient
    weight: float  # the loss is `weight` times the mean squared error
    heads: int  # vectors per position, which share the codebook if there is one
    decay: float  # of the moving averages
    epsilon: float  # of their Laplace smoothing
    implementation: Implementation = "cpu"


# quantized [..., heads * D], codes [...] ([..., heads] with several heads), loss scalar
Result = tuple[Tensor, Tensor, Tensor]


def choose_implementation(x: Tensor, codebook: Tensor) -> Implementation | None:
    """What computes `quantize_step` on these tensors; None if nothing does."""
    if not is_plain_call((x, codebook)) or not codebook.is_contiguous() or in_transform():
        return None
    if native_supports(x, codebook):
        return "cpu" if len(codebook) == 1 else None
    narrow = codebook.dtype == torch.float32 and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    if not narrow or x.device != codebook.device:
        return None
    return "triton" if resolve_backend("auto", codebook, x) == "triton" else None


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
        x: [..., heads * D], not empty; see `choose_implementation`.
        codebook: [G, K, D]; G is 1 (the heads share it) or the number of heads.
        options: of the step.
        averages: updated with the batch, and then the codes; None for no update.
        counts: [G, K] rows of each code in the batch, written unless None.
        sums: [G, K, D] sums of these rows, written unless None.
    """
    if x.requires_grad and torch.is_grad_enabled():
        return _Step.apply(x, codebook, options, averages, counts, sums)  # type: ignore[no-untyped-call, no-any-return]
    if options.implementation == "triton":
        return _run_triton(x.contiguous(), codebook, options, averages, counts, sums, keep=False)[0]
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
    cosine, gradient, weight, heads, decay, epsilon, _ = options
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


def _run_triton(
    x: Tensor,
    codebook: Tensor,
    options: StepOptions,
    averages: Averages | None,
    counts: Tensor | None,
    sums: Tensor | None,
    *,
    keep: bool,
) -> tuple[Result, Tensor | None, Tensor]:
    """The results, the codes before the update if `keep`, and indices [G, N] int32."""
    from spinlock_fast.kernels.residual_vq import triton_step

    G, _, D = codebook.shape
    found = triton_step.forward(
        x.view(-1, G * D), codebook, cosine=options.cosine, gradient=options.gradient, weight=options.weight,
        averages=averages, decay=options.decay, epsilon=options.epsilon, counts=counts, sums=sums, keep=keep,
    )  # fmt: skip
    shape = x.shape[:-1]
    codes = found.codes.view((*shape, options.heads) if options.heads > 1 else shape)
    return (found.quantized.view(x.shape), codes, found.loss), found.codebook, found.code


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codebook: Tensor, options: StepOptions, averages: Any, counts: Any, sums: Any
    ) -> Any:
        x = x.contiguous()
        saved_codebook: Tensor | None
        if options.implementation == "triton":
            result, saved_codebook, saved_codes = _run_triton(x, codebook, options, averages, counts, sums, keep=True)
        else:
            saved_codebook = torch.empty_like(codebook)
            # A copy, since callers may change the codes that they get.
            saved_codes = x.new_empty(1, x.numel() // codebook.shape[-1], dtype=torch.int64)
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
        grad, _, grad_loss = grads
        if needs_graph(grads):
            return _differentiable_gradient(x, codebook, codes, ctx.options, grad, grad_loss), *(None,) * 5
        if ctx.options.implementation == "triton":
            from spinlock_fast.kernels.residual_vq import triton_step

            G, _, D = codebook.shape
            rows = None if grad is None else grad.resolve_neg().reshape(-1, G * D)
            cosine, gradient, weight, *_ = ctx.options
            grad_x = triton_step.backward(
                rows, grad_loss, x.view(-1, G * D), codebook, codes, cosine=cosine, gradient=gradient, weight=weight
            )
            return grad_x.view(x.shape), *(None,) * 5
        return _native_gradient(x, codebook, codes, ctx.options, grad, grad_loss), *(None,) * 5


def _native_gradient(
    x: Tensor, codebook: Tensor, codes: Tensor, options: StepOptions, grad: Tensor | None, grad_loss: Tensor | None
) -> Tensor | None:
    cosine, gradient, weight, *_ = options
    K, D = codebook.shape[-2:]
    grad = torch.zeros_like(x) if grad is None else grad.contiguous()
    grad_loss = x.new_zeros(()) if grad_loss is None else grad_loss
    if not native_supports(grad, grad_loss, x, codebook):
        return _differentiable_gradient(x, codebook, codes, options, grad, grad_loss)
    grad_x = torch.empty_like(x)
    library.quantize_step_backward(
        grad.data_ptr(), grad_loss.data_ptr(), x.data_ptr(), codes.numel(), D, codebook.data_ptr(), K, codes.data_ptr(),
        cosine, GRADIENTS[gradient], weight, grad_x.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return grad_x


def _differentiable_gradient(
    x: Tensor, codebook: Tensor, codes: Tensor, options: StepOptions, grad: Tensor | None, grad_loss: Tensor | None
) -> Tensor | None:
    """Gradient of x by PyTorch's operations, which autograd differentiates again."""
    G, K, D = codebook.shape
    stages, index = Stages([K], None, options.cosine, options.gradient), codes.to(torch.int64)

    def surrogate(latents: Tensor) -> tuple[Tensor, Tensor]:
        rows = latents.reshape(-1, G, D).to(codebook.dtype)
        heads = [reference.surrogate(rows[:, g], codebook[g], index[g][:, None], stages) for g in range(G)]
        quantized = torch.stack([quantized for quantized, _ in heads], 1).view(x.shape).to(x.dtype)
        return quantized, torch.stack([errors for _, errors in heads]).sum() / x.numel() * options.weight

    return gradients(surrogate, [x], [grad, grad_loss], [True])[0]
