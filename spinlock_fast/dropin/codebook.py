"""Codebooks with moving averages and dead-code replacement, under the names of vector-quantize-pytorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from spinlock_fast.dropin import dead_codes
from spinlock_fast.dropin.dead_codes import GatherRows, ReplaceableCodes, Replacements, Slot, gather_from_heads
from spinlock_fast.dropin.input_layout import at_least_float32
from spinlock_fast.dropin.kmeans_init import laplace_smoothing
from spinlock_fast.kernels._common.export import exporting
from spinlock_fast.kernels.ema_update.averages import average_codes
from spinlock_fast.kernels.residual_vq.reference import tally, unit
from spinlock_fast.quantize.activation_checkpointing import first_run_values
from spinlock_fast.quantize.module_state import FirstBatch, keep_float32
from spinlock_fast.quantize.process_group import Processes
from spinlock_fast.quantize.sharded_parameters import ShardKey, assign_, store_written

# Buffers of `AffineStatistics` that are None before the first batch.
OPTIONAL_STATISTICS = ("batch_mean", "batch_variance")

UpdateWeight = Tensor | Callable[[Tensor, Tensor], Tensor] | None


class Codebook(ReplaceableCodes):
    """H codebooks of K codes.

    Buffers: embed [H, K, D] the codes (a parameter if learnable), embed_avg [H, K, D] moving sums, cluster_size
    [H, K] moving counts, initted bool scalar. Moving sums and counts stay float32 when the module is cast to half
    precision, which could not represent a small change of a large count.
    """

    initted: Tensor
    usage: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int = 1,
        *,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        decay: float = 0.8,
        eps: float = 1e-5,
        threshold_ema_dead_code: float = 0,
        use_ddp: bool | None = None,
        processes: Processes | None = None,
        learnable_codebook: bool = False,
        ema_update: bool = True,
        manual_ema_update: bool = False,
        use_cosine_sim: bool = False,
        vq_bridge: nn.Module | None = None,
        corrections: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        if codebook_size < 1 or dim < 1:
            raise ValueError(f"codebook_size and dim must be at least 1, got {codebook_size} and {dim}")
        self.codebook_size, self.num_codebooks = codebook_size, num_codebooks
        self.kmeans_iters, self.sync_kmeans = kmeans_iters, sync_kmeans
        self.decay, self.eps = decay, eps
        self.threshold_ema_dead_code = self.reset_cluster_size = threshold_ema_dead_code
        self.has_dead_code_replacement = threshold_ema_dead_code > 0
        self.use_ddp, self.learnable_codebook = use_ddp, learnable_codebook
        self.processes = Processes() if processes is None else processes
        self.ema_update, self.manual_ema_update = ema_update, manual_ema_update
        self.use_cosine_sim, self.corrections = use_cosine_sim, corrections
        self.vq_bridge = vq_bridge

        codes = torch.zeros(num_codebooks, codebook_size, dim)
        if not kmeans_init:
            nn.init.kaiming_uniform_(codes)
            codes = unit(codes) if use_cosine_sim else codes
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        wide = torch.promote_types(codes.dtype, torch.float32)
        self.register_buffer("cluster_size", torch.ones(num_codebooks, codebook_size, dtype=wide))
        self.register_buffer("embed_avg", codes.to(wide, copy=True))
        if learnable_codebook:
            self.embed = nn.Parameter(codes)
        else:
            self.register_buffer("embed", codes)
        self.register_transient_buffers()
        self._first_batch, self.shard_key = FirstBatch(kmeans_init, self.processes), ShardKey()
        self._accumulated: tuple[Tensor, Tensor] | None = None

    def transient_buffers(self) -> dict[str, Tensor]:
        return {"usage": torch.zeros(self.num_codebooks, self.codebook_size, dtype=torch.int64, device="cpu")}

    @torch.no_grad()
    def set_codes(self, codes: Tensor) -> None:
        """Replaces the codes by [H, K, D], with moving sums to match.

        Moving counts below 1 are raised to 1, as in a new codebook, so that the next update keeps unused codes.

        Raises:
            ValueError: wrong shape.
        """
        if codes.shape != self.embed.shape:
            raise ValueError(f"the codebook must be {list(self.embed.shape[1:])}, got {list(codes.shape[1:])}")
        assign_(self.embed, codes)
        self.cluster_size.clamp_(min=1.0)
        self.embed_avg.copy_(codes.to(self.embed_avg) * self.cluster_size[..., None])
        self.initted.fill_(True)
        self._first_batch.awaited, self._accumulated = False, None

    def transform_input(self, x: Tensor) -> Tensor:
        """x [..., D], normalised to unit length if codes are compared by cosine."""
        return unit(x) if self.use_cosine_sim else x

    @property
    def syncs_updates(self) -> bool:
        """Whether updates are summed over the processes of the group; evaluated in each call."""
        return self.use_ddp is not False and self.processes.size() > 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return keep_float32(self, ("cluster_size", "embed_avg"), lambda: super(Codebook, self)._apply(fn, recurse))

    def codes(self, dtype: torch.dtype) -> Tensor:
        """Codes [H, K, D], differentiable if learnable."""
        return (self.current_embed if self.learnable_codebook else self.current_embed.detach()).to(dtype)

    @property
    def current_embed(self) -> Tensor:
        """Codes [H, K, D] of this forward pass; a recomputation (activation checkpointing) gets the first run's."""
        return first_run_values(self, self.embed) if self.training else self.embed

    def initialize(self, rows: Tensor, mask: Tensor | None) -> None:
        """Fits the codes to the first batch of rows [H, N, D] by k-means, if `kmeans_init` was set."""
        if self.needs_kmeans:  # tested outside of `no_grad`: `torch.export.load` rejects an empty no_grad region
            if exporting():
                raise ValueError("k-means has not fitted the codes: call the layer once in eager mode before export")
            self._fit_kmeans(rows, mask)

    @torch.no_grad()
    def _fit_kmeans(self, rows: Tensor, mask: Tensor | None) -> None:
        torch.ops.spinlock_fast.kmeans_init(
            rows.detach(),
            mask,
            self.embed.data,
            self.embed_avg,
            self.cluster_size,
            self.initted,
            self._first_batch.key,
            self.kmeans_iters,
            self.use_cosine_sim,
            self.eps,
            self.syncs_updates and self.sync_kmeans,
            "kmeans_scale" in self.corrections,
        )
        store_written(self, "embed")

    @property
    def needs_kmeans(self) -> bool:
        return self._first_batch.awaited

    @torch.no_grad()
    def update_ema(self, active: Tensor | None = None) -> None:
        """Sets codes to moving sums over Laplace-smoothed moving counts, unless the bool scalar `active` is False."""
        codes = self.transform_input(self.embed_avg / laplace_smoothing(self.cluster_size, self.eps)[..., None])
        self.embed.data.copy_(codes if active is None else torch.where(active, codes, self.embed.data))
        store_written(self, "embed")

    @property
    def accumulates(self) -> bool:
        """Whether the next update includes accumulated batches."""
        return self._accumulated is not None

    def average(self, counts: Tensor, sums: Tensor, update_codes: bool) -> bool:
        """`update_averages`, and `update_ema` if `update_codes`, fused; False if no fused implementation applies."""
        if self.accumulates:
            return False
        state = self.embed.data if update_codes else None, self.cluster_size, self.embed_avg, counts, sums, self.usage
        done = average_codes(*state, self.decay, self.eps, unit=self.use_cosine_sim)
        if done and update_codes:
            store_written(self, "embed")
        return done

    @torch.no_grad()
    def update_averages(
        self,
        counts: Tensor,
        sums: Tensor,
        weight: UpdateWeight = None,
        accumulate: bool = False,
        active: Tensor | None = None,
    ) -> None:
        """Updates the moving averages with counts [H, K] and sums [H, K, D], including accumulated ones.

        Args:
            counts: rows of each code.
            sums: sum of the rows of each code.
            weight: [K] or [H, K] factor of 1 - decay, or a function of sums and counts that returns it.
            accumulate: only accumulates counts and sums, for the next call with accumulate=False.
            active: bool scalar; if False, the averages do not change.
        """
        self.usage += counts.to(torch.int64)
        if callable(weight):
            weight = weight(sums, counts)
        if self._accumulated is not None:
            counts, sums = counts + self._accumulated[0], sums + self._accumulated[1]
        self._accumulated = (counts, sums) if accumulate else None
        if accumulate:
            return
        rate: Any = 1.0 - self.decay if active is None else (1.0 - self.decay) * active.to(self.embed_avg.dtype)
        if weight is not None:
            rate = rate * weight.expand_as(self.cluster_size)
        self.cluster_size.lerp_(counts.to(self.cluster_size), rate)
        self.embed_avg.lerp_(sums.to(self.embed_avg), rate if weight is None else rate[..., None])

    @torch.no_grad()
    def expire_codes_(self, rows: Tensor, mask: Tensor | None = None) -> None:
        """Replaces dead codes (moving count below the threshold) by random rows of [H, ..., D]."""
        if self.has_dead_code_replacement and self.training:
            rows = self.transform_input(rows).flatten(1, -2)
            update = CodebookUpdate(self, None, None, rows.shape[1], mask)
            apply_updates([update], gather_from_heads(rows, lambda gathered: gathered))

    @torch.no_grad()
    def update_indices(
        self,
        rows: Tensor,
        codes: Tensor,
        mask: Tensor | None = None,
        weight: UpdateWeight = None,
        accumulate: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        """Update with given codes [H, N] of rows [H, N, D]; masked rows and codes of -1 are ignored."""
        counts, sums = self.count_and_sum(at_least_float32(rows), codes, mask)
        update = CodebookUpdate(self, counts, sums, rows.shape[1], mask)
        apply_updates([update], gather_from_heads(rows, lambda gathered: gathered), weight, accumulate, ema_update)

    def count_and_sum(self, rows: Tensor, codes: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Counts [H, K] and sums [H, K, D] of the rows [H, N, D] of each code, without masked rows and codes of -1."""
        codes = codes if mask is None else codes.masked_fill(~mask, -1)
        heads = [tally(head, code, self.codebook_size) for head, code in zip(rows, codes, strict=True)]
        counts, sums = zip(*heads, strict=True)
        return torch.stack(counts), torch.stack(sums)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        self._allocate_statistics(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.initted.is_meta:
            self._first_batch.awaited = not bool(self.initted)
        self._accumulated = None  # accumulated with the previous codes

    def _allocate_statistics(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Allocates the statistics of `affine_param` that are in the state dict, and removes those that are not.

        They exist from the first batch on; a new layer could not load the state of a trained one otherwise.
        """
        for name in OPTIONAL_STATISTICS:
            if name in self._buffers:
                saved = state_dict.get(prefix + name)
                if saved is None:
                    self._buffers[name] = None
                elif self._buffers[name] is None:
                    self._buffers[name] = torch.zeros(saved.shape, dtype=self.embed.dtype, device=self.embed.device)


@dataclass(frozen=True)
class CodebookUpdate:
    """The update of one codebook from a batch."""

    codebook: Codebook
    counts: Tensor | None  # [H, K]
    sums: Tensor | None  # [H, K, D]
    num_rows: int
    mask: Tensor | None
    active: Tensor | None = None  # bool scalar; if False, the codebook does not change


@torch.no_grad()
def apply_updates(
    updates: Sequence[CodebookUpdate],
    gather_rows: GatherRows,
    weight: UpdateWeight = None,
    accumulate: bool = False,
    ema_update: bool | None = None,
) -> None:
    """Updates averages and codes, then replaces dead codes, with one all-reduce of fixed size for all codebooks.

    All codebooks must be different, and have the same process group and number of rows.
    """
    synced = [i for i, update in enumerate(updates) if update.codebook.syncs_updates]
    reduced = _all_reduce(updates, synced, gather_rows, accumulate) if synced else {}
    for i, update in enumerate(updates):
        counts, sums, _ = reduced.get(i, (update.counts, update.sums, None))
        if counts is not None and sums is not None:
            _average(update, counts, sums, weight, accumulate, ema_update)
    if not (accumulate and any(update.counts is not None for update in updates)):
        _replace_dead_codes(updates, gather_rows, {i: candidates for i, (*_, candidates) in reduced.items()})


def _average(
    update: CodebookUpdate,
    counts: Tensor,
    sums: Tensor,
    weight: UpdateWeight,
    accumulate: bool,
    ema_update: bool | None,
) -> None:
    codebook = update.codebook
    update_codes = codebook.ema_update if ema_update is None else ema_update
    if not update_codes and not codebook.has_dead_code_replacement:
        codebook.usage += counts.to(torch.int64)
        return
    sets_codes = update_codes and not codebook.manual_ema_update
    plain = weight is None and not accumulate and update.active is None
    if plain and codebook.average(counts, sums, sets_codes):
        return
    codebook.update_averages(counts, sums, weight, accumulate, update.active)
    if sets_codes and not accumulate:
        codebook.update_ema(update.active)


def _replace_dead_codes(
    updates: Sequence[CodebookUpdate], gather_rows: GatherRows, candidates: dict[int, Replacements | None]
) -> None:
    codebooks, active = [update.codebook for update in updates], [update.active for update in updates]
    num_rows, mask = updates[0].num_rows, updates[0].mask

    def replacements(slots: Sequence[Slot]) -> Replacements:
        shared = [(i, candidates.get(i)) for i in dict.fromkeys(i for i, _ in slots)]
        found = [one for _, one in shared if one is not None]
        if found:
            return dead_codes.valid_first(
                torch.cat([one.rows for one in found]), torch.cat([one.valid for one in found])
            )
        embed = codebooks[slots[0][0]].embed
        return dead_codes.draw_replacements(slots, num_rows, embed.shape[1], mask, gather_rows, embed.device)

    for slots in dead_codes.equal_options(codebooks):
        synced = candidates.get(slots[0][0]) is not None
        plain = not synced and mask is None and all(codebook_active is None for codebook_active in active)
        if plain and dead_codes.replace_by_kernels(codebooks, slots, num_rows, gather_rows):
            continue
        if synced or num_rows:
            dead_codes.replace_dead_codes(codebooks, slots, active, replacements, read_on_host=not synced)


def _all_reduce(
    updates: Sequence[CodebookUpdate], synced: Sequence[int], gather_rows: GatherRows, accumulate: bool
) -> dict[int, tuple[Tensor | None, Tensor | None, Replacements | None]]:
    """Reduced counts, sums and rows for dead codes of the updates with the numbers `synced`."""
    local: list[Tensor] = []
    for i in synced:
        update = updates[i]
        if update.counts is not None and update.sums is not None:
            local += [update.counts.flatten(), update.sums.flatten()]
        if update.codebook.has_dead_code_replacement and not accumulate:
            local += [_local_candidates(i, update, gather_rows).flatten()]
    packed = updates[synced[0]].codebook.processes.sum_(torch.cat(local))  # in the widest dtype
    parts = iter(packed.split([len(part) for part in local]))
    reduced = {}
    for i in synced:
        update = updates[i]
        H, K, D = update.codebook.embed.shape
        counts = sums = candidates = None
        if update.counts is not None and update.sums is not None:
            counts, sums = next(parts).view(H, K), next(parts).view(H, K, D)
        if update.codebook.has_dead_code_replacement and not accumulate:
            rows_and_valid = next(parts).view(H, K, D + 1)
            candidates = Replacements(rows_and_valid[..., :-1], rows_and_valid[..., -1] > 0)
        reduced[i] = counts, sums, candidates
    return reduced


def _local_candidates(i: int, update: CodebookUpdate, gather_rows: GatherRows) -> Tensor:
    """[H, K, D + 1] replacement rows of this process in its slots (every world-th), with a last column of 1; else 0."""
    H, K, D = update.codebook.embed.shape
    device = update.codebook.embed.device
    processes = update.codebook.processes
    own = torch.arange(K, device=device) % processes.size() == processes.rank()
    candidates = torch.zeros(H, K, D + 1, dtype=update.codebook.embed_avg.dtype, device=device)
    if update.num_rows == 0:
        return candidates
    position = torch.where(own, own.cumsum(0) - 1, 0)
    for h in range(H):
        index, in_batch = dead_codes.draw_rows(update.num_rows, K, update.mask, device)
        drawn = position.clamp(max=len(index) - 1)
        rows = gather_rows([(i, h)], index[drawn][None])[0].to(candidates)
        valid = own & in_batch[drawn] & (drawn == position) & torch.isfinite(rows).all(1)
        rows = torch.cat([rows, torch.ones(K, 1, dtype=rows.dtype, device=device)], 1)
        candidates[h] = torch.where(valid[:, None], rows, 0.0)
    return candidates
