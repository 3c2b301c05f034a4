"""What callers use: the loss of the partial decoders in code space, and what evaluation needs of them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from spinlock_fast.kernels._common.backend import Backend, runs_triton
from spinlock_fast.kernels._common.guard import FLOAT, INDEX, SAME, check, check_codes
from spinlock_fast.kernels._common.higher_order import in_transform, needs_graph
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.native import native_supports
from spinlock_fast.kernels.code_decoders import native, reference
from spinlock_fast.kernels.code_decoders.reference import Decoders

# Rows enter the sums over codes in blocks, so that this many entries of the one-hot matrix exist at once.
_ONE_HOT_AT_ONCE = 1 << 24


def partial_loss(
    x: Tensor,
    quantized: Tensor,
    codes: Tensor,
    codebook: Tensor,
    decoders: Decoders,
    layout: CodebookLayout,
    backend: Backend = "auto",
) -> Tensor:
    """Mean over codebooks, rows and features of (P_g(e_g) - x)^2; P_g is evaluated for every code once.

    Equal to `reference.partial_loss(x, quantized, decoders, layout)` up to rounding, and so are its gradients.

    Args:
        x: [B, F]; no gradient.
        quantized: [B, sum D] the codes of the rows; differentiable.
        codes: [B, G] int64, their indices; -1 anywhere makes the loss NaN; on a GPU, so does one that is too large.
        codebook: [sum K D] the code vectors that `codes` refer to; no gradient.
        decoders: differentiable.
        layout: sizes of the group.
        backend: "auto", "triton" or "reference", see `resolve_backend`. Half precision is computed in float32.

    Raises:
        TypeError: an argument of another type.
        ValueError: shapes that do not fit each other, or tensors on different devices.
        IndexError: on a CPU, a code outside its codebook.
    """
    G = layout.groups
    check(
        "partial_loss",
        ("x", x, ("B", "F"), FLOAT),
        ("quantized", quantized, ("B", layout.total_dims), FLOAT),
        ("codes", codes, ("B", G), INDEX),
        ("codebook", codebook, (layout.total_entries,), FLOAT),
        ("decoders.w1", decoders.w1, (layout.total_dims, "H"), SAME),
        ("decoders.b1", decoders.b1, (G, "H"), SAME),
        ("decoders.w2", decoders.w2, (G, "H", "F"), SAME),
        ("decoders.b2", decoders.b2, (G, "F"), SAME),
    )
    wide = functools.reduce(torch.promote_types, [t.dtype for t in (x, quantized, *decoders)], torch.float32)
    x, quantized, codebook, *parameters = (t.to(wide) for t in (x, quantized, codebook, *decoders))
    decoders = Decoders(*parameters)
    if in_transform():
        return reference.loss_of_codes(x.detach(), quantized, codes, decoders, layout)
    tensors = (x, quantized, codebook, *decoders)
    function: type[torch.autograd.Function] = _PartialLoss
    if backend == "auto" and native_supports(*tensors):
        function = native.PartialLoss
    elif runs_triton(backend, *tensors):
        from spinlock_fast.kernels.code_decoders import triton

        function = triton.PartialLoss
    else:
        check_codes("partial_loss", codes, layout)
    loss: Tensor = function.apply(x.detach(), quantized, codes, codebook.detach(), *decoders, layout)
    return loss


class _PartialLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        quantized: Tensor,
        codes: Tensor,
        codebook: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        layout: CodebookLayout,
    ) -> Tensor:
        given = x, quantized, w1, b1, w2, b2
        mean = x.mean(0)
        x = x - mean  # what follows cancels less about the mean
        vectors, w1 = _pad(codebook.to(w1.dtype), w1, layout)
        hidden = torch.baddbmm(b1[:, None], vectors, w1).relu_()  # [G, K, H]
        decoded = torch.baddbmm((b2 - mean)[:, None], hidden, w2)  # [G, K, F]
        counts, sums = code_statistics(x, codes, layout)
        code_means = sums / counts.clamp(min=1.0)
        off = decoded - code_means
        scatter = layout.groups * x.square().sum() - (counts * code_means.square()).sum()
        loss = ((counts * off.square()).sum() + scatter) / (layout.groups * x.numel())
        ctx.layout = layout
        ctx.save_for_backward(*given, x, codes, vectors, w1, hidden, decoded, off * counts)
        sizes = layout.indices(codes.device).num_codes
        return loss.masked_fill(((codes < 0) | (codes >= sizes)).any(), torch.nan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layout: CodebookLayout = ctx.layout
        features, *given, x, codes, vectors, w1, hidden, decoded, off = ctx.saved_tensors
        if needs_graph(grads):
            return reference.gradients_of_loss(features, codes, given, layout, grads, ctx.needs_input_grad)
        w2 = given[3]
        scale = grads[0] * (2.0 / max(layout.groups * x.numel(), 1))
        of_decoded = off * scale
        of_hidden = (of_decoded @ w2.transpose(1, 2)).masked_fill_(hidden == 0.0, 0.0)
        of_quantized = None
        if ctx.needs_input_grad[1]:
            of_quantized = _pull(x, codes, decoded, hidden, w1, w2, layout).mul_(scale)
        return (
            None,
            of_quantized,
            None,
            None,
            (vectors.transpose(1, 2) @ of_hidden).flatten(0, 1)[layout.indices(x.device).packed_columns],
            of_hidden.sum(1),
            hidden.transpose(1, 2) @ of_decoded,
            of_decoded.sum(1),
            None,
        )


def _pull(
    x: Tensor, codes: Tensor, decoded: Tensor, hidden: Tensor, w1: Tensor, w2: Tensor, layout: CodebookLayout
) -> Tensor:
    """((P_k - x_b) W2^T * relu'_k) W1^T for the code k of every row and codebook, [B, sum D]."""
    G, K, H = hidden.shape
    active = (hidden > 0.0).to(x.dtype)
    back = decoded @ w2.transpose(1, 2)  # [G, K, H]
    row = torch.arange(G, device=x.device) * K + codes.clamp(0, K - 1)  # [B, G]
    of_x = (x @ w2.flatten(0, 1).view(G * H, -1).t()).view(-1, G, H)
    difference = (back.flatten(0, 1)[row] - of_x).mul_(active.flatten(0, 1)[row])  # [B, G, H]
    return layout.pack_columns(difference.transpose(0, 1) @ w1.transpose(1, 2))


def code_statistics(x: Tensor, codes: Tensor, layout: CodebookLayout) -> tuple[Tensor, Tensor]:
    """Rows at every code, and the sums of their features.

    Args:
        x: [B, F].
        codes: [B, G] int64, -1 for rows that count nowhere.

    Returns:
        counts [G, K_max, 1] and sums [G, K_max, F].
    """
    check("code_statistics", ("x", x, ("B", "F"), FLOAT), ("codes", codes, ("B", layout.groups), INDEX))
    check_codes("code_statistics", codes, layout)
    G, K = layout.groups, layout.max_codes
    first = torch.arange(G, device=x.device) * K
    counts = x.new_zeros(G * K)
    sums = x.new_zeros(G * K, x.shape[1])
    rows = max(1, _ONE_HOT_AT_ONCE // (G * K))
    for block, found in zip(x.split(rows), codes.split(rows), strict=True):
        one_hot = x.new_zeros(block.shape[0], G * K)
        one_hot.scatter_(1, first + found.clamp(0, K - 1), (found >= 0).to(x.dtype))
        counts += one_hot.sum(0)
        sums.addmm_(one_hot.t(), block)
    return counts.view(G, K, 1), sums.view(G, K, -1)


def decode_codes(codebook: Tensor, decoders: Decoders, layout: CodebookLayout) -> Tensor:
    """What every decoder makes of every one of its codes: [sum K D] -> [G, K_max, F]; beyond K_g without meaning."""
    G = layout.groups
    check(
        "decode_codes",
        ("codebook", codebook, (layout.total_entries,), SAME),
        ("decoders.w1", decoders.w1, (layout.total_dims, "H"), SAME),
        ("decoders.b1", decoders.b1, (G, "H"), SAME),
        ("decoders.w2", decoders.w2, (G, "H", "F"), SAME),
        ("decoders.b2", decoders.b2, (G, "F"), SAME),
    )
    vectors, w1 = _pad(codebook, decoders.w1, layout)
    hidden = torch.baddbmm(decoders.b1[:, None], vectors, w1).relu_()
    return torch.baddbmm(decoders.b2[:, None], hidden, decoders.w2)


def _pad(codebook: Tensor, w1: Tensor, layout: CodebookLayout) -> tuple[Tensor, Tensor]:
    """Codes [G, K_max, D_max], those that are not finite as 0, and first weights [G, D_max, H]."""
    index = layout.indices(w1.device)
    vectors = layout.pad_codebook(torch.nan_to_num(codebook, 0.0, 0.0, 0.0))
    rows = torch.cat([w1, w1.new_zeros(1, w1.shape[1])])[index.columns]
    return vectors, rows
