"""Base class of `VectorQuantize`: the weighted loss that `forward` returns, from the terms in `losses`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spinlock_fast.dropin import losses
from spinlock_fast.dropin.code_search import CallOptions, CodeSearch, SearchResult
from spinlock_fast.dropin.head_layout import HeadLayout
from spinlock_fast.dropin.input_layout import at_least_float32
from spinlock_fast.kernels._common.snapshot import snapshot
from spinlock_fast.quantize.activation_checkpointing import takes_gradient


class TrainingLoss(CodeSearch):
    """Adds up the loss terms of a batch. Its attributes are set by the constructor of `VectorQuantize`."""

    zero: Tensor
    heads: int
    has_projections: bool
    project_in: nn.Module
    project_out: nn.Module
    freeze_codebook: bool
    sample_codebook_temp: float
    return_zeros_for_masked_padding: bool
    commitment_weight: float
    codebook_diversity_loss_weight: float
    codebook_diversity_temperature: float
    has_codebook_orthogonal_loss: bool
    orthogonal_reg_weight: float
    orthogonal_reg_active_codes_only: bool
    orthogonal_reg_max_codes: int | None
    corrections: frozenset[str]
    _head_layout: HeadLayout

    def _total_loss(
        self, result: SearchResult, origin: Tensor, options: CallOptions, codes: Tensor
    ) -> tuple[Tensor, losses.LossBreakdown]:
        """The weighted loss of a batch and its unweighted terms.

        Args:
            result: of `_search`.
            origin: [b, n, dim] input, before projections.
            options: of this call.
            codes: [b, n, ...].
        """
        zero = self.zero.detach()
        commitment = diversity = orthogonal = loss = zero
        if not self.training:
            if options.topk is not None and result.commitment is not None:
                commitment = per_position(result.commitment, options)
                loss = commitment * self.commitment_weight if self.has_commitment_loss else commitment
            return loss, losses.LossBreakdown(commitment, zero, zero, zero)
        if self.has_codebook_diversity_loss and result.similarities is not None:
            similarities = self._head_layout.to_sequences(result.similarities, options.batch_shape)
            diversity = losses.negative_entropy(similarities, self.codebook_diversity_temperature)
            loss = loss + diversity * self.codebook_diversity_loss_weight
        if self.has_commitment_loss:
            commitment = self._commitment_loss(result, origin, options)
            commitment = commitment.to(torch.promote_types(commitment.dtype, origin.dtype))
            loss = loss + commitment * self.commitment_weight
        if self.has_codebook_orthogonal_loss:
            orthogonal = self._orthogonal_loss(codes)
            loss = loss + orthogonal * self.orthogonal_reg_weight
        in_place = zero if result.in_place_loss is None else result.in_place_loss
        return losses.ensure_backward(loss), losses.LossBreakdown(commitment, diversity, orthogonal, in_place)

    def search_topk(
        self,
        rows: Tensor,
        k: int,
        mask: Tensor | None = None,
        temperature: float | None = None,
        codebook_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The k nearest codes of projected rows [b, n, D], for beam search: no heads, projections or updates.

        Returns:
            quantized [b, n, k, D], codes [b, n, k] (-1 where masked), losses [b, n, k] (0 where masked).
        """
        options = CallOptions(
            mask=mask,
            row_mask=None if mask is None else mask.flatten(),
            batch_shape=tuple(rows.shape[:2]),
            freeze_codebook=True,
            temperature=self.sample_codebook_temp if temperature is None else temperature,
            input_requires_grad=takes_gradient(self._codebook, rows) if self.training else rows.requires_grad,
            topk=min(k, self.codebook_size),
            keep_similarities=False,
            codebook_transform=codebook_transform,
        )
        result = self._search(at_least_float32(rows.reshape(1, -1, rows.shape[-1])), options)
        codes = result.codes.view(*rows.shape[:2], result.codes.shape[-1])
        quantized = result.quantized.view(*codes.shape, rows.shape[-1]).to(rows.dtype)
        weight = self.commitment_weight if self.has_commitment_loss else 0.0 if self.training else 1.0
        assert result.commitment is not None
        losses = per_position(result.commitment, options) * weight
        if mask is None:
            return quantized, codes, losses
        padding = torch.zeros_like(rows) if self.return_zeros_for_masked_padding else rows
        quantized = torch.where(mask[..., None, None], quantized, padding[:, :, None])
        return quantized, codes.masked_fill(~mask[..., None], -1), losses

    def _commitment_loss(self, result: SearchResult, origin: Tensor, options: CallOptions) -> Tensor:
        if self.commitment_use_cross_entropy_loss and result.similarities is not None:
            mask = options.row_mask
            codes = result.codes if mask is None else result.codes.masked_fill(~mask, -1)
            return losses.cross_entropy(result.similarities, codes)
        assert result.commitment is not None, "in training, the search computes the commitment error"
        if options.topk is not None:
            return per_position(result.commitment, options)
        raw = options.mask is not None and self.use_cosine_sim and self.heads == 1 and not self.has_projections
        if raw and "masked_commitment" not in self.corrections:
            quantized = result.quantized.detach().view(origin.shape)
            return losses.squared_error(quantized, at_least_float32(origin), options.mask)
        return result.commitment

    def _orthogonal_loss(self, codes: Tensor) -> Tensor:
        embed = snapshot(self._codebook.current_embed)  # the next call may change it in place before the backward pass
        if self.orthogonal_reg_active_codes_only:
            if self._codebook.num_codebooks > 1:
                raise ValueError("orthogonal_reg_active_codes_only does not go with separate_codebook_per_head")
            active = codes.unique()
            embed = embed[:, active[active >= 0]]  # rows that are not finite have code -1
            if embed.shape[1] == 0:
                return embed.sum()
        max_codes = self.orthogonal_reg_max_codes
        if max_codes is not None and embed.shape[1] > max_codes:
            embed = embed[:, torch.randperm(embed.shape[1], device=embed.device)[:max_codes]]
        return losses.orthogonality(embed, "orthogonal_loss" in self.corrections)

    def _cross_entropy(
        self, result: SearchResult, indices: Tensor, options: CallOptions, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Quantized vectors before `project_out`, and the cross entropy of given codes [b, n, ...]."""
        assert result.similarities is not None, "the search keeps similarities if indices are given"
        loss = losses.cross_entropy(result.similarities, self._head_layout.split_codes(indices))
        quantized = self._head_layout.to_sequences(result.quantized, options.batch_shape).to(dtype)
        return (quantized[0] if self.heads == 1 else quantized), loss


def per_position(errors: Tensor, options: CallOptions) -> Tensor:
    """[b, n, k] of errors [1, N, k]; 0 where masked."""
    errors = errors.view(*options.batch_shape, errors.shape[-1])
    return errors if options.mask is None else errors * options.mask[..., None]
