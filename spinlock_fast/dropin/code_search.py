"""Base class of `VectorQuantize`: code search, gradient estimation and codebook updates for rows [H, N, D]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from spinlock_fast.dropin import dense_search, gradient_estimators, losses
from spinlock_fast.dropin.affine_codebook import NO_STATISTICS, AffineStatistics, Statistics
from spinlock_fast.dropin.codebook import Codebook, CodebookUpdate, UpdateWeight, apply_updates
from spinlock_fast.dropin.dead_codes import gather_from_heads
from spinlock_fast.dropin.input_layout import apply_projection
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.snapshot import snapshot
from spinlock_fast.kernels.ema_update import code_usage
from spinlock_fast.kernels.residual_vq import residual_vq
from spinlock_fast.kernels.residual_vq.op import Gradient
from spinlock_fast.quantize.activation_checkpointing import once
from spinlock_fast.quantize.buffers import TransientBuffers


@dataclass(frozen=True)
class CallOptions:
    """Arguments of one `forward` call that the search depends on."""

    mask: Tensor | None  # [b, n]
    row_mask: Tensor | None  # [N], for the rows of each codebook
    batch_shape: tuple[int, ...]  # b, n
    freeze_codebook: bool
    temperature: float
    input_requires_grad: bool
    topk: int | None
    keep_similarities: bool
    codebook_transform: Callable[[Tensor], Tensor] | None
    ema_update_weight: UpdateWeight = None
    accum_ema_update: bool = False
    ema_update: bool | None = None


@dataclass(frozen=True)
class SearchResult:
    """Codes of rows [H, N, D]."""

    codes: Tensor  # [H, N] or [H, N, k]
    quantized: Tensor  # [H, N, D] or [H, N, k, D], differentiable in the rows
    commitment: Tensor | None  # mean squared error; with topk [H, N, k], per row and code
    similarities: Tensor | None = None  # [H, N, K]
    in_place_loss: Tensor | None = None


class CodeSearch(TransientBuffers):
    """Searches codes and updates the codebook. Its attributes are set by the constructor of `VectorQuantize`."""

    _codebook: Codebook
    _affine: AffineStatistics | None
    codebook_size: int
    use_cosine_sim: bool
    learnable_codebook: bool
    has_commitment_loss: bool
    commitment_use_cross_entropy_loss: bool
    has_codebook_diversity_loss: bool
    stochastic_sample_codes: bool
    straight_through: bool
    rotation_trick: bool
    directional_reparam: bool
    directional_reparam_variance: float
    sync_update_v: float
    route_gradients_to_input: bool
    in_place_codebook_optimizer: torch.optim.Optimizer | None
    manual_in_place_optimizer_update: bool

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """Processes that share updates; None for all."""
        return self._codebook.processes.group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        self._codebook.processes.set(group)

    def utilization(self) -> Tensor:
        """Fraction of codes used in training since `reset_usage`: a scalar, or [heads] with one codebook per head."""
        return self._usage_statistics()[0]

    def perplexity(self) -> Tensor:
        """exp of the entropy of code use since `reset_usage`: a scalar, or [heads] with one codebook per head."""
        return self._usage_statistics()[1]

    def reset_usage(self) -> None:
        """Resets the counts behind `utilization` and `perplexity`."""
        self._codebook.usage.zero_()

    def _usage_statistics(self) -> tuple[Tensor, ...]:
        usage = self._codebook.usage
        H, K = usage.shape
        statistics = code_usage(usage.flatten(), CodebookLayout.of([K] * H, [1] * H), backend="reference")
        return tuple(values[0] if H == 1 else values for values in statistics)

    @property
    def needs_similarities(self) -> bool:
        """Whether training needs the similarities of all rows to all codes."""
        return self.training and (
            (self.commitment_use_cross_entropy_loss and self.has_commitment_loss)
            or self.has_codebook_diversity_loss
            or self.straight_through
        )

    @property
    def is_fusable(self) -> bool:
        """Whether the fused operator applies: nearest codes, which receive no gradient."""
        return not (
            self._codebook.learnable_codebook
            or self._affine is not None
            or self.needs_similarities
            or self.directional_reparam
            or (self.training and self.stochastic_sample_codes)
            or self.in_place_codebook_optimizer is not None
        )

    def gradient_mode(self, input_requires_grad: bool) -> Gradient:
        """Gradient estimator of the fused operator; "none" in eval mode."""
        if not (self.training and input_requires_grad and self.route_gradients_to_input):
            return "none"
        return "rotation" if self.rotation_trick else "straight_through"

    def update_in_place_optimizer(self) -> None:
        """Applies a step of `in_place_codebook_optimizer` with the current gradients."""
        if self.in_place_codebook_optimizer is None:
            return
        if self._codebook.syncs_updates:
            processes = self._codebook.processes
            for parameter in self._codebook.parameters():
                if parameter.grad is None:  # other processes may have a gradient
                    parameter.grad = torch.zeros_like(parameter)
                processes.sum_(parameter.grad).div_(processes.size())
        self.in_place_codebook_optimizer.step()
        self.in_place_codebook_optimizer.zero_grad()

    def _search(self, rows: Tensor, options: CallOptions) -> SearchResult:
        """Selects codes for rows [H, N, D] and, in training, updates the codebook."""
        once(self._codebook, lambda: self._codebook.initialize(rows, options.row_mask))
        nearest_only = options.topk is None and options.codebook_transform is None and not options.keep_similarities
        if nearest_only and self.is_fusable:
            return self._search_fused(rows, options)
        return self._search_unfused(rows, options)

    def _search_fused(self, rows: Tensor, options: CallOptions) -> SearchResult:
        H, codebook = rows.shape[0], self._codebook.current_embed
        updates = self.training and not options.freeze_codebook
        gradient = self.gradient_mode(options.input_requires_grad)
        heads = [
            residual_vq(
                rows[h],
                [codebook[h]],
                options.row_mask,
                cosine=self.use_cosine_sim,
                gradient=gradient,
                with_sums=updates,
            )
            for h in range(H)
        ]
        codes = torch.stack([head.codes[:, 0] for head in heads])
        quantized = heads[0].quantized[None] if H == 1 else torch.stack([head.quantized for head in heads])
        if gradient == "none":
            quantized = quantized.detach()  # its autograd node is shared with the errors, which may need a gradient
        num_rows = max(rows.shape[1], 1) if options.row_mask is None else options.row_mask.sum().clamp(min=1)
        commitment = torch.stack([head.errors[0] for head in heads]).sum() / (num_rows * H * rows.shape[2])
        if updates:
            counts, sums = torch.stack([head.counts for head in heads]), torch.stack([head.sums for head in heads])
            self._update_codebook(rows, counts, sums, options)
        return SearchResult(codes, quantized, commitment)

    def _update_codebook(self, rows: Tensor, counts: Tensor, sums: Tensor, options: CallOptions) -> None:
        codebook = self._codebook
        gather_rows = gather_from_heads(rows.detach(), codebook.transform_input)
        update = CodebookUpdate(codebook, counts, sums, rows.shape[1], options.row_mask)
        weight, accumulate = options.ema_update_weight, options.accum_ema_update
        action = partial(apply_updates, [update], gather_rows, weight, accumulate, options.ema_update)
        once(codebook, action, codebook.usage)

    def _search_unfused(self, rows: Tensor, options: CallOptions) -> SearchResult:
        codebook, affine, statistics = self._codebook, self._affine, NO_STATISTICS
        y = codebook.transform_input(rows)
        if affine is not None:
            statistics = once(codebook, lambda: affine.update(codebook, y, codebook.embed, options.row_mask))
        in_place_loss = None
        if self.in_place_codebook_optimizer is not None and self.training and not options.freeze_codebook:
            in_place_loss = once(codebook, lambda: self._optimize_in_place(y.detach(), options, statistics))
            selection = self._select(y, options, statistics)
        else:
            selection = self._select(y, options, statistics)
            self._update_from_selection(y, selection, options, statistics)
        target = y if options.topk is None else y[:, :, None].expand_as(selection.vectors)
        quantized = self._estimate_gradient(target, selection.vectors, options)
        learns = self.learnable_codebook and not options.freeze_codebook
        vectors = selection.vectors if learns else selection.vectors.detach()
        commitment = None
        if options.topk is not None:
            commitment = F.mse_loss(vectors if self.training else quantized, target, reduction="none").mean(-1)
        elif self.training:
            commitment = losses.squared_error(vectors, y, _expand_row_mask(options, y))
        return SearchResult(selection.codes, quantized, commitment, selection.similarities, in_place_loss)

    def _update_from_selection(
        self, y: Tensor, selection: dense_search.Selection, options: CallOptions, statistics: Statistics
    ) -> None:
        if self.training and not options.freeze_codebook and options.topk is None:
            rows = y if self._affine is None else self._affine.to_codes(statistics, y)
            counts, sums = self._codebook.count_and_sum(rows.detach(), selection.codes, options.row_mask)
            self._update_codebook(rows, counts, sums, options)

    def _optimize_in_place(self, y: Tensor, options: CallOptions, statistics: Statistics) -> Tensor:
        """Loss of the codes selected for rows y [H, N, D], after an optimizer step on it.

        The graph is separate: activation checkpointing around the quantizer must not save or recompute its tensors.
        """
        parameters = [parameter for parameter in self._codebook.parameters() if parameter.requires_grad]
        assert self.in_place_codebook_optimizer is not None
        held = [one for group in self.in_place_codebook_optimizer.param_groups for one in group["params"]]
        if not {id(parameter) for parameter in parameters} <= {id(one) for one in held}:
            raise RuntimeError(
                "in_place_codebook_optimizer was built for parameters that are no longer those of this layer:"
                " fully_shard and to_empty replace them, and it does not go with either"
            )
        with torch.enable_grad(), saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
            selection = self._select(y, options, statistics)
            self._update_from_selection(y, selection, options, statistics)
            loss = losses.squared_error(selection.vectors, y, _expand_row_mask(options, y))
            # Not `backward`: it would run the hooks of DistributedDataParallel during the forward pass.
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        if not self.manual_in_place_optimizer_update:
            self.update_in_place_optimizer()
        return loss.detach()

    def _select(self, y: Tensor, options: CallOptions, statistics: Statistics) -> dense_search.Selection:
        codes = self._codebook.codes(y.dtype)
        if self.training:
            codes = snapshot(codes)  # updates change them in place, before the backward pass
        codes = self._transform_codes(codes, statistics)
        if options.codebook_transform is not None:
            codes = self._codebook.transform_input(options.codebook_transform(codes).flatten(1, 2))  # [H, N, K, D]
        samples = self.training and options.temperature > 0
        stochastic = samples and self.stochastic_sample_codes
        if self.needs_similarities or options.keep_similarities or options.topk is not None or codes.ndim == 4:
            return dense_search.select_codes(
                y,
                codes,
                self.use_cosine_sim,
                temperature=options.temperature,
                stochastic=stochastic,
                differentiable=samples and self.straight_through,
                k=options.topk,
            )
        if stochastic:
            index = dense_search.sample_codes(y, codes, self.use_cosine_sim, options.temperature)
        else:
            index = dense_search.nearest_codes(y, codes, self.use_cosine_sim)
        return dense_search.Selection(index, dense_search.gather_codes(codes, index), None)

    def _transform_codes(self, codes: Tensor, statistics: Statistics) -> Tensor:
        """Applies `vq_bridge` and `affine_param` to codes [H, K, D]."""
        bridge = self._codebook.vq_bridge
        codes = codes if bridge is None else apply_projection(bridge, codes).to(codes.dtype)
        return codes if self._affine is None else self._affine.to_latents(statistics, codes)

    def effective_codes(self) -> Tensor:
        """Codes [H, K, D] after `vq_bridge` and `affine_param`, as inputs are compared with them."""
        statistics = NO_STATISTICS if self._affine is None else self._affine.current(self._codebook)
        return self._transform_codes(self._codebook.codes(self._codebook.embed.dtype), statistics)

    def _estimate_gradient(self, rows: Tensor, vectors: Tensor, options: CallOptions) -> Tensor:
        """Code vectors with the configured gradient to the rows."""
        if not self.training:
            return vectors
        if options.input_requires_grad and self.route_gradients_to_input:
            if self.rotation_trick:
                vectors = gradient_estimators.rotation_trick(rows, vectors)
            elif self.directional_reparam:
                variance = self.directional_reparam_variance
                vectors = gradient_estimators.directional_reparam(rows, vectors, variance)
            else:
                vectors = gradient_estimators.straight_through(rows, vectors)
        if self.sync_update_v > 0.0:
            vectors = vectors + self.sync_update_v * (vectors - vectors.detach())
        return vectors


def _expand_row_mask(options: CallOptions, y: Tensor) -> Tensor | None:
    return None if options.row_mask is None else options.row_mask.expand(y.shape[:2])
