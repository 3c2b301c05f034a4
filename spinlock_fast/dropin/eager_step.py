"""A training step of `VectorQuantize` in eager mode on the CPU, with as little host time as it takes."""

from __future__ import annotations

from torch import Tensor

from spinlock_fast.dropin import losses
from spinlock_fast.dropin.codebook import Codebook, CodebookUpdate, apply_updates
from spinlock_fast.dropin.dead_codes import gather_from_heads
from spinlock_fast.dropin.input_layout import InputLayout, apply_projection
from spinlock_fast.dropin.training_loss import TrainingLoss
from spinlock_fast.kernels.ema_update import cpu
from spinlock_fast.kernels.residual_vq.eager import Averages, StepOptions, quantize_step, supports
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
    if not _applies(layer, rows):
        return None
    frozen = layer.freeze_codebook if freeze_codebook is None else freeze_codebook
    quantized, codes, loss = _quantize(layer, rows, x.requires_grad, not frozen)
    output = apply_projection(layer.project_out, quantized).to(x.dtype) if layer.has_projections else quantized
    return layout.from_rows(output), layout.unflatten_positions(codes), losses.ensure_backward(loss)


def _applies(layer: TrainingLoss, rows: Tensor) -> bool:
    """Whether it is a fused search in one codebook, for float32 rows [b, n, heads * D] on a CPU."""
    codebook = layer._codebook
    return (
        layer.has_commitment_loss
        and isinstance(layer.commitment_weight, (int, float))  # a tensor may require a gradient
        and codebook.num_codebooks == 1
        and layer.is_fusable
        and not codebook.needs_kmeans
        and supports(rows, codebook.embed)
        and rows.numel() > 0
        and not in_region(codebook)
    )


def _quantize(
    layer: TrainingLoss, rows: Tensor, input_requires_grad: bool, update: bool
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
    )
    averages = _averages(codebook) if update else None
    counts = sums = None
    if update and averages is None:
        counts, sums = rows.new_empty(codebook.embed.shape[:2]), rows.new_empty(codebook.embed.shape)
    result = quantize_step(rows, codebook.embed, options, averages, counts, sums)
    if update and (averages is None or codebook.has_dead_code_replacement):
        flat = rows.detach().reshape(1, -1, codebook.embed.shape[2])
        gather_rows = gather_from_heads(flat, codebook.transform_input)
        apply_updates([CodebookUpdate(codebook, counts, sums, flat.shape[1], None)], gather_rows)
    return result


def _averages(codebook: Codebook) -> Averages | None:
    """The state that `quantize_step` updates; None if the update takes more than the statistics of this batch."""
    if not codebook.ema_update or codebook.manual_ema_update or codebook.accumulates or codebook.syncs_updates:
        return None
    state = Averages(codebook.cluster_size, codebook.embed_avg, codebook.usage)
    return state if cpu.supports(*state) else None
