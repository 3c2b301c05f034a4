"""Base class of `ResidualVQ`: its stages in one fused operator, one by one, or by beam search."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from spinlock_fast.dropin.beam_search import beam_search, partial_gradient
from spinlock_fast.dropin.codebook import CodebookUpdate, apply_updates
from spinlock_fast.dropin.dead_codes import Slot
from spinlock_fast.dropin.implicit_codebook import ImplicitCodebook
from spinlock_fast.dropin.input_layout import InputLayout, at_least_float32
from spinlock_fast.dropin.vector_quantize import VectorQuantize
from spinlock_fast.kernels.residual_vq import ResidualAssignment, residual_vq
from spinlock_fast.quantize.activation_checkpointing import once, takes_gradient
from spinlock_fast.quantize.buffers import TransientBuffers

StageResults = tuple[Tensor, Tensor, Tensor]  # quantized [b, n, D], codes [b, n, q], losses [q]


class ResidualStages(TransientBuffers):
    """Quantizes rows [b, n, D] stage after stage. Its attributes are set by the constructor of `ResidualVQ`."""

    layers: nn.ModuleList
    mlps: nn.ModuleList | tuple[None, ...]
    num_quantizers: int
    shared_codebook: bool
    implicit_neural_codebook: bool
    diveq: bool
    quant_grad_frac: float
    accept_image_fmap: bool
    vq_is_ema_updating: bool
    beam_score_weights: Tensor

    def layer(self, q: int) -> VectorQuantize:
        """The quantizer of stage q."""
        layer = self.layers[q]
        assert isinstance(layer, VectorQuantize)
        return layer

    def _implicit_codebook(self, q: int) -> ImplicitCodebook | None:
        """The network that forms the codebooks of stage q; None in the first stage and without implicit codebooks."""
        network = self.mlps[q - 1] if q > 0 else None
        assert network is None or isinstance(network, ImplicitCodebook)
        return network

    def _is_fusable(self, mask: Tensor | None) -> bool:
        """Whether one operator can compute all stages."""
        layers = [self.layer(q) for q in range(self.num_quantizers)]
        first = layers[0]
        raw_commitment = mask is not None and first.use_cosine_sim and "masked_commitment" not in first.corrections
        resets_between = self.shared_codebook and self.training and first._codebook.has_dead_code_replacement
        return (
            all(layer.is_fusable and not layer._codebook.needs_kmeans for layer in layers)
            and not (self.implicit_neural_codebook or self.diveq or resets_between)
            and not (self.training and raw_commitment and first.has_commitment_loss)
            and self.quant_grad_frac <= 0.0
        )

    def _quantize_fused(
        self, rows: Tensor, mask: Tensor | None, stages: int, freeze_codebook: bool, active_stages: Tensor | None
    ) -> StageResults:
        """All stages in one operator.

        Args:
            rows: [b, n, D].
            mask: [b, n] bool.
            stages: number of stages q to compute.
            freeze_codebook: no update.
            active_stages: int scalar; later stages are dropped out, with codes of -1 and no update.
        """
        layers = [self.layer(q) for q in range(stages)]
        first, flat = layers[0], at_least_float32(rows.reshape(-1, rows.shape[-1]))
        row_mask = None if mask is None else mask.flatten()
        updates = self.training and not (freeze_codebook or first.freeze_codebook)
        gradient = first.gradient_mode(self.training and takes_gradient(self, rows))
        assignment = residual_vq(
            flat,
            [layer._codebook.current_embed[0] for layer in layers],
            row_mask,
            limit=active_stages,
            cosine=first.use_cosine_sim,
            gradient=gradient,
            with_sums=updates,
        )
        errors = assignment.errors
        num_rows = max(flat.shape[0], 1) if row_mask is None else row_mask.sum().clamp(min=1)
        weight = first.commitment_weight if self.training and first.has_commitment_loss else 0.0
        loss = errors * weight / (num_rows * flat.shape[1]) if weight else torch.zeros_like(errors)
        if updates:
            once(
                self,
                lambda: self._update_codebooks(layers, flat.detach(), assignment, row_mask, active_stages),
                first._codebook.usage,
            )
        loss = loss.to(torch.promote_types(loss.dtype, rows.dtype))
        quantized = assignment.quantized
        if gradient == "none":
            quantized = quantized.detach()  # its autograd node is shared with the errors, which may need a gradient
        return quantized.view(rows.shape), assignment.codes.view(*rows.shape[:-1], stages), loss

    def _update_codebooks(
        self,
        layers: list[VectorQuantize],
        rows: Tensor,
        assignment: ResidualAssignment,
        row_mask: Tensor | None,
        active_stages: Tensor | None,
    ) -> None:
        """Updates the codebooks of all stages. Stage inputs for dead codes are recomputed from the codes before it."""
        sizes = [layer.codebook_size for layer in layers]
        counts, sums = assignment.counts.split(sizes), assignment.sums.split(sizes)
        codebooks = assignment.codebook.split(sizes)

        def gather_rows(slots: Sequence[Slot], index: Tensor) -> Tensor:
            stages = [q for q, _ in slots]  # ascending
            residual, codes = rows[index], assignment.codes[index].clamp(min=0)  # [slots, n, D], [slots, n, q]
            for earlier in range(stages[-1]):
                later = next(i for i, q in enumerate(stages) if q > earlier)
                residual[later:] -= codebooks[earlier][codes[later:, :, earlier]]
            return layers[0]._codebook.transform_input(residual)

        active = None
        if active_stages is not None:
            active = (torch.arange(len(layers), device="cpu") < active_stages.cpu()).to(rows.device)
        apply_updates(
            [
                CodebookUpdate(
                    layer._codebook,
                    counts[q][None],
                    sums[q][None],
                    len(rows),
                    row_mask,
                    None if active is None else active[q],
                )
                for q, layer in enumerate(layers)
            ],
            gather_rows,
        )
        if self.shared_codebook and self.vq_is_ema_updating:
            layers[0]._codebook.update_ema()

    def _quantize_by_stage(
        self,
        layout: InputLayout,
        rows: Tensor,
        mask: Tensor | None,
        stages: int,
        temperature: float | None,
        freeze_codebook: bool,
    ) -> StageResults:
        """Stage by stage, with all options of `VectorQuantize`."""
        residual, total = rows, torch.zeros_like(rows)
        codes, losses, inputs = [], [], []
        for q in range(stages):
            network = self._implicit_codebook(q)
            inputs.append(residual.detach())
            quantized, code, loss = self.layer(q)(
                layout.from_rows(residual),
                mask=mask,
                sample_codebook_temp=temperature,
                freeze_codebook=freeze_codebook or None,
                codebook_transform_fn=None if network is None else partial(network, condition=total),
            )
            quantized = layout.to_rows(quantized)
            residual, total = residual - partial_gradient(quantized, self.quant_grad_frac), total + quantized
            codes.append(layout.flatten_positions(code))
            losses.append(loss)
        if self.training and self.shared_codebook:
            self._update_shared_codebook(torch.cat(inputs, 1), mask, stages, freeze_codebook)
        return total, torch.stack(codes, -1), torch.stack(losses)

    def _update_shared_codebook(self, inputs: Tensor, mask: Tensor | None, stages: int, freeze_codebook: bool) -> None:
        """Updates a shared codebook once, after all stages updated its averages; inputs [b, stages * n, D]."""
        first = self.layer(0)
        if not (self.training and self.shared_codebook) or freeze_codebook or first.freeze_codebook:
            return

        def update() -> None:
            if self.vq_is_ema_updating:
                first._codebook.update_ema()
                first.update_in_place_optimizer()
            first.expire_codes_(inputs, None if mask is None else mask.repeat(1, stages))

        once(self, update)

    def _quantize_by_beam(
        self,
        rows: Tensor,
        mask: Tensor | None,
        stages: int,
        beam_size: int,
        temperature: float | None,
        freeze_codebook: bool,
    ) -> StageResults:
        """By beam search over the stages."""
        n = rows.shape[1]

        def quantize_stage(candidates: Tensor, q: int, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            j = candidates.shape[2]
            network = self._implicit_codebook(q)
            quantized, codes, losses = self.layer(q).search_topk(
                candidates.flatten(1, 2),
                beam_size,
                mask=None if mask is None else mask.repeat_interleave(j, 1),
                temperature=temperature,
                codebook_transform=None if network is None else partial(network, condition=total.flatten(1, 2)),
            )
            return quantized.unflatten(1, (n, j)), codes.unflatten(1, (n, j)), losses.unflatten(1, (n, j))

        quantized, codes, losses, inputs = beam_search(
            rows, quantize_stage, stages, beam_size, self.beam_score_weights, self.quant_grad_frac
        )
        if mask is not None:
            codes = codes.masked_fill(~mask[..., None], -1)
            loss = losses.masked_fill(~mask[..., None], 0.0).sum((0, 1)) / mask.sum().clamp(min=1e-4)
        else:
            loss = losses.mean((0, 1)) if losses.numel() else losses.sum((0, 1))
        if self.training and not freeze_codebook:
            updated_stages = stages if "beam_update" in self.layer(0).corrections else 1
            once(self, lambda: self._update_from_beam(updated_stages, inputs.detach(), codes, mask))
        self._update_shared_codebook(inputs.detach().transpose(1, 2).flatten(1, 2), mask, stages, freeze_codebook)
        return quantized, codes, loss

    def _update_from_beam(self, stages: int, inputs: Tensor, codes: Tensor, mask: Tensor | None) -> None:
        for q in range(stages):
            self.layer(q).update_from_projected(inputs[:, :, q], codes[..., q], mask)

    def _quantize_with_cross_entropy(
        self,
        layout: InputLayout,
        rows: Tensor,
        indices: Tensor,
        mask: Tensor | None,
        temperature: float | None,
        freeze_codebook: bool,
    ) -> tuple[Tensor, Tensor]:
        """Quantized vectors [b, n, D], and the cross entropy of given codes [b, n, q], summed over stages."""
        if self.accept_image_fmap:
            raise ValueError("indices do not go with accept_image_fmap")
        if bool((indices == -1).any()):
            raise ValueError("indices must not contain -1 (quantize_dropout): pass the codes of eval mode")
        residual, total, losses = rows, torch.zeros_like(rows), []
        for q in range(self.num_quantizers):
            network = self._implicit_codebook(q)
            quantized, loss = self.layer(q)(
                layout.from_rows(residual),
                mask=mask,
                indices=indices[..., q],
                sample_codebook_temp=temperature,
                freeze_codebook=freeze_codebook or None,
                codebook_transform_fn=None if network is None else partial(network, condition=total),
            )
            quantized = quantized.view(rows.shape)
            residual, total = residual - quantized.detach(), total + quantized
            losses.append(loss)
        return total, torch.stack(losses).sum()
