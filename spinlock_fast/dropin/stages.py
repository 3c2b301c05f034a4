"""How `ResidualVQ` goes through its stages: in one operator, one by one, or by beam search."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spinlock_fast.dropin.beam import beam_search, update_stages
from spinlock_fast.dropin.codebook import Piece, update
from spinlock_fast.dropin.search import gradient_mode
from spinlock_fast.dropin.shapes import InputShape, widened
from spinlock_fast.kernels.residual_vq import ResidualAssignment, residual_vq
from spinlock_fast.quantize.activation_checkpointing import once, takes_gradient

if TYPE_CHECKING:
    from spinlock_fast.dropin.residual import ResidualVQ
    from spinlock_fast.dropin.vector_quantize import VectorQuantize


def stages_fuse(rvq: ResidualVQ, mask: Tensor | None) -> bool:
    """Whether one operator serves all stages."""
    layers = [rvq.layer(q) for q in range(rvq.num_quantizers)]
    first = layers[0]
    raw_loss = mask is not None and first.use_cosine_sim and "masked_commitment" not in first.corrections
    replaced_between = rvq.shared_codebook and rvq.training and first._codebook.has_dead_code_replacement
    return (
        all(layer.is_plain and not layer._codebook.needs_start for layer in layers)
        and not (rvq.implicit_neural_codebook or rvq.diveq or replaced_between)
        and not (rvq.training and raw_loss and first.has_commitment_loss)
        and rvq.quant_grad_frac <= 0.0
    )


def fused(
    rvq: ResidualVQ, rows: Tensor, mask: Tensor | None, stages: int, frozen: bool, limit: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """All stages in one operator: quantized [b, n, D], codes [b, n, q], losses [q]."""
    layers = [rvq.layer(q) for q in range(stages)]
    first, flat = layers[0], widened(rows.reshape(-1, rows.shape[-1]))
    row_mask = None if mask is None else mask.flatten()
    frozen = frozen or first.freeze_codebook
    updating = rvq.training and not frozen
    gradient = gradient_mode(first, rvq.training and takes_gradient(rvq, rows))
    found = residual_vq(
        flat,
        [layer._codebook.used[0] for layer in layers],
        row_mask,
        limit=limit,
        cosine=first.use_cosine_sim,
        gradient=gradient,
        with_sums=updating,
    )
    valid = max(flat.shape[0], 1) if row_mask is None else row_mask.sum().clamp(min=1)
    weight = first.commitment_weight if rvq.training and first.has_commitment_loss else 0.0
    loss = found.errors * weight / (valid * flat.shape[1]) if weight else torch.zeros_like(found.errors)
    if updating:
        once(rvq, lambda: _learn(rvq, layers, flat.detach(), found, row_mask, limit), first._codebook.usage)
    loss = loss.to(torch.promote_types(loss.dtype, rows.dtype))
    quantized = found.quantized
    if gradient == "none":
        quantized = quantized.detach()  # of the operator's one node: the errors may still need the input's gradient
    return quantized.view(rows.shape), found.codes.view(*rows.shape[:-1], stages), loss


def _learn(
    rvq: ResidualVQ,
    layers: list[VectorQuantize],
    rows: Tensor,
    found: ResidualAssignment,
    row_mask: Tensor | None,
    limit: Tensor | None,
) -> None:
    """Updates the stages' codebooks; rows for dead codes are formed again from the codes as they were."""
    sizes = [layer.codebook_size for layer in layers]
    counts, sums, books = found.counts.split(sizes), found.sums.split(sizes), found.codebook.split(sizes)

    def take(q: int, _: int, index: Tensor) -> Tensor:
        residual, codes = rows[index], found.codes[index].clamp(min=0)
        for s in range(q):
            residual = residual - books[s][codes[:, s]]
        return layers[q]._codebook.transform_input(residual)

    active = None if limit is None else (torch.arange(len(layers), device="cpu") < limit.cpu()).to(rows.device)
    update(
        [
            Piece(
                layer._codebook,
                counts[q][None],
                sums[q][None],
                partial(take, q),
                len(rows),
                row_mask,
                None if active is None else active[q],
            )
            for q, layer in enumerate(layers)
        ]
    )
    if rvq.shared_codebook and rvq.vq_is_ema_updating:
        layers[0]._codebook.update_ema()


