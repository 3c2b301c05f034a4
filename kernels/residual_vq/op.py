"""Residual quantization with its gradient: argument checks, operators, choice of implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spinlock_fast.kernels._common.backend import resolve_backend
from spinlock_fast.kernels._common.export import exporting
from spinlock_fast.kernels._common.guard import BOOL, FLOAT, INTEGER, check
from spinlock_fast.kernels._common.higher_order import gradients, in_transform, needs_graph
from spinlock_fast.kernels._common.native import native_supports
from spinlock_fast.kernels._common.operator import operator
from spinlock_fast.kernels._common.precision import full_float32, no_autocast
from spinlock_fast.kernels._common.snapshot import snapshot
from spinlock_fast.kernels.residual_vq import cpu, reference
from spinlock_fast.kernels.residual_vq.reference import GRADIENTS, Result

Gradient = Literal["none", "straight_through", "rotation"]


@dataclass(frozen=True)
class ResidualAssignment:
    """Nearest codes of a batch at every stage, and the sums over rows that training needs."""

    quantized: Tensor  # [N, D] sum over stages; 0 where masked, NaN where a row is not finite
    codes: Tensor  # [N, Q] int64, -1 where masked or not finite
    errors: Tensor  # [Q] sum over rows that are not masked of |y - e|^2
    counts: Tensor  # [sum K] rows of each code
    sums: Tensor  # [sum K, D] sum of the rows of each code
    codebook: Tensor  # [sum K, D] copy of the codes that were used


def residual_vq(
    x: Tensor,
    codebooks: Sequence[Tensor],
    mask: Tensor | None = None,
    *,
    limit: Tensor | None = None,
    cosine: bool = False,
    gradient: Gradient = "none",
    with_sums: bool = True,
    backend: str = "auto",
) -> ResidualAssignment:
    """Quantizes rows stage by stage; each stage quantizes the residual of the stages before.

    Args:
        x: [N, D], rows may be strided; half precision is computed, and returned, in float32.
        codebooks: [K_q, D] of each stage; stages may share a tensor. They receive no gradient.
        mask: [N] bool; False excludes a row.
        limit: int64 scalar: only the first `limit` stages are computed, the others return code -1. A tensor on the CPU
            avoids a host synchronisation.
        cosine: each stage normalises its residual and selects the code with the largest dot product.
        gradient: gradient of each stage's output with respect to its input (Bengio et al. 2013, or the rotation trick,
            arXiv 2410.06424). `errors` always have their own.
        with_sums: False leaves counts and sums empty.
        backend: "auto", "triton" or "reference", see `resolve_backend`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: x, codebooks or mask do not fit each other, or lie on different devices.
    """
    named = [(f"codebooks[{q}]", codebook, (f"K_{q}", "D"), FLOAT) for q, codebook in enumerate(codebooks)]
    check("residual_vq", ("x", x, ("N", "D"), FLOAT), *named, ("mask", mask, ("N",), BOOL))
    check("residual_vq", ("limit", limit, (), INTEGER))  # by itself: it may lie on another device
    num_codes = [len(codebook) for codebook in codebooks]
    if not num_codes or min(num_codes) < 1:
        raise ValueError("residual_vq: every stage needs a codebook of at least 1 code")
    if gradient not in GRADIENTS:
        raise ValueError(f"residual_vq: gradient must be one of {', '.join(GRADIENTS)}, got {gradient!r}")
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    mask = None if mask is None else mask.contiguous()  # kernels read it with stride 1
    # Codebooks may be updated in place before the backward pass, which needs the codes of the forward pass: a copy.
    codebook = torch.cat([codebook.detach().to(x.dtype) for codebook in codebooks])
    codebook = snapshot(codebook) if len(codebooks) == 1 or torch.compiler.is_compiling() else codebook
    if gradient == "none" and exporting():
        outputs = reference.assign(x, codebook, num_codes, mask, cosine, gradient, with_sums)
    elif in_transform():
        outputs = _transformable(x, codebook, num_codes, mask, limit, cosine, gradient, with_sums)
    else:
        backend = resolve_backend(backend, codebook, x)
        outputs = _assign(x, codebook, num_codes, mask, limit, cosine, gradient, with_sums, backend)
        quantized, codes, errors, counts, sums = outputs
        outputs = quantized, codes, errors, counts.detach(), sums.detach()
    return ResidualAssignment(*outputs, codebook)


def _transformable(
    x: Tensor,
    codebook: Tensor,
    num_codes: Sequence[int],
    mask: Tensor | None,
    limit: Tensor | None,
    cosine: bool,
    gradient: str,
    with_sums: bool,
) -> Result:
    """The operator in PyTorch's own operations, which torch.func transforms."""
    used, codebook = _first_stages(codebook, num_codes, limit)
    _, codes, _, counts, sums = reference.assign(x.detach(), codebook, used, mask, cosine, gradient, with_sums)
    quantized, errors = reference.surrogate(x, codebook, codes, used, mask, cosine, gradient)
    return _pad_stages((quantized, codes, errors, counts, sums), num_codes, used, with_sums)


