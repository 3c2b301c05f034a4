"""A group of ragged codebooks that quantize side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spinlock_fast.kernels._common.backend import Backend, check_backend, resolve_backend
from spinlock_fast.kernels._common.export import exporting
from spinlock_fast.kernels._common.guard import check_dense
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.table_cache import TableCache
from spinlock_fast.kernels.ema_update import code_usage, ema_update, reset_dead_codes
from spinlock_fast.kernels.vq_assign import Assignment, lookup, vq_assign
from spinlock_fast.quantize.activation_checkpointing import kept, once
from spinlock_fast.quantize.buffers import TransientBuffers
from spinlock_fast.quantize.kmeans import initialize_codes, kmeans
from spinlock_fast.quantize.module_state import FirstBatch, keep_wide
from spinlock_fast.quantize.process_group import Processes

Gradient = Literal["straight_through", "rotation"] | None


# By batch size: a graph that was captured with one keeps it, whatever sizes come after.
_shares: TableCache[Tensor] = TableCache(256)


def _over_dims(layout: CodebookLayout, factor: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """factor / D_g of every codebook [G]."""
    key = (layout, factor, dtype, device)
    return _shares.get(key, device, lambda: factor / layout.indices(device).dims.to(dtype))


def _nothing() -> None:
    pass


class GroupedVectorQuantizer(TransientBuffers):
    """Quantizes packed latents with G codebooks of different sizes in batched operations.

    Args:
        num_codes: K_g of each codebook.
        dims: D_g of each codebook.
        decay: of the moving averages; 0 replaces codes by the batch means.
        commitment_weight: factor of the commitment loss.
        codebook_init: "kmeans" fits the codes to the first training batch (`initialize` does it
            beforehand), "uniform" draws them from U(-1/K_g, 1/K_g).
        use_ema: codes follow the latents by moving average (van den Oord et al. 2017). False makes
            them a parameter, moved by the gradient of mean((sg(z) - e)^2).
        rotation_trick: gradient by rotation instead of straight through (arXiv 2410.06424).
        centred: subtract each codebook's mean code before distances are formed, which keeps codes of data
            far from the origin exact. LayerNorm-ed latents do not need it.
        sync: counts, sums and the start by k-means are those of all processes: one all-reduce a step, of a size
            that does not depend on the data. Decided in each call: `init_process_group` may come after construction.
        process_group: of `torch.distributed`: the processes that share updates; None for all. A copy has the same
            group; it cannot be pickled, so that after unpickling it must be set again.
        smoothing: "none" leaves idle codes in place, "laplace" is the rule of the 2017 paper.
        backend: "auto", "triton" or "reference". "auto" takes the environment variable
            SPINLOCK_FAST_BACKEND where it is set, else Triton on CUDA devices.

    Shapes:
        z [..., sum D] -> quantized [..., sum D], codes [..., G] int64, loss scalar.

    A row that is not finite in a codebook gets code -1 and NaN there, has no part in the loss and in any
    average, and is counted in `nonfinite_rows`. A masked row gets code -1 and zeros, and no gradient.

    The moving averages stay float32 where the module is cast to half precision, and counts of use are int64. Under
    activation checkpointing (`torch.utils.checkpoint`) a recomputation takes the codes of the first run and moves none.

    Raises:
        ValueError: sizes that make no group, or shapes that do not fit it.
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
        self.requested_backend = backend
        self.frozen = False

        layout = self.layout
        index = layout.indices(torch.device("cpu"))
        bound = (1.0 / index.num_codes)[index.codebook_of_code][index.code_of_entry]
        start = 2.0 * torch.rand(layout.total_entries) - 1.0
        start = start * bound.to(start.device)
        if use_ema:
            self.register_buffer("embedding", start)
        else:
            self.embedding = nn.Parameter(start)
        wide = torch.promote_types(start.dtype, torch.float32)
        self.register_buffer("cluster_size", torch.ones(layout.total_codes, dtype=wide))
        self.register_buffer("embedding_sum", start.to(wide, copy=True))
        self.register_buffer("initialized", torch.tensor(codebook_init == "uniform"))
        self.register_transient_buffers()
        self._first_batch = FirstBatch(codebook_init == "kmeans", self.processes)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        wide = ("cluster_size", "embedding_sum")
        return keep_wide(self, wide, lambda: super(GroupedVectorQuantizer, self)._apply(fn, recurse))

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The processes that share updates; None for all."""
        return self.processes.group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        self.processes.set(group)

    @property
    def shared(self) -> bool:
        """Whether counts and sums are those of several processes, as of now."""
        return self.sync and self.processes.size() > 1

    def transient_buffers(self) -> dict[str, Tensor]:
        return {
            "usage": torch.zeros(self.layout.total_codes, dtype=torch.int64, device="cpu"),
            "rows_seen": torch.zeros((), dtype=torch.int64, device="cpu"),
        }

    @property
    def backend(self) -> str:
        """The implementation in use where the codes are: "triton" or "reference"."""
        return resolve_backend(self.requested_backend, self.embedding)

    @property
    def needs_initialization(self) -> bool:
        """Whether the next call in training mode fits the codes to its latents first."""
        return self._first_batch.awaited

    @property
    def nonfinite_rows(self) -> Tensor:
        """Rows of training since `reset_usage` that some codebook could not code: the most of any codebook."""
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
            mask: [...] bool; where False a row gives code -1 and zeros and takes no part in the loss.

        Returns:
            quantized [..., sum D], codes [..., G], and the loss: the sum over codebooks of
            commitment_weight * mean((z - sg(e))^2) (with learned codes also mean((sg(z) - e)^2)).
        """
        *found, move_codes = self.quantize(z, mask)
        move_codes()
        quantized, codes, loss = found
        return quantized, codes, loss

    def quantize(self, z: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Callable[[], None]]:
        """What `forward` returns, and the update of the codes that is left to do, if any."""
        found = self.quantize_by(z, mask)
        return found[0], found[1], found[2], found[4]

    def quantize_by(
        self, z: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Callable[[], None]]:
        """As `quantize`, with the codes [sum K D] that this pass compares with before the update, without gradient.

        They move in place with the update.
        """
        check_dense("z", z)
        flat = z.reshape(-1, z.shape[-1]) if z.ndim else z
        rows = None if mask is None else mask.reshape(-1)
        if mask is not None and mask.shape != z.shape[:-1]:
            raise ValueError(f"mask must be {list(z.shape[:-1])}, got {list(mask.shape)}")
        updating = self.training and not self.frozen
        if self.training:
            once(self, lambda: self._initialize_from(flat, rows))
        embedding = kept(self, self.embedding) if self.training else self.embedding
        gradient: Gradient = "rotation" if self.rotation_trick else "straight_through"
        if not self.training and exporting():
            gradient = None
        found = vq_assign(
            flat,
            embedding,
            self.layout,
            rows,
            self.centred,
            gradient=gradient,
            with_sums=updating or (gradient is not None and not self.use_ema),
            backend=self.requested_backend,
        )
        loss = self._loss(found, flat.shape[0] if rows is None else rows.sum().clamp(min=1), embedding)
        update = partial(self._update, found, flat.shape[0] if rows is None else rows.sum())
        quantized = found.quantized.to(z.dtype).view(z.shape)
        codes = found.codes.view(*z.shape[:-1], self.layout.groups)
        move_codes = partial(once, self, update, self.usage) if updating else _nothing
        return quantized, codes, loss, embedding.detach(), move_codes

    def assign(self, z: Tensor, mask: Tensor | None = None) -> Assignment:
        """Nearest codes of z [N, sum D] without gradient or update."""
        return vq_assign(z, self.embedding, self.layout, mask, self.centred, backend=self.requested_backend)

    def _loss(self, found: Assignment, rows: Tensor | int, embedding: Tensor) -> Tensor:
        errors = found.error_parts
        if not isinstance(rows, Tensor):
            # torch.compile of torch 2.11 does not support sym_max of an int.
            rows = max(rows, 1) if isinstance(rows, int) else torch.sym_max(rows, 1)
        # The shares are kept for each number of rows, but an exported graph serves them all.
        divided_at_end = isinstance(rows, Tensor) or exporting()
        count: Any = 1 if divided_at_end else rows
        shares = partial(_over_dims, self.layout, dtype=errors.dtype, device=errors.device)
        loss = (errors * shares(self.commitment_weight / count)).sum()
        if not self.use_ema:
            loss = loss + self._learned_error(found, embedding, shares(1.0 / count))
        return loss / rows if divided_at_end else loss

    def _learned_error(self, found: Assignment, embedding: Tensor, shares: Tensor) -> Tensor:
        """Sum over rows and codebooks of shares [G] * ||sg(z) - e||^2, whose gradient to e is 2 (n e - s) * share."""
        index = self.layout.indices(found.codes.device)
        counts, sums = found.counts, found.sums
        if not sums.numel():
            return (found.squared_error * shares).sum()
        codes = embedding.to(sums.dtype)
        entries = counts[index.code_of_entry] * codes.square() - 2.0 * codes * sums
        moving = (entries * shares[index.codebook_of_code[index.code_of_entry]]).sum()
        return (found.squared_error.detach() * shares).sum() + (moving - moving.detach())

    @torch.no_grad()
    def _initialize_from(self, z: Tensor, rows: Tensor | None) -> None:
        """k-means on the first batch of training, inside one operator so that it can be compiled."""
        if not self.needs_initialization:
            return
        usable = torch.isfinite(z).all(1)
        initialize_codes(
            z.detach(),
            usable if rows is None else usable & rows,
            self.embedding.data,
            self.cluster_size,
            self.embedding_sum,
            self.initialized,
            self.layout,
            self._first_batch,
            self.sync,
        )

    @torch.no_grad()
    def _update(self, found: Assignment, rows: Tensor | int) -> None:
        counts, sums = found.count_parts, found.sum_parts
        if self.shared:
            seen = torch.as_tensor(rows, dtype=counts.dtype, device=counts.device)
            packed = self.processes.sum_(torch.cat([found.counts, found.sums, seen[None]]))
            counts, sums, seen = packed.split([counts.shape[1], sums.shape[1], 1])
            rows = seen[0].to(torch.int64)
        self.rows_seen += rows
        if self.use_ema:
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
            self.cluster_size.mul_(self.decay).add_(counts, alpha=1.0 - self.decay)

    @torch.no_grad()
    def initialize(self, z: Tensor, iterations: int = 10, generator: torch.Generator | None = None) -> None:
        """Fits the codes to rows z [N, sum D] by k-means; moving counts start as the rows of each code.

        Where several processes share the quantizer, each of them calls this, and the rows of all are fitted.
        """
        processes = self.processes if self.shared else None
        codebook, counts = kmeans(z.detach(), self.layout, iterations, generator, processes)
        index = self.layout.indices(z.device)
        self.embedding.data.copy_(codebook)
        self.cluster_size.copy_(counts)
        self.embedding_sum.copy_(codebook * counts[index.code_of_entry])
        self.initialized.fill_(True)
        self._first_batch.awaited = False

    def codebook(self, g: int) -> Tensor:
        """Codes of codebook g [K_g, D_g], a view."""
        layout = self.layout
        if not 0 <= g < layout.groups:
            raise IndexError(f"codebook {g} of {layout.groups}")
        return self.embedding[layout.entry_slice(g)].view(layout.num_codes[g], layout.dims[g])

    def lookup(self, codes: Tensor) -> Tensor:
        """Code vectors [..., sum D] of indices [..., G]; raises IndexError outside a codebook."""
        flat = lookup(codes.reshape(-1, codes.shape[-1]), self.embedding, self.layout)
        return flat.view(*codes.shape[:-1], self.layout.total_dims)

    def freeze(self, frozen: bool = True) -> None:
        """Stops (or restarts) updates of the codes in training mode."""
        self.frozen = frozen

    def utilization(self) -> Tensor:
        """[G] share of codes used in training since `reset_usage`, at most 1."""
        return code_usage(self.usage, self.layout, backend=self.requested_backend)[0]

    def perplexity(self) -> Tensor:
        """[G] exp of the entropy of code use in training since `reset_usage`."""
        return code_usage(self.usage, self.layout, backend=self.requested_backend)[1]

    def reset_usage(self) -> None:
        """Starts a new window for `utilization` and `perplexity`."""
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
        """Replaces codes used less than `threshold` of their codebook's mean; [G] how many.

        Args:
            strategy: "perturb" copies often used codes with noise, "sample" takes rows of `latents`.
            max_fraction: largest share of a codebook that is replaced.
            latents: [N, sum D].
        """
        return reset_dead_codes(
            self.embedding.data,
            self.cluster_size,
            self.embedding_sum,
            self.layout,
            threshold,
            strategy,
            max_fraction,
            latents,
            generator=generator,
        )

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.initialized.is_meta:
            self._first_batch.awaited = not bool(self.initialized)