def by_stages(
    rvq: ResidualVQ,
    shape: InputShape,
    rows: Tensor,
    mask: Tensor | None,
    stages: int,
    temperature: float | None,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fused`, stage by stage: each may do what `VectorQuantize` does."""
    residual, total = rows, torch.zeros_like(rows)
    codes, loss, inputs = [], [], []
    for q in range(stages):
        network = rvq.mlps[q - 1] if q > 0 else None
        inputs.append(residual.detach())
        found, code, error = rvq.layer(q)(
            shape.restore(residual),
            mask=mask,
            sample_codebook_temp=temperature,
            freeze_codebook=frozen or None,
            codebook_transform_fn=None if network is None else partial(network, condition=total),
        )
        found = shape.rows(found)
        fraction = rvq.quant_grad_frac
        passed = found.detach() if fraction <= 0 else fraction * found + (1.0 - fraction) * found.detach()
        residual, total = residual - passed, total + found
        codes.append(shape.flatten_positions(code))
        loss.append(error)
    if rvq.training and rvq.shared_codebook:
        _finish_shared(rvq, torch.cat(inputs, 1), mask, stages, frozen)
    return total, torch.stack(codes, -1), torch.stack(loss)


def _finish_shared(rvq: ResidualVQ, inputs: Tensor, mask: Tensor | None, stages: int, frozen: bool) -> None:
    """One update of a codebook that all stages moved the averages of; inputs [b, stages * n, D]."""
    first = rvq.layer(0)
    if not (rvq.training and rvq.shared_codebook) or frozen or first.freeze_codebook:
        return

    def finish() -> None:
        if rvq.vq_is_ema_updating:
            first._codebook.update_ema()
            first.update_in_place_optimizer()
        first.expire_codes_(inputs, None if mask is None else mask.repeat(1, stages))

    once(rvq, finish)


def by_beam(
    rvq: ResidualVQ,
    rows: Tensor,
    mask: Tensor | None,
    stages: int,
    size: int,
    temperature: float | None,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fused`, by beam search."""
    n = rows.shape[1]

    def stage(candidates: Tensor, q: int, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        j = candidates.shape[2]
        network = rvq.mlps[q - 1] if q > 0 else None
        found = rvq.layer(q).choose_several(
            candidates.flatten(1, 2),
            size,
            mask=None if mask is None else mask.repeat_interleave(j, 1),
            temperature=temperature,
            transform=None if network is None else partial(network, condition=total.flatten(1, 2)),
        )
        quantized, codes, errors = (part.unflatten(1, (n, j)) for part in found)
        return quantized, codes, errors

    quantized, codes, errors, inputs = beam_search(
        rows, stage, stages, size, rvq.beam_score_weights, rvq.quant_grad_frac
    )
    if mask is not None:
        codes = codes.masked_fill(~mask[..., None], -1)
        loss = errors.masked_fill(~mask[..., None], 0.0).sum((0, 1)) / mask.sum().clamp(min=1e-4)
    else:
        loss = errors.mean((0, 1)) if errors.numel() else errors.sum((0, 1))
    if rvq.training and not frozen:
        learning = stages if "beam_update" in rvq.layer(0).corrections else 1
        layers = [rvq.layer(q) for q in range(learning)]
        once(rvq, lambda: update_stages(layers, inputs.detach(), codes, mask))
    _finish_shared(rvq, inputs.detach().transpose(1, 2).flatten(1, 2), mask, stages, frozen)
    return quantized, codes, loss


def with_cross_entropy(
    rvq: ResidualVQ,
    shape: InputShape,
    rows: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    temperature: float | None,
    frozen: bool,
) -> tuple[Tensor, Tensor]:
    """The sum over stages [b, n, D], and the cross entropy of given codes [b, n, q], summed over stages."""
    if rvq.accept_image_fmap:
        raise ValueError("indices do not go with accept_image_fmap")
    if bool((indices == -1).any()):
        raise ValueError("some indices were dropped out: take those of eval mode")
    residual, total, errors = rows, torch.zeros_like(rows), []
    for q in range(rvq.num_quantizers):
        network = rvq.mlps[q - 1] if q > 0 else None
        found, error = rvq.layer(q)(
            shape.restore(residual),
            mask=mask,
            indices=indices[..., q],
            sample_codebook_temp=temperature,
            freeze_codebook=frozen or None,
            codebook_transform_fn=None if network is None else partial(network, condition=total),
        )
        found = found.view(rows.shape)
        residual, total = residual - found.detach(), total + found
        errors.append(error)
    return total, torch.stack(errors).sum()