def _first_stages(codebook: Tensor, num_codes: Sequence[int], limit: Tensor | None) -> tuple[Sequence[int], Tensor]:
    """Sizes and packed codes [sum K, D] of the first `limit` stages."""
    if limit is None:
        return num_codes, codebook
    used = num_codes[: int(limit)]
    return used, codebook[: sum(used)]


def _pad_stages(outputs: Result, num_codes: Sequence[int], used: Sequence[int], with_sums: bool) -> Result:
    """Outputs of the first stages, extended to all stages by code -1, zero errors and zero counts."""
    stages, entries = len(num_codes) - len(used), sum(num_codes) - sum(used)
    if stages == 0:
        return outputs
    quantized, codes, errors, counts, sums = outputs
    codes, errors = F.pad(codes, (0, stages), value=-1), F.pad(errors, (0, stages))
    if with_sums:
        counts, sums = F.pad(counts, (0, entries)), F.pad(sums, (0, 0, 0, entries))
    return quantized, codes, errors, counts, sums


def _backward_fake(grad: Tensor, grad_errors: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@operator("residual_vq_backward", fake=_backward_fake)
def _assign_backward(
    grad: Tensor,
    grad_errors: Tensor,
    x: Tensor,
    codebook: Tensor,
    codes: Tensor,
    num_codes: Sequence[int],
    mask: Tensor | None,
    limit: Tensor | None,
    cosine: bool,
    gradient: str,
    backend: str,
) -> Tensor:
    used, codebook = _first_stages(codebook, num_codes, limit)
    grad_errors, codes = grad_errors[: len(used)], codes[:, : len(used)]
    backward: Callable[..., Tensor]
    with no_autocast(x.device):
        if backend == "triton":
            from spinlock_fast.kernels.residual_vq import triton_backward as triton

            backward = triton.backward if x.shape[1] <= triton.MAX_DIMS else reference.backward
        else:
            native = native_supports(grad, grad_errors, x, codebook)
            backward = cpu.backward if native else reference.backward
        return backward(grad, grad_errors, x, codebook, codes, used, mask, cosine, gradient)


def _fake(x: Tensor, codebook: Tensor, num_codes: Sequence[int], *options: Any) -> Result:
    _, _, _, _, with_sums, _ = options
    (N, D), Q, total = x.shape, len(num_codes), codebook.shape[0] if with_sums else 0
    codes = x.new_empty(N, Q, dtype=torch.int64)
    return x.new_empty(N, D), codes, x.new_empty(Q), x.new_empty(total), x.new_empty(total, D)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
    x, codebook, num_codes, mask, limit, cosine, gradient, _, backend = inputs
    ctx.save_for_backward(x, codebook, output[1], mask, limit)
    ctx.options = num_codes, cosine, gradient, backend
    ctx.set_materialize_grads(False)  # no zeros for codes, counts and sums


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    x, codebook, codes, mask, limit = ctx.saved_tensors
    num_codes, cosine, gradient, backend = ctx.options
    grad, _, grad_errors, *_ = grads
    grad = torch.zeros_like(x) if grad is None else grad
    grad_errors = x.new_zeros(len(num_codes)) if grad_errors is None else grad_errors
    if needs_graph(grads):
        used, codebook = _first_stages(codebook, num_codes, limit)

        def surrogate(rows: Tensor) -> tuple[Tensor, Tensor]:
            return reference.surrogate(rows, codebook, codes, used, mask, cosine, gradient)

        return tuple(gradients(surrogate, [x], [grad, grad_errors[: len(used)]], [True]))
    return (_assign_backward(grad, grad_errors, x, codebook, codes, num_codes, mask, limit, cosine, gradient, backend),)


@operator("residual_vq", fake=_fake, setup_context=_setup_context, backward=_backward)
def _assign(
    x: Tensor,
    codebook: Tensor,
    num_codes: Sequence[int],
    mask: Tensor | None,
    limit: Tensor | None,
    cosine: bool,
    gradient: str,
    with_sums: bool,
    backend: str,
) -> Result:
    used, codebook = _first_stages(codebook, num_codes, limit)
    assign: Callable[..., Result]
    # Distances in half precision (autocast) or TF32 would select other codes.
    with no_autocast(x.device), full_float32(x.device):
        if backend == "triton":
            from spinlock_fast.kernels.residual_vq import triton_forward as triton

            assign = triton.assign
        else:
            assign = cpu.assign if native_supports(x, codebook) else reference.assign
        outputs = assign(x, codebook, used, mask, cosine, gradient, with_sums)
    return _pad_stages(outputs, num_codes, used, with_sums)
