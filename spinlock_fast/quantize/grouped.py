"""`GroupedVectorQuantizer`: codebooks of different sizes, quantized in batched operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spinlock_fast.kernels._common.backend import Backend, check_backend, resolve_backend
from spinlock_fast.kernels._common.export import exporting
from spinlock_fast.kernels._common.guard import check_dense
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.dead_codes import reset_dead_codes
from spinlock_fast.kernels.ema_update import code_usage, ema_update
from spinlock_fast.kernels.vq_assign import Assignment, lookup, vq_assign
from spinlock_fast.quantize.activation_checkpointing import first_run_values, once
from spinlock_fast.quantize.buffers import TransientBuffers
from spinlock_fast.quantize.code_statistics import pack_statistics, unpack_statistics
from spinlock_fast.quantize.kmeans import initialize_codes, kmeans
from spinlock_fast.quantize.module_state import FirstBatch, keep_float32
from spinlock_fast.quantize.process_group import Processes
from spinlock_fast.quantize.quantization_loss import quantization_loss
from spinlock_fast.quantize.sharded_parameters import ShardKey, assign_, gathered, is_sharded, store_written

Gradient = Literal["straight_through", "rotation"] | None


def _no_update() -> None:
    pass


class GroupedVectorQuantizer(TransientBuffers):
    """Quantizes packed latents with G codebooks of different sizes in batched operations.

    Args:
        num_codes: K_g of each codebook.
        dims: D_g of each codebook.
        decay: decay of the moving averages; 0 replaces codes by the batch means.
        commitment_weight: weight of the commitment loss.
        codebook_init: "kmeans" fits the codes to the first training batch, unless `initialize` was called before;
            "uniform" draws them from U(-1/K_g, 1/K_g).
        use_ema: updates codes by moving average (van den Oord et al. 2017). False makes them a parameter, trained by
            the gradient of mean((sg(z) - e)^2).
        rotation_trick: rotation gradient instead of straight-through (arXiv 2410.06424).
        smoothing: "none" leaves unused codes in place; "laplace" is the rule of the 2017 paper.
        centred: subtracts each codebook's mean code before distances are computed, which avoids cancellation for data
            far from the origin. Not needed for LayerNorm-ed latents.
        sync: sums the counts and sums of all processes in updates and in the k-means initialisation, with one
            all-reduce per step of a size that does not depend on the data. Evaluated in each call, so
            `init_process_group` may be called after construction.
        backend: "auto", "triton" or "reference". "auto" uses the environment variable SPINLOCK_FAST_BACKEND if it is
            set, else Triton on CUDA devices.
        process_group: the processes of `torch.distributed` that share updates; None for all. Copies have the same
            group. It cannot be pickled: set it again after unpickling.

    Shapes:
        z [..., sum D] -> quantized [..., sum D], codes [..., G] int64, loss scalar.

    A row that is not finite in a codebook gets code -1 and NaN there, is left out of the loss and the averages, and is
    counted in `nonfinite_rows`. A masked row gets code -1 and zeros, and no gradient.

    The moving averages stay float32 if the module is cast to half precision; usage counts are int64. Under activation
    checkpointing (`torch.utils.checkpoint`) a recomputation uses the codes of the first run and does not update them.

    Raises:
        ValueError: invalid sizes or options, or an input whose shape does not fit.
    """

    embedding: Tensor
    cluster_size: Tensor
    embedding_sum: Tensor
    initialized: Tensor
    usage: Tensor
    rows_seen: Tensor

    def __init__(
        self,
        num_codes: Sequence[int],
        dims: Sequence[int],
        decay: float = 0.99,
        commitment_weight: float = 0.25,
        codebook_init: Literal["kmeans", "uniform"] = "kmeans",
        use_ema: bool = True,
        rotation_trick: bool = False,
        smoothing: Literal["none", "laplace"] = "none",
        centred: bool = True,
        sync: bool = True,
        backend: Backend = "auto",
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        if codebook_init not in ("kmeans", "uniform"):
            raise ValueError(f"codebook_init must be kmeans or uniform, got {codebook_init!r}")
        if smoothing not in ("none", "laplace"):
            raise ValueError(f"smoothing must be none or laplace, got {smoothing!r}")
        check_backend(backend)
        self.layout = CodebookLayout.of(num_codes, dims)
        self.decay = decay
        self.commitment_weight = commitment_weight
        self.codebook_init = codebook_init
        self.use_ema = use_ema
        self.rotation_trick = rotation_trick
        self.smoothing = smoothing
        self.centred = centred
        self.sync = sync
        self.processes = Processes(process_group)
        self.requested_backend, self.frozen = backend, False

        layout = self.layout
        index = layout.indices(torch.device("cpu"))
        bound = (1.0 / index.num_codes)[index.codebook_of_code][index.code_of_entry]
        codes = 2.0 * torch.rand(layout.total_entries) - 1.0
        codes = codes * bound.to(codes.device)
        if use_ema:
            self.register_buffer("embedding", codes)
        else:
            self.embedding = nn.Parameter(codes)
        average_dtype = torch.promote_types(codes.dtype, torch.float32)
        self.register_buffer("cluster_size", torch.ones(layout.total_codes, dtype=average_dtype))
        self.register_buffer("embedding_sum", codes.to(average_dtype, copy=True))
        self.register_buffer("initialized", torch.tensor(codebook_init == "uniform"))
        self.register_transient_buffers()
        self._first_batch, self.shard_key = FirstBatch(codebook_init == "kmeans", self.processes), ShardKey()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        averages = ("cluster_size", "embedding_sum")
        return keep_float32(self, averages, lambda: super(GroupedVectorQuantizer, self)._apply(fn, recurse))

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The processes that share updates; None for all."""
        return self.processes.group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        self.processes.set(group)

    @property
    def shared(self) -> bool:
        """Whether updates currently sum over several processes."""
        return self.sync and self.processes.size() > 1

    def transient_buffers(self) -> dict[str, Tensor]:
        return {
            "usage": torch.zeros(self.layout.total_codes, dtype=torch.int64, device="cpu"),
            "rows_seen": torch.zeros((), dtype=torch.int64, device="cpu"),
        }

    @property
    def backend(self) -> str:
        """The implementation used on the device of the codes: "triton" or "reference"."""
        return resolve_backend(self.requested_backend, self.embedding)

    @property
    def needs_initialization(self) -> bool:
        """Whether the next call in training mode first fits the codes to its latents."""
        return self._first_batch.awaited

    @property
    def nonfinite_rows(self) -> Tensor:
        """Training rows since `reset_usage` without a code: the maximum over codebooks."""
        coded = self.usage.new_zeros(self.layout.groups)
        coded.index_add_(0, self.layout.indices(self.usage.device).codebook_of_code, self.usage)
        return (self.rows_seen - coded).max().clamp(min=0)

    @property
    def num_codes(self) -> tuple[int, ...]:
        return self.layout.num_codes

    @property
    def dims(self) -> tuple[int, ...]:
        return self.layout.dims

    def extra_repr(self) -> str:
        layout = self.layout
        return f"{layout.groups} codebooks, {layout.total_codes} codes, {layout.total_dims} dimensions"

    def forward(self, z: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantizes and, in training mode, updates the codes.

        Args:
            z: [..., sum D] latents.
            mask: [...] bool; rows with False get code -1 and zeros and are left out of the loss.

        Returns:
            quantized [..., sum D], codes [..., G], and the loss: the sum over codebooks of
            commitment_weight * mean((z - sg(e))^2) (with learned codes also mean((sg(z) - e)^2)).
        """
        quantized, codes, loss, apply_ema = self.quantize(z, mask)
        apply_ema()
        return quantized, codes, loss

    def quantize(self, z: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Callable[[], None]]:
        """The results of `forward`, and a function that applies the code update (does nothing outside training)."""
        quantized, codes, loss, _, apply_ema = self.quantize_with_codebook(z, mask)
        return quantized, codes, loss, apply_ema

    def quantize_with_codebook(
        self, z: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Callable[[], None]]:
        """As `quantize`, with the detached codes [sum K D] before `apply_ema`, which are a view that it changes."""
        flat_mask = self._checked_mask(z, mask)
        quantized, codes, loss, embedding, assignment, rows = self._quantize(z, flat_mask)
        update = partial(self.update, assignment, rows)
        apply_ema = partial(once, self, update, self.usage) if self.training else _no_update
        return quantized, codes, loss, embedding.detach(), apply_ema

    def quantize_with_statistics(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As `quantize_with_codebook` in training mode, with the statistics of the code update instead of the update.

        The sum of the statistics of several batches is that of one batch with all rows, see `apply_statistics`.
        """
        quantized, codes, loss, embedding, assignment, rows = self._quantize(z, None)
        return quantized, codes, loss, embedding.detach(), pack_statistics(assignment, rows)

    @torch.no_grad()
    def apply_statistics(self, statistics: Tensor) -> None:
        """Updates the codes by the statistics of a batch, a vector of `statistics_size(layout)` elements."""
        self._apply_update(*unpack_statistics(statistics, self.layout))

    def _checked_mask(self, z: Tensor, mask: Tensor | None) -> Tensor | None:
        if mask is not None and mask.shape != z.shape[:-1]:
            raise ValueError(f"mask must be {list(z.shape[:-1])}, got {list(mask.shape)}")
        return None if mask is None else mask.reshape(-1)

    def _quantize(
        self, z: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Assignment, Tensor | int]:
        """quantized, codes, loss, codes of the codebooks, the assignment, and the number of rows."""
        check_dense("z", z)
        flat = z.reshape(-1, z.shape[-1]) if z.ndim else z
        if self.training:
            once(self, lambda: self._initialize_from(flat, mask))
        embedding = first_run_values(self, self.embedding) if self.training else self.embedding
        gradient: Gradient = "rotation" if self.rotation_trick else "straight_through"
        if not self.training and exporting():
            gradient = None
        assignment = vq_assign(
            flat,
            embedding,
            self.layout,
            mask,
            self.centred,
            gradient=gradient,
            with_sums=self.training or (gradient is not None and not self.use_ema),
            backend=self.requested_backend,
        )
        rows = flat.shape[0] if mask is None else mask.sum()
        loss = quantization_loss(
            assignment,
            rows.clamp(min=1) if isinstance(rows, Tensor) else rows,
            self.layout,
            self.commitment_weight,
            None if self.use_ema else embedding,
        )
        quantized = assignment.quantized.to(z.dtype).view(z.shape)
        codes = assignment.codes.view(*z.shape[:-1], self.layout.groups)
        return quantized, codes, loss, embedding, assignment, rows

    def assign(self, z: Tensor, mask: Tensor | None = None) -> Assignment:
        """Nearest codes of z [N, sum D], without gradient or code update."""
        return vq_assign(z, self.embedding, self.layout, mask, self.centred, backend=self.requested_backend)

    @torch.no_grad()
    def _initialize_from(self, z: Tensor, mask: Tensor | None) -> None:
        """k-means on the first training batch, in one custom operator, which torch.compile does not trace."""
        if not self.needs_initialization:
            return
        valid = torch.isfinite(z).all(1)
        initialize_codes(
            z.detach(),
            valid if mask is None else valid & mask,
            self.embedding.data,
            self.cluster_size,
            self.embedding_sum,
            self.initialized,
            self.layout,
            self._first_batch,
            self.sync,
        )
        store_written(self, "embedding")

    @torch.no_grad()
    def update(self, assignment: Assignment, rows: Tensor | int) -> None:
        """Updates the codes by the assignment of a batch of `rows` rows."""
        if self.shared:
            self.apply_statistics(self.processes.sum_(pack_statistics(assignment, rows)))
        else:
            self._apply_update(assignment.count_parts, assignment.sum_parts, rows)

    def _apply_update(self, counts: Tensor, sums: Tensor, rows: Tensor | int) -> None:
        """Updates the codes by counts [sum K] and sums [sum K D], or parts of them [P, ...]."""
        self.rows_seen += rows
        if self.use_ema and not self.frozen:
            ema_update(
                self.embedding,
                self.cluster_size,
                self.embedding_sum,
                counts,
                sums,
                self.layout,
                self.decay,
                self.smoothing,
                usage=self.usage,
                backend=self.requested_backend,
            )
        else:
            counts = counts.sum(0) if counts.ndim == 2 else counts
            self.usage += counts.to(torch.int64)
            if self.frozen:
                return
            self.cluster_size.mul_(self.decay).add_(counts, alpha=1.0 - self.decay)

    @torch.no_grad()
    def initialize(self, z: Tensor, iterations: int = 10, generator: torch.Generator | None = None) -> None:
        """Fits the codes to rows z [N, sum D] by k-means; moving counts become the number of rows of each code.

        If several processes share the quantizer, all of them must call this; the rows of all are fitted.
        """
        processes = self.processes if self.shared else None
        codebook, counts = kmeans(z.detach(), self.layout, iterations, generator, processes)
        index = self.layout.indices(z.device)
        assign_(self.embedding, codebook)
        self.cluster_size.copy_(counts)
        self.embedding_sum.copy_(codebook * counts[index.code_of_entry])
        self.initialized.fill_(True)
        self._first_batch.awaited = False

    def codebook(self, g: int) -> Tensor:
        """Codes of codebook g, a view [K_g, D_g]."""
        layout = self.layout
        if not 0 <= g < layout.groups:
            raise IndexError(f"codebook {g} of {layout.groups}")
        return self.embedding[layout.entry_slice(g)].view(layout.num_codes[g], layout.dims[g])

    def lookup(self, codes: Tensor) -> Tensor:
        """Code vectors [..., sum D] of codes [..., G]; raises IndexError for a code out of range."""
        flat = lookup(codes.reshape(-1, codes.shape[-1]), self.embedding, self.layout)
        return flat.view(*codes.shape[:-1], self.layout.total_dims)

    def freeze(self, frozen: bool = True) -> None:
        """Stops (or resumes) code updates in training mode; usage is counted either way."""
        self.frozen = frozen

    def utilization(self) -> Tensor:
        """[G] fraction of codes used in training since `reset_usage`."""
        return code_usage(self.usage, self.layout, backend=self.requested_backend)[0]

    def perplexity(self) -> Tensor:
        """[G] exponential of the entropy of code usage in training since `reset_usage`."""
        return code_usage(self.usage, self.layout, backend=self.requested_backend)[1]

    def reset_usage(self) -> None:
        """Resets the counts of `utilization` and `perplexity`."""
        self.usage.zero_()
        self.rows_seen.zero_()

    def reset_dead_codes(
        self,
        threshold: float = 0.05,
        strategy: Literal["perturb", "sample"] = "perturb",
        max_fraction: float = 0.25,
        latents: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Replaces dead codes; returns their number per codebook [G].

        Args:
            threshold: a code is dead if its moving count is below this fraction of its codebook's mean.
            strategy: "perturb" copies frequently used codes with noise; "sample" takes rows of `latents`.
            max_fraction: largest fraction of a codebook that is replaced.
            latents: [N, sum D], for "sample".
            generator: source of randomness.

        If several processes share the quantizer, all of them must call this; the draws of the first one apply to all.
        """
        held = gathered(self.embedding.detach()), self.cluster_size, self.embedding_sum
        replaced = reset_dead_codes(*held, self.layout, threshold, strategy, max_fraction, latents, generator=generator)
        for drawn in (*held, replaced) if self.shared else ():
            self.processes.copy_first_(drawn)
        if is_sharded(self.embedding):
            assign_(self.embedding, held[0])
        return replaced

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.initialized.is_meta:
            self._first_batch.awaited = not bool(self.initialized)
