"""The loss that `VectorQuantize` returns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spinlock_fast.dropin import dense, losses
from spinlock_fast.dropin.arguments import refuse_contradictions
from spinlock_fast.dropin.search import Call, Found
from spinlock_fast.dropin.shapes import widened
from spinlock_fast.kernels._common.snapshot import snapshot

if TYPE_CHECKING:
    from spinlock_fast.dropin.vector_quantize import VectorQuantize


def total_loss(
    vq: VectorQuantize, found: Found, origin: Tensor, call: Call, codes: Tensor
) -> tuple[Tensor, losses.LossBreakdown]:
    """The loss of a batch and its parts.

    Args:
        found: of `search`.
        origin: [b, n, dim] what was quantized, before projections.
        codes: [b, n, ...].
    """
    zero = vq.zero.detach()
    commitment = diversity = orthogonal = zero
    if not vq.training:
        loss = zero
        if call.topk is not None and found.commitment is not None:
            commitment = per_position(found.commitment, call)
            loss = commitment * vq.commitment_weight if vq.has_commitment_loss else commitment
        return loss, losses.LossBreakdown(commitment, zero, zero, zero)
    loss = zero
    if vq.has_codebook_diversity_loss and found.distances is not None:
        diversity = losses.negative_diversity(
            vq._heads.by_sequence(found.distances, call.positions), vq.codebook_diversity_temperature
        )
        loss = loss + diversity * vq.codebook_diversity_loss_weight
    if vq.has_commitment_loss:
        commitment = _commitment(vq, found, origin, call)
        commitment = commitment.to(torch.promote_types(commitment.dtype, origin.dtype))
        loss = loss + commitment * vq.commitment_weight
    if vq.has_codebook_orthogonal_loss:
        orthogonal = _orthogonality(vq, codes)
        loss = loss + orthogonal * vq.orthogonal_reg_weight
    inplace = zero if found.in_place_loss is None else found.in_place_loss
    return losses.with_backward(loss), losses.LossBreakdown(commitment, diversity, orthogonal, inplace)


def _commitment(vq: VectorQuantize, found: Found, origin: Tensor, call: Call) -> Tensor:
    if vq.commitment_use_cross_entropy_loss and found.distances is not None:
        rows = found.codes if call.row_mask is None else found.codes.masked_fill(~call.row_mask, -1)
        return dense.cross_entropy(found.distances, rows)
    if found.commitment is None:
        raise AssertionError("training without a commitment loss")
    if call.topk is not None:
        return per_position(found.commitment, call)
    raw = call.mask is not None and vq.use_cosine_sim and vq.heads == 1 and not vq.has_projections
    if raw and "masked_commitment" not in vq.corrections:
        return losses.squared_error(found.quantized.detach().view(origin.shape), widened(origin), call.mask)
    return found.commitment


def per_position(error: Tensor, call: Call) -> Tensor:
    """[b, n, k] of errors [1, N, k]; 0 where masked."""
    error = error.view(*call.positions, error.shape[-1])
    return error if call.mask is None else error * call.mask[..., None]


def _orthogonality(vq: VectorQuantize, codes: Tensor) -> Tensor:
    book = snapshot(vq._codebook.used)  # the next call moves it in place, maybe before the backward pass
    if vq.orthogonal_reg_active_codes_only:
        refuse_contradictions(active_codes_per_head=vq._codebook.num_codebooks > 1)
        active = codes.unique()
        book = book[:, active[active >= 0]]  # a row that is not finite has no code
        if book.shape[1] == 0:
            return book.sum()
    most = vq.orthogonal_reg_max_codes
    if most is not None and book.shape[1] > most:
        book = book[:, torch.randperm(book.shape[1], device=book.device)[:most]]
    return losses.orthogonality(book, "orthogonal_loss" in vq.corrections)


def cross_entropy_of(
    vq: VectorQuantize, found: Found, indices: Tensor, call: Call, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What was quantized, in codebook space, and the cross entropy of given codes [b, n, ...]."""
    if found.distances is None:
        raise AssertionError("indices were given, but no distances formed")
    loss = dense.cross_entropy(found.distances, vq._heads.split_codes(indices))
    quantized = vq._heads.by_sequence(found.quantized, call.positions).to(dtype)
    return (quantized[0] if vq.heads == 1 else quantized), loss
