"""The codes of a quantizer and their moving averages, under the names of vector-quantize-pytorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from spinlock_fast.dropin.shapes import widened
from spinlock_fast.dropin.start import laplace, start_codes
from spinlock_fast.kernels.export import exporting
from spinlock_fast.kernels.residual_vq.reference import tally, unit
from spinlock_fast.quantize.activation_checkpointing import first_run_values
from spinlock_fast.quantize.buffers import TransientBuffers
from spinlock_fast.quantize.module_state import FirstBatch, keep_float32
from spinlock_fast.quantize.process_group import Processes

# Buffers of `affine.Affine` that have no value before the first batch.
OPTIONAL_STATISTICS = ("batch_mean", "batch_variance")

Weight = Tensor | Callable[[Tensor, Tensor], Tensor] | None


class Codebook(TransientBuffers):
    """H codebooks of K codes.

    Buffers: embed [H, K, D] the codes (a parameter where learnable), embed_avg [H, K, D] moving sums, cluster_size
    [H, K] moving counts, initted bool scalar. The moving sums and counts stay float32 where the module is cast to
    half precision: 1 - decay of a count would round to nothing.
    """

    embed: Tensor
    embed_avg: Tensor
    cluster_size: Tensor
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

        start = torch.zeros(num_codebooks, codebook_size, dim)
        if not kmeans_init:
            nn.init.kaiming_uniform_(start)
            start = unit(start) if use_cosine_sim else start
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        wide = torch.promote_types(start.dtype, torch.float32)
        self.register_buffer("cluster_size", torch.ones(num_codebooks, codebook_size, dtype=wide))
        self.register_buffer("embed_avg", start.to(wide, copy=True))
        if learnable_codebook:
            self.embed = nn.Parameter(start)
        else:
            self.register_buffer("embed", start)
        self.register_transient_buffers()
        self._first_batch = FirstBatch(kmeans_init, self.processes)
        self._pending: tuple[Tensor, Tensor] | None = None

    def transient_buffers(self) -> dict[str, Tensor]:
        return {"usage": torch.zeros(self.num_codebooks, self.codebook_size, dtype=torch.int64, device="cpu")}

    @torch.no_grad()
    def set_codes(self, codes: Tensor) -> None:
        """Codes [H, K, D] in place of those that there are; updates go on from them.

        Moving counts stay, but an idle code counts as one row, as in a new codebook: it could not hold its place else.

        Raises:
            ValueError: codes of another shape.
        """
        if codes.shape != self.embed.shape:
            raise ValueError(f"the codebook must be {list(self.embed.shape[1:])}, got {list(codes.shape[1:])}")
        self.embed.copy_(codes)
        self.cluster_size.clamp_(min=1.0)
        self.embed_avg.copy_(codes.to(self.embed_avg) * self.cluster_size[..., None])
        self.initted.fill_(True)
        self._first_batch.awaited, self._pending = False, None

    def transform_input(self, x: Tensor) -> Tensor:
        """x [..., D], of unit length where codes are compared by cosine."""
        return unit(x) if self.use_cosine_sim else x

    @property
    def shared(self) -> bool:
        """Whether counts and sums are those of all processes of the group, as of now."""
        return self.use_ddp is not False and self.processes.size() > 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return keep_float32(self, ("cluster_size", "embed_avg"), lambda: super(Codebook, self)._apply(fn, recurse))

    def codes(self, dtype: torch.dtype) -> Tensor:
        """[H, K, D], with their gradient where learnable."""
        return (self.used if self.learnable_codebook else self.used.detach()).to(dtype)

    @property
    def used(self) -> Tensor:
        """The codes [H, K, D] that this pass compares with: a recomputation takes those of its first run."""
        return first_run_values(self, self.embed) if self.training else self.embed

    def start(self, rows: Tensor, mask: Tensor | None) -> None:
        """Fits the codes to rows [H, N, D] by k-means, once."""
        if self.needs_start:  # else no region without gradients: `torch.export.load` refuses one that is empty
            if exporting():
                raise ValueError(
                    "k-means has not fitted the codes: before an export, call the layer once, not compiled"
                )
            self._fit(rows, mask)

    @torch.no_grad()
    def _fit(self, rows: Tensor, mask: Tensor | None) -> None:
        start_codes(
            rows.detach(),
            mask,
            self.embed.data,
            self.embed_avg,
            self.cluster_size,
            self.initted,
            first=self._first_batch,
            iterations=self.kmeans_iters,
            cosine=self.use_cosine_sim,
            eps=self.eps,
            sync=self.shared and self.sync_kmeans,
            keep_empty="kmeans_scale" in self.corrections,
        )

    @property
    def needs_start(self) -> bool:
        return self._first_batch.awaited

    @torch.no_grad()
    def update_ema(self, active: Tensor | None = None) -> None:
        """Codes become moving sums over Laplace-smoothed moving counts, unless the bool scalar `active` is False."""
        moved = self.transform_input(self.embed_avg / laplace(self.cluster_size, self.eps)[..., None])
        self.embed.data.copy_(moved if active is None else torch.where(active, moved, self.embed.data))

    @torch.no_grad()
    def absorb(
        self,
        counts: Tensor,
        sums: Tensor,
        weight: Weight = None,
        accumulate: bool = False,
        active: Tensor | None = None,
    ) -> None:
        """Moves the averages by counts [H, K] and sums [H, K, D] of a batch, and by those accumulated before.

        Args:
            weight: [K] or [H, K] factor of 1 - decay, or a function of sums and counts that gives it.
            accumulate: keep them for the next call that does not accumulate.
            active: bool scalar; where False, nothing moves.
        """
        self.usage += counts.to(torch.int64)
        if callable(weight):
            weight = weight(sums, counts)
        if self._pending is not None:
            counts, sums = counts + self._pending[0], sums + self._pending[1]
        self._pending = (counts, sums) if accumulate else None
        if accumulate:
            return
        share: Any = 1.0 - self.decay if active is None else (1.0 - self.decay) * active.to(self.embed_avg.dtype)
        if weight is not None:
            share = share * weight.expand_as(self.cluster_size)
        self.cluster_size.lerp_(counts.to(self.cluster_size), share)
        self.embed_avg.lerp_(sums.to(self.embed_avg), share if weight is None else share[..., None])

    @torch.no_grad()
    def expire_codes_(self, rows: Tensor, mask: Tensor | None = None) -> None:
        """Replaces codes of a moving count below the threshold by random rows of rows [H, ..., D]."""
        if self.has_dead_code_replacement and self.training:
            rows = self.transform_input(rows).flatten(1, -2)
            update([Piece(self, None, None, lambda h, index: rows[h][index], rows.shape[1], mask)])

    @torch.no_grad()
    def update_indices(
        self,
        rows: Tensor,
        codes: Tensor,
        mask: Tensor | None = None,
        weight: Weight = None,
        accumulate: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        """An update with given codes [H, N] of rows [H, N, D]; masked rows and codes of -1 count nowhere."""
        codes = codes if mask is None else codes.masked_fill(~mask, -1)
        found = [tally(widened(part), code, self.codebook_size) for part, code in zip(rows, codes, strict=True)]
        counts, sums = (torch.stack(parts) for parts in zip(*found, strict=True))
        piece = Piece(self, counts, sums, lambda h, index: rows[h][index], rows.shape[1], mask)
        update([piece], weight, accumulate, ema_update)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        self._expect_statistics(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.initted.is_meta:
            self._first_batch.awaited = not bool(self.initted)
        self._pending = None  # sums that belong to other codes

    def _expect_statistics(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Makes place for the statistics of `affine_param` that the state has, and forgets those that it has not.

        They exist from the first batch on; without this a new layer refuses the state of one that was used.
        """
        for name in OPTIONAL_STATISTICS:
            if name in self._buffers:
                given = state_dict.get(prefix + name)
                if given is None:
                    self._buffers[name] = None
                elif self._buffers[name] is None:
                    self._buffers[name] = torch.zeros(given.shape, dtype=self.embed.dtype, device=self.embed.device)


