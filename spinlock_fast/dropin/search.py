"""The codes of a batch of rows and their gradients: in one operator where that serves, else step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from spinlock_fast.dropin import dense, losses
from spinlock_fast.dropin.affine import NO_STATISTICS, Statistics
from spinlock_fast.dropin.codebook import Piece, Weight, update
from spinlock_fast.dropin.shapes import projected
from spinlock_fast.kernels._common.snapshot import snapshot
from spinlock_fast.kernels.residual_vq import residual_vq
from spinlock_fast.kernels.residual_vq.op import Gradient
from spinlock_fast.kernels.residual_vq.reference import tally
from spinlock_fast.quantize.activation_checkpointing import once

if TYPE_CHECKING:
    from spinlock_fast.dropin.vector_quantize import VectorQuantize


@dataclass(frozen=True)
class Call:
    """What one call of `forward` asks for."""

    mask: Tensor | None  # [b, n]
    row_mask: Tensor | None  # [N], for the rows of each codebook
    positions: tuple[int, ...]  # b, n
    frozen: bool
    temperature: float
    input_grad: bool
    topk: int | None
    with_distances: bool
    transform: Callable[[Tensor], Tensor] | None
    weight: Weight = None
    accumulate: bool = False
    ema_update: bool | None = None


@dataclass(frozen=True)
class Found:
    """Codes of rows [H, N, D] and what follows from them."""

    codes: Tensor  # [H, N] or [H, N, k]
    quantized: Tensor  # [H, N, D] or [H, N, k, D], with its gradient to the rows
    commitment: Tensor | None  # mean squared error, or [H, N, k] of each row and choice
    distances: Tensor | None = None  # [H, N, K]
    in_place_loss: Tensor | None = None


def search(vq: VectorQuantize, rows: Tensor, call: Call) -> Found:
    """Chooses codes for rows [H, N, D] and, in training, updates the codebook."""
    book = vq._codebook
    once(book, lambda: book.start(rows, call.row_mask))
    plain = call.topk is None and call.transform is None and not call.with_distances
    return _fused(vq, rows, call) if plain and vq.is_plain else _by_steps(vq, rows, call)


def gradient_mode(vq: VectorQuantize, input_grad: bool) -> Gradient:
    """How the output passes its gradient to the input: in eval mode, not at all."""
    if not (vq.training and input_grad and vq.route_gradients_to_input):
        return "none"
    return "rotation" if vq.rotation_trick else "straight_through"


def _fused(vq: VectorQuantize, rows: Tensor, call: Call) -> Found:
    book, H = vq._codebook, rows.shape[0]
    updating, used = vq.training and not call.frozen, book.used
    parts = [
        residual_vq(
            rows[h],
            [used[h]],
            call.row_mask,
            cosine=vq.use_cosine_sim,
            gradient=gradient_mode(vq, call.input_grad),
            with_sums=updating,
        )
        for h in range(H)
    ]
    codes = torch.stack([part.codes[:, 0] for part in parts])
    quantized = parts[0].quantized[None] if H == 1 else torch.stack([part.quantized for part in parts])
    if gradient_mode(vq, call.input_grad) == "none":
        quantized = quantized.detach()  # of the operator's one node: the errors may still need the input's gradient
    valid = max(rows.shape[1], 1) if call.row_mask is None else call.row_mask.sum().clamp(min=1)
    commitment = torch.stack([part.errors[0] for part in parts]).sum() / (valid * H * rows.shape[2])
    if updating:
        counts, sums = torch.stack([p.counts for p in parts]), torch.stack([p.sums for p in parts])
        _learn(vq, rows, counts, sums, call)
    return Found(codes, quantized, commitment)


def _learn(vq: VectorQuantize, rows: Tensor, counts: Tensor, sums: Tensor, call: Call) -> None:
    book = vq._codebook

    def take(h: int, index: Tensor) -> Tensor:
        return book.transform_input(rows[h].detach()[index])

    piece = Piece(book, counts, sums, take, rows.shape[1], call.row_mask)
    once(book, lambda: update([piece], call.weight, call.accumulate, call.ema_update), book.usage)


def _by_steps(vq: VectorQuantize, rows: Tensor, call: Call) -> Found:
    book = vq._codebook
    y = book.transform_input(rows)
    affine, statistics = vq._affine, NO_STATISTICS
    if affine is not None:
        statistics = once(book, lambda: affine.observe(book, y, book.embed, call.row_mask))
    in_place_loss = None
    if vq.in_place_codebook_optimizer is not None and vq.training and not call.frozen:
        in_place_loss = once(book, lambda: _step_in_place(vq, y.detach(), call, statistics))
        choice = _choose(vq, y, call, statistics)
    else:
        choice = _choose(vq, y, call, statistics)
        _learn_by_steps(vq, y, choice, call, statistics)
    target = y if call.topk is None else y[:, :, None].expand_as(choice.values)
    quantized = _pass_gradient(vq, target, choice.values, call)
    learns = vq.learnable_codebook and not call.frozen
    commitment = None
    if call.topk is not None:
        near = quantized if not vq.training else choice.values if learns else choice.values.detach()
        commitment = F.mse_loss(near, target, reduction="none").mean(-1)
    elif vq.training:
        near = choice.values if learns else choice.values.detach()
        commitment = losses.squared_error(near, y, _per_head(call, y))
    return Found(choice.codes, quantized, commitment, choice.distances, in_place_loss)


def _learn_by_steps(vq: VectorQuantize, y: Tensor, choice: dense.Choice, call: Call, statistics: Statistics) -> None:
    if vq.training and not call.frozen and call.topk is None:
        seen = y if vq._affine is None else vq._affine.undo(statistics, y)
        _learn(vq, seen, *_tally(vq, seen.detach(), choice.codes, call), call)


def _step_in_place(vq: VectorQuantize, y: Tensor, call: Call, statistics: Statistics) -> Tensor:
    """The loss of the codes that rows y [H, N, D] choose, after a step of the optimizer that makes it less.

    Its graph is one of its own: checkpointing around the quantizer neither sees nor recomputes it.
    """
    with torch.enable_grad(), saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
        choice = _choose(vq, y, call, statistics)
        _learn_by_steps(vq, y, choice, call, statistics)
        loss = losses.squared_error(choice.values, y, _per_head(call, y))
        loss.backward()
    if not vq.manual_in_place_optimizer_update:
        vq.update_in_place_optimizer()
    return loss.detach()


def _per_head(call: Call, y: Tensor) -> Tensor | None:
    return None if call.row_mask is None else call.row_mask.expand(y.shape[:2])


def _choose(vq: VectorQuantize, y: Tensor, call: Call, statistics: Statistics) -> dense.Choice:
    book = vq._codebook
    codes = book.codes(y.dtype)
    if vq.training:
        codes = snapshot(codes)  # the update moves them in place, before the backward pass
    if book.vq_bridge is not None:
        codes = projected(book.vq_bridge, codes).to(codes.dtype)
    if vq._affine is not None:
        codes = vq._affine.apply(statistics, codes)
    if call.transform is not None:
        codes = book.transform_input(call.transform(codes).flatten(1, 2))  # [H, N, K, D]
    noisy = vq.training and vq.stochastic_sample_codes and call.temperature > 0
    soft = vq.training and vq.straight_through and call.temperature > 0
    if vq.needs_distances or call.with_distances or call.topk is not None or codes.ndim == 4:
        return dense.choose(
            y,
            codes,
            vq.use_cosine_sim,
            temperature=call.temperature,
            noisy=noisy,
            differentiable=soft,
            k=call.topk,
        )
    if noisy:
        index = dense.sample(y, codes, vq.use_cosine_sim, call.temperature)
    else:
        index = dense.nearest(y, codes, vq.use_cosine_sim)
    return dense.Choice(index, dense.take(codes, index), None)


def _tally(vq: VectorQuantize, rows: Tensor, codes: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    if call.row_mask is not None:
        codes = codes.masked_fill(~call.row_mask, -1)
    parts = [tally(part, code, vq.codebook_size) for part, code in zip(rows, codes, strict=True)]
    counts, sums = zip(*parts, strict=True)
    return torch.stack(counts), torch.stack(sums)


def _pass_gradient(vq: VectorQuantize, rows: Tensor, values: Tensor, call: Call) -> Tensor:
    if not vq.training:
        return values
    if call.input_grad and vq.route_gradients_to_input:
        if vq.rotation_trick:
            values = losses.rotate_to(rows, values)
        elif vq.directional_reparam:
            values = losses.step_in_direction(rows, values, vq.directional_reparam_variance)
        else:
            values = losses.straight_through(rows, values)
    if vq.sync_update_v > 0.0:
        values = values + vq.sync_update_v * (values - values.detach())
    return values
