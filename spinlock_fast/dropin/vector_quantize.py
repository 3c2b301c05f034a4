"""`VectorQuantize` of vector-quantize-pytorch: same arguments, returns and state dict, without N x K in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spinlock_fast.dropin.affine import Affine
from spinlock_fast.dropin.arguments import check_mask, checked_corrections, refuse_contradictions, warn_reference
from spinlock_fast.dropin.codebook import Codebook, Weight
from spinlock_fast.dropin.decoding import checked_indices, code_vectors, hide_missing
from spinlock_fast.dropin.heads import Heads
from spinlock_fast.dropin.search import Call, search
from spinlock_fast.dropin.shapes import InputShape, beside, lengths_to_mask, projected, widened
from spinlock_fast.dropin.total import cross_entropy_of, per_position, total_loss
from spinlock_fast.dropin.usage import CodeUsage
from spinlock_fast.quantize.activation_checkpointing import takes_gradient
from spinlock_fast.quantize.buffers import TransientBuffers
from spinlock_fast.quantize.process_group import Processes


class VectorQuantize(CodeUsage, TransientBuffers):
    """Replaces vectors by their nearest codes, which follow them by moving average or by gradient.

    Arguments, `forward` and returns are those of vector-quantize-pytorch 1.32 and documented there; docs/drop-in.md
    says how each is served. In addition:

    Args:
        corrections: names in `arguments.CORRECTIONS`, or "all": what the original does that looks unintended is
            repeated unless named here.
        process_group: of `torch.distributed`: the processes that share updates and k-means; None for all. Whether
            they do is decided in each call of `forward`: `sync_codebook=None` if there are several by then.

    Shapes:
        x [b, n, dim] (or [b, dim]; `channel_last=False` [b, dim, n]; images [b, dim, h, w]; videos [b, dim, d, h, w])
        -> quantized like x; codes [b, n] int64, [b, n, heads] with several, -1 where masked; loss scalar.

    Raises:
        ValueError: arguments that contradict each other, or an input that does not fit.
        NotImplementedError: `sync_affine_param`.
    """

    zero: Tensor
    _codebook: Codebook

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
        by_gradient = directional_reparam or vq_bridge is not None
        ema_update = not by_gradient if ema_update is None else ema_update
        learnable_codebook = by_gradient if learnable_codebook is None else learnable_codebook
        rotation_trick = (not directional_reparam and dim > 1) if rotation_trick is None else rotation_trick
        refuse_contradictions(
            straight_through=straight_through,
            rotation_trick=rotation_trick,
            directional_reparam=directional_reparam,
            threshold_ema_dead_code=threshold_ema_dead_code,
            use_cosine_sim=use_cosine_sim,
            learnable_codebook=learnable_codebook,
            ema_update=ema_update,
            has_bridge=vq_bridge is not None,
            sync_update_v=sync_update_v,
            affine_param=affine_param,
            sync_affine_param=sync_affine_param,
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

        self._heads = Heads(heads, separate_codebook_per_head)
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
        self.corrections = checked_corrections(corrections)
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
        self._affine: Affine | None = None
        if affine_param:
            H = self._codebook.num_codebooks
            self._affine = Affine(
                self._codebook, H, codebook_dim, affine_param_batch_decay, affine_param_codebook_decay
            )
        self.in_place_codebook_optimizer = (
            in_place_codebook_optimizer(self._codebook.parameters()) if in_place_codebook_optimizer else None
        )
        self.register_transient_buffers()
        self._say_what_is_slow()

    def transient_buffers(self) -> dict[str, Tensor]:
        return {"zero": torch.zeros((), device="cpu")}

    def _say_what_is_slow(self) -> None:
        for name in ("commitment_use_cross_entropy_loss", "has_codebook_diversity_loss", "straight_through"):
            if getattr(self, name):
                warn_reference(name.removeprefix("has_"))
        if self._affine is not None:
            warn_reference("affine_param", "forms means and variances with separate operations")
        for name in ("directional_reparam", "in_place_codebook_optimizer"):
            if getattr(self, name):
                warn_reference(name, "quantizes with separate operations")

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The processes that share updates; None for all."""
        return self._codebook.processes.group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        self._codebook.processes.set(group)

    @property
    def ema_update(self) -> bool:
        return self._codebook.ema_update

    @property
    def needs_distances(self) -> bool:
        """Whether training forms the distances of all rows to all codes."""
        return self.training and (
            (self.commitment_use_cross_entropy_loss and self.has_commitment_loss)
            or self.has_codebook_diversity_loss
            or self.straight_through
        )

    @property
    def is_plain(self) -> bool:
        """Whether codes are the nearest and take no gradient, so that one operator does it all."""
        book = self._codebook
        return not (
            book.learnable_codebook
            or self._affine is not None
            or self.needs_distances
            or self.directional_reparam
            or (self.training and self.stochastic_sample_codes)
            or self.in_place_codebook_optimizer is not None
        )

    @property
    def codebook(self) -> Tensor:
        """[K, codebook_dim], or [heads, K, codebook_dim] with a codebook per head. Setting it sets the averages too."""
        return self._codebook.embed if self.separate_codebook_per_head else self._codebook.embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        self._codebook.set_codes(codes if self.separate_codebook_per_head else codes[None])

    def extra_repr(self) -> str:
        return f"dim={self.dim}, codebook_size={self.codebook_size}, heads={self.heads}"

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Code vectors [b, ..., D] of indices [b, ...] ([b, ..., heads] with a codebook per head), channels where the
        input has them. An index of -1 (masked) gives 0.

        Raises:
            ValueError: indices that are not integers, or not of all heads.
            IndexError: an index outside the codebook, on a CPU.
        """
        return self._channels_as_in_input(self._code_vectors(checked_indices(indices)))

    def _code_vectors(self, indices: Tensor) -> Tensor:
        """Channels last."""
        if self.heads > 1 and (indices.ndim < 2 or indices.shape[-1] != self.heads):
            raise ValueError(f"indices must be [b, ..., heads] of {self.heads} heads, got {list(indices.shape)}")
        books = self.codes_in_use()
        if not self.separate_codebook_per_head:
            return code_vectors(books[0], indices)
        heads = indices.unbind(-1) if self.heads > 1 else (indices,)
        return torch.cat([code_vectors(book, index) for book, index in zip(books, heads, strict=True)], -1)

    def codes_in_use(self) -> Tensor:
        """[H, K, D] what inputs are compared with: the codebook, as `vq_bridge` and `affine_param` change it."""
        book = self._codebook
        codes = book.codes(book.embed.dtype)
        codes = codes if book.vq_bridge is None else projected(book.vq_bridge, codes).to(codes.dtype)
        return codes if self._affine is None else self._affine.apply(self._affine.statistics(book), codes)

    def _channels_as_in_input(self, values: Tensor) -> Tensor:
        last = self.channel_last and not (self.accept_image_fmap or self.accept_3d_fmap)
        return values if last else values.movedim(-1, 1)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` returns in eval mode for these codes; 0 where masked (-1).

        Raises:
            ValueError: indices that are not integers, or not of all heads.
            IndexError: an index outside the codebook, on a CPU.
        """
        indices = checked_indices(indices)
        codes = self._code_vectors(indices)
        if self.heads > 1 and not self.separate_codebook_per_head:
            codes = codes.flatten(-2)
        missing = indices == -1
        output = hide_missing(projected(self.project_out, codes), missing if self.heads > 1 else missing[..., None])
        return self._channels_as_in_input(output)

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
        ema_update_weight: Weight = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> Any:
        """Quantizes and, in training mode, updates the codes.

        Args:
            x: see the class.
            indices: codes whose cross entropy is returned instead: (quantized, loss).
            mask: [b, n] bool; where False a row gives code -1 and 0 and takes no part.
            lens: [b] lengths, in place of `mask`.
            topk: return the k nearest codes of each row, [b, n, k], without an update.
            sample_codebook_temp: of `stochastic_sample_codes`.
            freeze_codebook: no update.
            return_loss_breakdown: append a `LossBreakdown`.
            codebook_transform_fn: codes [H, K, D] -> codes of each row [H, b, n, K, D].
            ema_update_weight: [K] or [H, K] factor of 1 - decay, or a function of sums and counts.
            accum_ema_update: keep counts and sums for the next update: of gradient accumulation.
            ema_update: overrides that of the constructor.
        """
        shape = InputShape.of(x, self.dim, self.channel_last, self.accept_image_fmap, self.accept_3d_fmap)
        origin = shape.rows(x)
        if lens is not None:
            refuse_contradictions(mask_and_lens=mask is not None)
            mask = lengths_to_mask(lens, origin.shape[1])
        if mask is not None and shape.layout in ("token", "image", "video"):
            raise ValueError(f"mask does not go with an input of shape {list(x.shape)}")
        check_mask(mask, origin)
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        if topk is not None:
            topk = self._checked_topk(topk)
        for name, value in (("indices", indices), ("topk", topk), ("codebook_transform_fn", codebook_transform_fn)):
            if value is not None and not torch.compiler.is_compiling():
                warn_reference(name)
        call = Call(
            mask=mask,
            row_mask=None if mask is None else self._heads.row_mask(mask),
            positions=tuple(origin.shape[:2]),
            frozen=frozen,
            temperature=self.sample_codebook_temp if sample_codebook_temp is None else sample_codebook_temp,
            input_grad=takes_gradient(self._codebook, x) if self.training else x.requires_grad,
            topk=topk,
            with_distances=indices is not None,
            transform=codebook_transform_fn,
            weight=ema_update_weight,
            accumulate=accum_ema_update,
            ema_update=ema_update,
        )
        found = search(self, widened(self._heads.split(projected(self.project_in, origin))), call)
        if indices is not None:
            return cross_entropy_of(self, found, indices, call, x.dtype)
        codes = self._heads.join_codes(found.codes, call.positions)
        loss, breakdown = total_loss(self, found, origin, call, codes)
        joined = self._heads.join(found.quantized, call.positions)
        output = projected(self.project_out, joined).to(x.dtype)
        if mask is not None:
            hidden = torch.zeros_like(origin) if self.return_zeros_for_masked_padding else origin
            output = torch.where(beside(mask, output), output, hidden if topk is None else hidden[:, :, None])
            codes = torch.where(beside(mask, codes), codes, -1)
        if loss.ndim > 1:
            loss = shape.restore_positions(loss)
        result = shape.restore(output), shape.restore_positions(codes), loss
        return (*result, breakdown) if return_loss_breakdown else result

    def choose_several(
        self,
        rows: Tensor,
        k: int,
        mask: Tensor | None = None,
        temperature: float | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For rows [b, n, D] the k nearest: quantized [b, n, k, D], codes [b, n, k], losses [b, n, k].

        Masked rows have code -1, and 0 else. For beam search: heads, projections and updates are left out.
        """
        call = Call(
            mask=mask,
            row_mask=None if mask is None else mask.flatten(),
            positions=tuple(rows.shape[:2]),
            frozen=True,
            temperature=self.sample_codebook_temp if temperature is None else temperature,
            input_grad=takes_gradient(self._codebook, rows) if self.training else rows.requires_grad,
            topk=min(k, self.codebook_size),
            with_distances=False,
            transform=transform,
        )
        found = search(self, widened(rows.reshape(1, -1, rows.shape[-1])), call)
        codes = found.codes.view(*rows.shape[:2], found.codes.shape[-1])
        quantized = found.quantized.view(*codes.shape, rows.shape[-1]).to(rows.dtype)
        weight = self.commitment_weight if self.has_commitment_loss else 0.0 if self.training else 1.0
        assert found.commitment is not None
        errors = per_position(found.commitment, call) * weight
        if mask is None:
            return quantized, codes, errors
        hidden = torch.zeros_like(rows) if self.return_zeros_for_masked_padding else rows
        quantized = torch.where(mask[..., None, None], quantized, hidden[:, :, None])
        return quantized, codes.masked_fill(~mask[..., None], -1), errors

    def _checked_topk(self, topk: int) -> int:
        refuse_contradictions(
            topk_of_heads=self.heads > 1,
            topk_below_1=int(topk) < 1,
            topk_with_cross_entropy=self.training and self.commitment_use_cross_entropy_loss,
            topk_with_optimizer=self.training and self.in_place_codebook_optimizer is not None,
        )
        return min(int(topk), self.codebook_size)

    @torch.no_grad()
    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """Moves the averages by the codes that rows were given, as `forward` does by the nearest."""
        shape = InputShape.of(x, self.dim, self.channel_last, self.accept_image_fmap, self.accept_3d_fmap)
        self.update_rows(projected(self.project_in, shape.rows(x)), shape.flatten_positions(indices), mask)

    update_ema_indices = update_indices

    @torch.no_grad()
    def update_rows(self, rows: Tensor, codes: Tensor, mask: Tensor | None = None) -> None:
        """`update_indices` of projected rows [b, n, codebook_dim * heads] with codes [b, n, ...]."""
        split = self._codebook.transform_input(widened(self._heads.split(rows)))
        row_mask = None if mask is None else self._heads.row_mask(mask)
        self._codebook.update_indices(split, self._heads.split_codes(codes), row_mask)

    @torch.no_grad()
    def expire_codes_(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Replaces codes that are hardly used by rows of x [b, n, codebook_dim * heads]."""
        self._codebook.expire_codes_(
            widened(self._heads.split(x)), None if mask is None else self._heads.row_mask(mask)
        )

    def update_in_place_optimizer(self) -> None:
        """A step of `in_place_codebook_optimizer` with the gradients that there are."""
        if self.in_place_codebook_optimizer is None:
            return
        if self._codebook.shared:
            processes = self._codebook.processes
            for parameter in self._codebook.parameters():
                if parameter.grad is None:  # here; it may be there in other processes
                    parameter.grad = torch.zeros_like(parameter)
                processes.sum_(parameter.grad).div_(processes.size())
        self.in_place_codebook_optimizer.step()
        self.in_place_codebook_optimizer.zero_grad()
