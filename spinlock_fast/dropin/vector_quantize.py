"""`VectorQuantize` of vector-quantize-pytorch: same arguments, returns and state dict, without an N x K matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spinlock_fast.dropin import eager_step
from spinlock_fast.dropin.affine_codebook import AffineStatistics
from spinlock_fast.dropin.arguments import check_compatible, check_corrections, check_mask, warn_unfused
from spinlock_fast.dropin.code_search import CallOptions
from spinlock_fast.dropin.codebook import Codebook, UpdateWeight
from spinlock_fast.dropin.decoding import check_indices, code_vectors, zero_missing
from spinlock_fast.dropin.head_layout import HeadLayout
from spinlock_fast.dropin.input_layout import (
    InputLayout,
    apply_projection,
    at_least_float32,
    expand_mask,
    lengths_to_mask,
)
from spinlock_fast.dropin.training_loss import TrainingLoss
from spinlock_fast.quantize.activation_checkpointing import takes_gradient
from spinlock_fast.quantize.process_group import Processes


class VectorQuantize(TrainingLoss):
    """Vector quantization: replaces vectors by their nearest codes, learned by moving average or by gradient.

    Arguments, `forward` and returns are those of vector-quantize-pytorch 1.32 and documented there; docs/drop-in.md
    lists how each is implemented. Additional arguments:

    Args:
        corrections: names in `arguments.CORRECTIONS`, or "all". Unintended behaviour of vector-quantize-pytorch is
            reproduced unless its correction is named.
        process_group: `torch.distributed` group that shares updates and k-means; None for all processes. With
            `sync_codebook=None`, each call of `forward` synchronises if several processes run.

    Shapes:
        x [b, n, dim] (or [b, dim]; `channel_last=False` [b, dim, n]; images [b, dim, h, w]; videos [b, dim, d, h, w])
        -> quantized, same shape; codes [b, n] int64, [b, n, heads] with several heads, -1 where masked; loss scalar.

    Raises:
        ValueError: incompatible arguments, or an input of the wrong shape or dtype.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        commitment_use_cross_entropy_loss: bool = False,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_active_codes_only: bool = False,
        orthogonal_reg_max_codes: int | None = None,
        codebook_diversity_loss_weight: float = 0.0,
        codebook_diversity_temperature: float = 100.0,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 1.0,
        straight_through: bool = False,
        rotation_trick: bool | None = None,
        directional_reparam: bool = False,
        directional_reparam_variance: float = 5e-3,
        sync_codebook: bool | None = None,
        sync_affine_param: bool = False,
        ema_update: bool | None = None,
        vq_bridge: nn.Module | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        in_place_codebook_optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        manual_in_place_optimizer_update: bool = False,
        affine_param: bool = False,
        affine_param_batch_decay: float = 0.99,
        affine_param_codebook_decay: float = 0.9,
        sync_update_v: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input: bool = True,
        *,
        corrections: Iterable[str] | str = (),
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        learn_by_gradient = directional_reparam or vq_bridge is not None
        ema_update = not learn_by_gradient if ema_update is None else ema_update
        learnable_codebook = learn_by_gradient if learnable_codebook is None else learnable_codebook
        rotation_trick = (not directional_reparam and dim > 1) if rotation_trick is None else rotation_trick
        check_compatible(
            straight_through=straight_through,
            rotation_trick=rotation_trick,
            directional_reparam=directional_reparam,
            threshold_ema_dead_code=threshold_ema_dead_code,
            use_cosine_sim=use_cosine_sim,
            learnable_codebook=learnable_codebook,
            ema_update=ema_update,
            vq_bridge=vq_bridge is not None,
            sync_update_v=sync_update_v,
            affine_param=affine_param,
        )
        self.dim, self.codebook_size, self.heads = dim, codebook_size, heads
        self.separate_codebook_per_head = separate_codebook_per_head
        codebook_dim = dim if codebook_dim is None else codebook_dim
        self.has_projections = codebook_dim * heads != dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(dim, codebook_dim * heads)
            if layernorm_after_project_in:
                self.project_in = nn.Sequential(self.project_in, nn.LayerNorm(codebook_dim * heads))
            self.project_out = nn.Linear(codebook_dim * heads, dim)

        self._head_layout = HeadLayout(heads, separate_codebook_per_head)
        self.eps, self.channel_last = eps, channel_last
        self.accept_image_fmap, self.accept_3d_fmap = accept_image_fmap, accept_3d_fmap
        self.commitment_weight = commitment_weight
        self.has_commitment_loss = commitment_weight > 0.0 and not directional_reparam
        self.commitment_use_cross_entropy_loss = commitment_use_cross_entropy_loss
        self.orthogonal_reg_weight = orthogonal_reg_weight
        self.has_codebook_orthogonal_loss = orthogonal_reg_weight > 0.0
        self.orthogonal_reg_active_codes_only = orthogonal_reg_active_codes_only
        self.orthogonal_reg_max_codes = orthogonal_reg_max_codes
        self.codebook_diversity_loss_weight = codebook_diversity_loss_weight
        self.has_codebook_diversity_loss = codebook_diversity_loss_weight > 0.0
        self.codebook_diversity_temperature = codebook_diversity_temperature
        self.stochastic_sample_codes, self.sample_codebook_temp = stochastic_sample_codes, sample_codebook_temp
        self.straight_through, self.rotation_trick = straight_through, rotation_trick
        self.directional_reparam = directional_reparam
        self.directional_reparam_variance = directional_reparam_variance
        self.learnable_codebook, self.sync_update_v = learnable_codebook, sync_update_v
        self.use_cosine_sim, self.freeze_codebook = use_cosine_sim, freeze_codebook
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.route_gradients_to_input = route_gradients_to_input
        self.manual_in_place_optimizer_update = manual_in_place_optimizer_update
        self.corrections = check_corrections(corrections)
        self._codebook = Codebook(
            codebook_dim,
            codebook_size,
            heads if separate_codebook_per_head else 1,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            sync_kmeans=sync_kmeans,
            decay=decay,
            eps=eps,
            threshold_ema_dead_code=threshold_ema_dead_code,
            use_ddp=sync_codebook,
            processes=Processes(process_group),
            learnable_codebook=self.has_codebook_orthogonal_loss or learnable_codebook,
            ema_update=ema_update,
            manual_ema_update=manual_ema_update,
            use_cosine_sim=use_cosine_sim,
            vq_bridge=vq_bridge,
            corrections=self.corrections,
        )
        self._affine = None
        if affine_param:
            shape, decays = (
                (self._codebook.num_codebooks, codebook_dim),
                (affine_param_batch_decay, affine_param_codebook_decay),
            )
            processes = self._codebook.processes if sync_affine_param else None
            self._affine = AffineStatistics(self._codebook, shape, *decays, processes)
        self.in_place_codebook_optimizer = (
            in_place_codebook_optimizer(self._codebook.parameters()) if in_place_codebook_optimizer else None
        )
        self.register_transient_buffers()
        self._warn_unfused_arguments()

    def transient_buffers(self) -> dict[str, Tensor]:
        return {"zero": torch.zeros((), device="cpu")}

    def _warn_unfused_arguments(self) -> None:
        for name in ("commitment_use_cross_entropy_loss", "has_codebook_diversity_loss", "straight_through"):
            if getattr(self, name):
                warn_unfused(name.removeprefix("has_"))
        if self._affine is not None:
            warn_unfused("affine_param", "forms means and variances with separate operations")
        for name in ("directional_reparam", "in_place_codebook_optimizer"):
            if getattr(self, name):
                warn_unfused(name, "quantizes with separate operations")

    @property
    def ema_update(self) -> bool:
        return self._codebook.ema_update

    @property
    def codebook(self) -> Tensor:
        """[K, codebook_dim], or [heads, K, codebook_dim] with one codebook per head. Setting updates the averages."""
        return self._codebook.embed if self.separate_codebook_per_head else self._codebook.embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        self._codebook.set_codes(codes if self.separate_codebook_per_head else codes[None])

    def extra_repr(self) -> str:
        return f"dim={self.dim}, codebook_size={self.codebook_size}, heads={self.heads}"

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Code vectors [b, ..., D] of indices [b, ...] ([b, ..., heads] with one codebook per head); 0 for index -1.

        Channels are in the same dimension as in the input.

        Raises:
            ValueError: indices that are not integers, or whose last dimension is not `heads`.
            IndexError: an index outside the codebook, on a CPU.
        """
        return self._restore_channel_dim(self._code_vectors(check_indices(indices)))

    def _code_vectors(self, indices: Tensor) -> Tensor:
        """As `get_codes_from_indices`, channels last."""
        if self.heads > 1 and (indices.ndim < 2 or indices.shape[-1] != self.heads):
            raise ValueError(f"indices must be [b, ..., heads] of {self.heads} heads, got {list(indices.shape)}")
        codebooks = self.effective_codes()
        if not self.separate_codebook_per_head:
            return code_vectors(codebooks[0], indices)
        heads = indices.unbind(-1) if self.heads > 1 else (indices,)
        return torch.cat([code_vectors(codebook, index) for codebook, index in zip(codebooks, heads, strict=True)], -1)

    def _restore_channel_dim(self, values: Tensor) -> Tensor:
        channel_last = self.channel_last and not (self.accept_image_fmap or self.accept_3d_fmap)
        return values if channel_last else values.movedim(-1, 1)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The output of `forward` in eval mode for these codes; 0 where masked (-1).

        Raises:
            ValueError: indices that are not integers, or whose last dimension is not `heads`.
            IndexError: an index outside the codebook, on a CPU.
        """
        indices = check_indices(indices)
        codes = self._code_vectors(indices)
        if self.heads > 1 and not self.separate_codebook_per_head:
            codes = codes.flatten(-2)
        missing = indices == -1
        missing = missing if self.heads > 1 else missing[..., None]
        return self._restore_channel_dim(zero_missing(apply_projection(self.project_out, codes), missing))

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: Callable[[Tensor], Tensor] | None = None,
        ema_update_weight: UpdateWeight = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> Any:
        """Quantizes x and, in training mode, updates the codebook.

        Args:
            x: input, see the class for shapes.
            indices: codes [b, n(, heads)]; returns (quantized, cross entropy of these codes) instead.
            mask: [b, n] bool; rows where it is False are ignored and get code -1 and output 0.
            lens: [b] lengths, in place of `mask`.
            topk: returns the k nearest codes of each row, [b, n, k], without an update.
            sample_codebook_temp: temperature of `stochastic_sample_codes`.
            freeze_codebook: no update.
            return_loss_breakdown: appends a `LossBreakdown` to the result.
            codebook_transform_fn: maps codes [H, K, D] to codes of each row [H, b, n, K, D].
            ema_update_weight: [K] or [H, K] factor of 1 - decay, or a function of sums and counts that returns it.
            accum_ema_update: accumulates counts and sums for the next update (gradient accumulation).
            ema_update: overrides the constructor's `ema_update`.
        """
        layout = InputLayout.of(x, self.dim, self.channel_last, self.accept_image_fmap, self.accept_3d_fmap)
        origin = layout.to_rows(x)
        others = (indices, mask, lens, topk, codebook_transform_fn, ema_update_weight, ema_update)
        plain = not (return_loss_breakdown or accum_ema_update) and all(other is None for other in others)
        projected = None
        if plain and self.training and not torch.compiler.is_compiling():
            projected = apply_projection(self.project_in, origin) if self.has_projections else origin
            returned = eager_step.forward(self, x, projected, layout, freeze_codebook)
            if returned is not None:
                return returned
        if lens is not None:
            if mask is not None:
                raise ValueError("give mask or lens, not both")
            mask = lengths_to_mask(lens, origin.shape[1])
        if mask is not None and layout.layout in ("token", "image", "video"):
            raise ValueError(f"mask does not go with an input of shape {list(x.shape)}")
        check_mask(mask, origin)
        if topk is not None:
            topk = self._check_topk(topk)
        for name, value in (("indices", indices), ("topk", topk), ("codebook_transform_fn", codebook_transform_fn)):
            if value is not None and not torch.compiler.is_compiling():
                warn_unfused(name)
        options = CallOptions(
            mask=mask,
            row_mask=None if mask is None else self._head_layout.row_mask(mask),
            batch_shape=tuple(origin.shape[:2]),
            freeze_codebook=self.freeze_codebook if freeze_codebook is None else freeze_codebook,
            temperature=self.sample_codebook_temp if sample_codebook_temp is None else sample_codebook_temp,
            input_requires_grad=takes_gradient(self._codebook, x) if self.training else x.requires_grad,
            topk=topk,
            keep_similarities=indices is not None,
            codebook_transform=codebook_transform_fn,
            ema_update_weight=ema_update_weight,
            accum_ema_update=accum_ema_update,
            ema_update=ema_update,
        )
        projected = apply_projection(self.project_in, origin) if projected is None else projected
        rows = self._head_layout.split(projected)
        result = self._search(at_least_float32(rows), options)
        if indices is not None:
            return self._cross_entropy(result, indices, options, x.dtype)
        codes = self._head_layout.merge_codes(result.codes, options.batch_shape)
        loss, breakdown = self._total_loss(result, origin, options, codes)
        merged = self._head_layout.merge(result.quantized, options.batch_shape)
        output = apply_projection(self.project_out, merged).to(x.dtype)
        if mask is not None:
            padding = torch.zeros_like(origin) if self.return_zeros_for_masked_padding else origin
            output = torch.where(expand_mask(mask, output), output, padding if topk is None else padding[:, :, None])
            codes = torch.where(expand_mask(mask, codes), codes, -1)
        if loss.ndim > 1:
            loss = layout.unflatten_positions(loss)
        returned = layout.from_rows(output), layout.unflatten_positions(codes), loss
        return (*returned, breakdown) if return_loss_breakdown else returned

    def _check_topk(self, topk: int) -> int:
        if self.heads > 1:
            raise ValueError("topk needs heads=1")
        if int(topk) < 1:
            raise ValueError("topk must be at least 1")
        if self.training and self.commitment_use_cross_entropy_loss:
            raise ValueError("topk does not go with commitment_use_cross_entropy_loss in training")
        if self.training and self.in_place_codebook_optimizer is not None:
            raise ValueError("topk does not go with in_place_codebook_optimizer in training")
        return min(int(topk), self.codebook_size)

    @torch.no_grad()
    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """Updates the codebook as `forward` does, with given codes instead of the nearest."""
        layout = InputLayout.of(x, self.dim, self.channel_last, self.accept_image_fmap, self.accept_3d_fmap)
        rows = apply_projection(self.project_in, layout.to_rows(x))
        self.update_from_projected(rows, layout.flatten_positions(indices), mask)

    update_ema_indices = update_indices

    @torch.no_grad()
    def update_from_projected(self, rows: Tensor, codes: Tensor, mask: Tensor | None = None) -> None:
        """`update_indices` for projected rows [b, n, codebook_dim * heads] and codes [b, n, ...]."""
        split = self._codebook.transform_input(at_least_float32(self._head_layout.split(rows)))
        row_mask = None if mask is None else self._head_layout.row_mask(mask)
        self._codebook.update_indices(split, self._head_layout.split_codes(codes), row_mask)

    @torch.no_grad()
    def expire_codes_(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Replaces dead codes by random rows of x [b, n, codebook_dim * heads]."""
        row_mask = None if mask is None else self._head_layout.row_mask(mask)
        self._codebook.expire_codes_(at_least_float32(self._head_layout.split(x)), row_mask)