@dataclass(frozen=True)
class Fresh:
    """Rows that may take the places of dead codes: their numbers [K], and which there are [K]."""

    index: Tensor
    usable: Tensor

    @staticmethod
    def drawn(rows: int, K: int, mask: Tensor | None, device: torch.device) -> Fresh:
        """Distinct random rows that are not masked, as far as there are any. Shapes do not depend on the mask."""
        order = torch.randperm(rows, device=device)
        count: Tensor | int = rows
        if mask is not None:
            order = order[(~mask[order]).to(torch.uint8).argsort(stable=True)]
            count = mask.sum()
        place = torch.arange(K, device=device)
        return Fresh(order[place.clamp(max=max(rows - 1, 0))] if rows else place * 0, place < count)


@dataclass(frozen=True)
class Piece:
    """What one codebook learns from a batch of `rows` rows."""

    codebook: Codebook
    counts: Tensor | None  # [H, K]
    sums: Tensor | None  # [H, K, D]
    take: Callable[[int, Tensor], Tensor]  # head, numbers [n] -> rows [n, D], as they were quantized
    rows: int
    mask: Tensor | None
    active: Tensor | None = None  # bool scalar; where False, this codebook learns nothing


@torch.no_grad()
def update(
    pieces: Sequence[Piece], weight: Weight = None, accumulate: bool = False, ema_update: bool | None = None
) -> None:
    """Moves averages and codes, then replaces dead codes: one collective for all codebooks, of a fixed size.

    The pieces are of codebooks that the same processes share.
    """
    shared = [piece for piece in pieces if piece.codebook.shared]
    given = _reduced(shared, accumulate) if shared else {}
    for piece in pieces:
        book = piece.codebook
        moves = book.ema_update if ema_update is None else ema_update
        counts, sums, candidates = given.get(id(piece), (piece.counts, piece.sums, None))
        if counts is not None and sums is not None:
            if not moves and not book.has_dead_code_replacement:
                book.usage += counts.to(torch.int64)
                continue
            book.absorb(counts, sums, weight, accumulate, piece.active)
            if accumulate:
                continue
            if moves and not book.manual_ema_update:
                book.update_ema(piece.active)
        if book.has_dead_code_replacement and book.training:
            _replace_dead(piece, candidates)


