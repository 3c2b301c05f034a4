"""A training step of `VectorQuantize` in eager mode, with as little host time as it takes."""

from __future__ import annotations

import torch
from torch import Tensor

from spinlock_fast.dropin import losses
from spinlock_fast.dropin.codebook import Codebook, CodebookUpdate, apply_updates
from spinlock_fast.dropin.dead_codes import gather_from_heads
from spinlock_fast.dropin.input_layout import InputLayout, apply_projection, at_least_float32
from spinlock_fast.dropin.training_loss import TrainingLoss
from spinlock_fast.kernels.residual_vq.eager import Implementation, StepOptions, choose_implementation, quantize_step
from spinlock_fast.kernels.residual_vq.reference import Averages
from spinlock_fast.quantize.activation_checkpointing import in_region


def forward(
    layer: TrainingLoss, x: Tensor, rows: Tensor, layout: InputLayout, freeze_codebook: bool | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Results of a training step of `VectorQuantize`, which updates the codebook; None if another path must be taken.

    Args:
        layer: the quantizer.
        x: its input.
        rows: the input as [b, n, heads * D], after `project_in`.
        layout: of x.
        freeze_codebook: no update; None for the setting of the layer.
    """
    implementation = _implementation(layer, rows)
    if implementation is None:
        return None
    frozen = layer.freeze_codebook if freeze_codebook is None else freeze_codebook
    quantized, codes, loss = _quantize(layer, rows, x.requires_grad, not frozen, implementation)
    output = apply_projection(layer.project_out, quantized).to(x.dtype) if layer.has_projections else quantized
    return layout.from_rows(output), layout.unflatten_positions(codes), losses.ensure_backward(loss)


def _implementation(layer: TrainingLoss, rows: Tensor) -> Implementation | None:
    """What computes the step for rows [b, n, heads * D]; None unless it is a fused search with plain options."""
    codebook = layer._codebook
    applies = (
        layer.has_commitment_loss
        and isinstance(layer.commitment_weight, (int, float))  # a tensor may require a gradient
        and layer.is_fusable
        and not codebook.needs_kmeans
        and rows.numel() > 0
        and not in_region(codebook)
    )
    return choose_implementation(rows, codebook.embed) if applies else None


def _quantize(
    layer: TrainingLoss, rows: Tensor, input_requires_grad: bool, update: bool, implementation: Implementation
) -> tuple[Tensor, Tensor, Tensor]:
    """quantized, codes and loss of rows [b, n, heads * D], after which the codebook is updated if `update`."""
    codebook = layer._codebook
    options = StepOptions(
        layer.use_cosine_sim,
        layer.gradient_mode(input_requires_grad),
        layer.commitment_weight,
        layer.heads,
        codebook.decay,
        codebook.eps,
        implementation,
    )
    averages = _averages(codebook) if update else None
    counts = sums = None
    if update and averages is None:
        counts, sums = codebook.embed.new_empty(codebook.embed.shape[:2]), torch.empty_like(codebook.embed)
    result = quantize_step(rows, codebook.embed, options, averages, counts, sums)
    if update and (averages is None or codebook.has_dead_code_replacement):
        heads = at_least_float32(layer._head_layout.split(rows.detach()))
        gather_rows = gather_from_heads(heads, codebook.transform_input)
        apply_updates([CodebookUpdate(codebook, counts, sums, heads.shape[1], None)], gather_rows)
    return result


def _averages(codebook: Codebook) -> Averages | None:
    """The state that `quantize_step` updates; None if the update takes more than the statistics of this batch."""
    if not codebook.ema_update or codebook.manual_ema_update or codebook.accumulates or codebook.syncs_updates:
        return None
    state = Averages(codebook.cluster_size, codebook.embed_avg, codebook.usage)
    dtypes, device = (torch.float32, torch.float32, torch.int64), codebook.embed.device
    fits = all(
        tensor.dtype == dtype and tensor.device == device and tensor.is_contiguous()
        for tensor, dtype in zip(state, dtypes, strict=True)
    )
    return state if fits else None
