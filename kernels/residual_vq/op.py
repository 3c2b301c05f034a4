"""What callers use: all stages at once, with a gradient. The operators of `torch.library`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from spinlock_fast.kernels._common.guard import BOOL, FLOAT, INTEGER, check
from spinlock_fast.kernels._common.higher_order import gradients, in_transform, needs_graph
from spinlock_fast.kernels.backend import resolve_backend
from spinlock_fast.kernels.export import exporting
from spinlock_fast.kernels.native import serves
from spinlock_fast.kernels.precision import full_float32
from spinlock_fast.kernels.residual_vq import native, reference
from spinlock_fast.kernels.residual_vq.reference import Result
from spinlock_fast.kernels.snapshot import snapshot

Gradient = Literal["none", "straight_through", "rotation"]
_GRADIENTS = get_args(Gradient)


@dataclass(frozen=True)
class ResidualAssignment:
    """The codes of a batch and what training needs of them."""

    quantized: Tensor  # [N, D] sum over stages; 0 where masked, NaN where a row is not finite
    codes: Tensor  # [N, Q] int64, -1 where masked or not finite
    errors: Tensor  # [Q] sum over rows that are not masked of |y - e|^2
    counts: Tensor  # [sum K] rows of each code
    sums: Tensor  # [sum K, D] sum of the rows of each code
    codebook: Tensor  # [sum K, D] the codes as they were


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
    """Quantizes rows, then what each stage leaves over.

    Args:
        x: [N, D], rows may be strided; half precision is computed, and returned, in float32.
        codebooks: [K_q, D] of each stage; one tensor may serve several. They take no gradient here.
        mask: [N] bool; rows that are False take no part.
        limit: int64 scalar: stages after the first `limit` take no part (code -1). A tensor on the CPU spares a wait.
        cosine: each stage scales what it is given to length 1 and takes the code of the greatest dot product.
        gradient: how `quantized` passes its gradient to x at each stage (Bengio et al. 2013, or arXiv 2410.06424).
            `errors` always carry theirs.
        with_sums: False leaves counts and sums empty.
        backend: "auto", "triton" or "reference", see `resolve_backend`.

    Raises:
        TypeError: an argument of another type.
        ValueError: x, codebooks or mask do not fit each other, or lie on different devices.
    """
    books = [(f"codebooks[{q}]", book, (f"K_{q}", "D"), FLOAT) for q, book in enumerate(codebooks)]
    check("residual_vq", ("x", x, ("N", "D"), FLOAT), *books, ("mask", mask, ("N",), BOOL))
    check("residual_vq", ("limit", limit, (), INTEGER))  # which may lie on the CPU
    if not books or min(len(book) for book in codebooks) < 1:
        raise ValueError("residual_vq: every stage needs a codebook of at least 1 code")
    if gradient not in _GRADIENTS:
        raise ValueError(f"residual_vq: gradient must be one of {', '.join(_GRADIENTS)}, got {gradient!r}")
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    mask = None if mask is None else mask.contiguous()  # kernels step through it one by one
    # A copy of its own: codes move in place after the forward pass, and the backward pass needs them as they were.
    packed = torch.cat([book.detach().to(x.dtype) for book in codebooks])
    packed = snapshot(packed) if len(codebooks) == 1 or torch.compiler.is_compiling() else packed
    sizes = [len(book) for book in codebooks]
    if gradient == "none" and exporting():
        return ResidualAssignment(*reference.assign(x, packed, sizes, mask, cosine, gradient, with_sums), packed)
    if in_transform():
        return _in_plain_torch(x, packed, sizes, mask, limit, cosine, gradient, with_sums)
    found = torch.ops.spinlock_fast.residual_vq(
        x,
        packed,
        sizes,
        mask,
        limit,
        cosine,
        gradient,
        with_sums,
        resolve_backend(backend, packed, x),
    )
    quantized, codes, errors, counts, sums = found
    return ResidualAssignment(quantized, codes, errors, counts.detach(), sums.detach(), packed)


def _in_plain_torch(
    x: Tensor,
    codebook: Tensor,
    num_codes: list[int],
    mask: Tensor | None,
    limit: Tensor | None,
    cosine: bool,
    gradient: str,
    with_sums: bool,
) -> ResidualAssignment:
    taken = num_codes if limit is None else num_codes[: int(limit)]
    used = codebook[: sum(taken)]
    found = reference.assign(x.detach(), used, taken, mask, cosine, gradient, with_sums)
    quantized, errors = reference.passed_on(x, used, found[1], taken, mask, cosine, gradient)
    found = quantized, found[1], errors, *found[3:]
    return ResidualAssignment(*_padded(found, num_codes, taken, with_sums), codebook)


torch.library.define(
    "spinlock_fast::residual_vq",
    "(Tensor x, Tensor codebook, int[] num_codes, Tensor? mask, Tensor? limit, bool cosine, str gradient,"
    " bool with_sums, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "spinlock_fast::residual_vq_backward",
    "(Tensor grad, Tensor grad_errors, Tensor x, Tensor codebook, Tensor codes, int[] num_codes, Tensor? mask,"
    " Tensor? limit, bool cosine, str gradient, str backend) -> Tensor",
)


def _assign_of(backend: str, *tensors: Tensor) -> Callable[..., Result]:
    if backend == "triton":
        from spinlock_fast.kernels.residual_vq import staged, triton

        return triton.assign if tensors[0].shape[1] <= triton.MAX_DIMS else staged.assign
    return native.assign if serves(*tensors) else reference.assign


def _backward_of(backend: str, *tensors: Tensor) -> Callable[..., Tensor]:
    if backend == "triton":
        from spinlock_fast.kernels.residual_vq import triton

        return triton.backward if tensors[0].shape[1] <= triton.MAX_DIMS else reference.backward
    return native.backward if serves(*tensors) else reference.backward


@torch.library.impl("spinlock_fast::residual_vq", "default")
def _residual_vq(
    x: Tensor,
    codebook: Tensor,
    num_codes: list[int],
    mask: Tensor | None,
    limit: Tensor | None,
    cosine: bool,
    gradient: str,
    with_sums: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # Half precision and TF32 would pick other codes.
    with torch.autocast(x.device.type, enabled=False), full_float32(x.device):
        assign = _assign_of(backend, x, codebook)
        if limit is None:
            return assign(x, codebook, num_codes, mask, cosine, gradient, with_sums)
        taken = num_codes[: int(limit)]
        found = assign(x, codebook[: sum(taken)], taken, mask, cosine, gradient, with_sums)
    return _padded(found, num_codes, taken, with_sums)


def _padded(found: Result, num_codes: Sequence[int], taken: Sequence[int], with_sums: bool) -> Result:
    """Results of the first stages, and what the others have: code -1, no rows."""
    left, codes_left = len(num_codes) - len(taken), sum(num_codes) - sum(taken)
    quantized, codes, errors, counts, sums = found
    codes, errors = F.pad(codes, (0, left), value=-1), F.pad(errors, (0, left))
    if with_sums:
        counts, sums = F.pad(counts, (0, codes_left)), F.pad(sums, (0, 0, 0, codes_left))
    return quantized, codes, errors, counts, sums


def _fake_residual_vq(
    x: Tensor,
    codebook: Tensor,
    num_codes: list[int],
    mask: Tensor | None,
    limit: Tensor | None,
    cosine: bool,
    gradient: str,
    with_sums: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    Q, total = len(num_codes), codebook.shape[0] if with_sums else 0
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape[0], Q, dtype=torch.int64),
        x.new_empty(Q),
        x.new_empty(total),
        x.new_empty(total, x.shape[1]),
    )


torch.library.register_fake("spinlock_fast::residual_vq", _fake_residual_vq)


@torch.library.impl("spinlock_fast::residual_vq_backward", "default")
def _residual_vq_backward(
    grad: Tensor,
    grad_errors: Tensor,
    x: Tensor,
    codebook: Tensor,
    codes: Tensor,
    num_codes: list[int],
    mask: Tensor | None,
    limit: Tensor | None,
    cosine: bool,
    gradient: str,
    backend: str,
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        backward = _backward_of(backend, grad, grad_errors, x, codebook)
        taken = num_codes if limit is None else num_codes[: int(limit)]
        grad_errors, codes = grad_errors[: len(taken)], codes[:, : len(taken)]
        return backward(grad, grad_errors, x, codebook[: sum(taken)], codes, taken, mask, cosine, gradient)


def _fake_residual_vq_backward(
    grad: Tensor,
    grad_errors: Tensor,
    x: Tensor,
    codebook: Tensor,
    codes: Tensor,
    num_codes: list[int],
    mask: Tensor | None,
    limit: Tensor | None,
    cosine: bool,
    gradient: str,
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape)


torch.library.register_fake("spinlock_fast::residual_vq_backward", _fake_residual_vq_backward)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, codebook, num_codes, mask, limit, cosine, gradient, _, backend = inputs
    ctx.save_for_backward(x, codebook, output[1], mask, limit)
    ctx.options = num_codes, cosine, gradient, backend
    ctx.set_materialize_grads(True)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    x, codebook, codes, mask, limit = ctx.saved_tensors
    num_codes, cosine, gradient, backend = ctx.options
    if needs_graph(grads):
        taken = num_codes if limit is None else num_codes[: int(limit)]

        def formula(rows: Tensor) -> tuple[Tensor, Tensor]:
            return reference.passed_on(rows, codebook[: sum(taken)], codes, taken, mask, cosine, gradient)

        return gradients(formula, [x], [grads[0], grads[2][: len(taken)]], [True])[0], *(None,) * 8
    of_x = torch.ops.spinlock_fast.residual_vq_backward(
        grads[0], grads[2], x, codebook, codes, num_codes, mask, limit, cosine, gradient, backend
    )
    return of_x, None, None, None, None, None, None, None, None


torch.library.register_autograd("spinlock_fast::residual_vq", _backward, setup_context=_keep)