def _reduced(pieces: Sequence[Piece], accumulate: bool) -> dict[int, tuple[Tensor | None, Tensor | None, Any]]:
    """Counts, sums and candidates (rows [H, K, D], usable [H, K]) of all processes, by `id` of the piece."""
    flat: list[Tensor] = []
    for piece in pieces:
        book = piece.codebook
        if piece.counts is not None and piece.sums is not None:
            flat += [piece.counts.float().flatten(), piece.sums.float().flatten()]
        if book.has_dead_code_replacement and not accumulate:
            flat += [_my_candidates(piece).flatten()]
    packed = pieces[0].codebook.processes.sum_(torch.cat(flat))
    parts = iter(packed.split([len(part) for part in flat]))
    given = {}
    for piece in pieces:
        H, K, D = piece.codebook.embed.shape
        counts = sums = candidates = None
        if piece.counts is not None and piece.sums is not None:
            counts, sums = next(parts).view(H, K), next(parts).view(H, K, D)
        if piece.codebook.has_dead_code_replacement and not accumulate:
            both = next(parts).view(H, K, D + 1)
            candidates = both[..., :-1], both[..., -1] > 0
        given[id(piece)] = counts, sums, candidates
    return given


def _my_candidates(piece: Piece) -> Tensor:
    """[H, K, D + 1] rows for every world-th place, and a last column of ones where there is one; else 0."""
    H, K, D = piece.codebook.embed.shape
    device = piece.codebook.embed.device
    processes = piece.codebook.processes
    mine = torch.arange(K, device=device) % processes.size() == processes.rank()
    out = torch.zeros(H, K, D + 1, dtype=torch.float32, device=device)
    if piece.rows == 0:
        return out
    for h in range(H):
        fresh = Fresh.drawn(piece.rows, K, piece.mask, device)
        place = torch.where(mine, mine.cumsum(0) - 1, 0)
        rows = piece.take(h, fresh.index[place]).float()
        take = mine & fresh.usable[place] & torch.isfinite(rows).all(1)
        rows = torch.cat([rows, torch.ones(K, 1, dtype=rows.dtype, device=device)], 1)
        out[h] = torch.where(take[:, None], rows, 0.0)
    return out


def _replace_dead(piece: Piece, candidates: tuple[Tensor, Tensor] | None) -> None:
    book = piece.codebook
    dead = book.cluster_size < book.threshold_ema_dead_code  # [H, K]
    dead = dead if piece.active is None else dead & piece.active
    if candidates is None and dead.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(dead.any()):
        return
    if candidates is None and piece.rows == 0:
        return
    for h in range(book.num_codebooks):
        if candidates is None:
            fresh = Fresh.drawn(piece.rows, book.codebook_size, piece.mask, dead.device)
            rows = piece.take(h, fresh.index)
            usable = fresh.usable & torch.isfinite(rows).all(1)
            scarce = piece.mask is not None or piece.rows < book.codebook_size
        else:
            order = (~candidates[1][h]).to(torch.uint8).argsort(stable=True)
            rows, usable, scarce = candidates[0][h][order], candidates[1][h][order], False
        _put(book, h, dead[h], rows, usable, scarce)


def _put(book: Codebook, h: int, dead: Tensor, rows: Tensor, usable: Tensor, scarce: bool) -> None:
    """The i-th dead code becomes the i-th row; where rows are scarce, dead codes are met in random order."""
    turn = dead.cumsum(0) - 1
    if scarce:
        score = torch.rand(len(dead), dtype=torch.float32, device=dead.device).masked_fill(~dead, 2.0)
        turn = torch.empty_like(turn).scatter_(0, score.argsort(), torch.arange(len(dead), device=dead.device))
    turn = turn.clamp(min=0)
    put = dead & usable[turn]
    rows = rows[turn].to(book.embed_avg)
    size: Any = book.reset_cluster_size
    if "reset_scale" in book.corrections:
        size = book.cluster_size[h].mean().clamp(min=float(book.reset_cluster_size))
    book.embed.data[h] = torch.where(put[:, None], rows.to(book.embed), book.embed.data[h])
    book.embed_avg[h] = torch.where(put[:, None], rows * size, book.embed_avg[h])
    book.cluster_size[h] = torch.where(put, size, book.cluster_size[h])
