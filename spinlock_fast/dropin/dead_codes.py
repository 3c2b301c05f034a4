"""Replacement of dead codes by random rows of the batch, for all codebooks of an update together.

No operation reads a value on the host on a GPU, and shapes do not depend on data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spinlock_fast.kernels._common.backend import resolve_backend
from spinlock_fast.kernels._common.guard import is_traced
from spinlock_fast.kernels._common.operator import is_plain_call
from spinlock_fast.quantize.buffers import TransientBuffers
from spinlock_fast.quantize.sharded_parameters import store_written

# Of several codebooks [H, K, D]: the number of the codebook, and the head h in it.
Slot = tuple[int, int]
# (slots, row numbers [slots, n]) -> quantizer inputs of these slots, [slots, n, D]
GatherRows = Callable[[Sequence[Slot], Tensor], Tensor]


class ReplaceableCodes(TransientBuffers):
    """Base class of `Codebook`: what the replacement reads and writes."""

    embed: Tensor
    embed_avg: Tensor
    cluster_size: Tensor
    num_codebooks: int
    threshold_ema_dead_code: float
    reset_cluster_size: float
    has_dead_code_replacement: bool
    corrections: frozenset[str]


def gather_from_heads(rows: Tensor, transform: Callable[[Tensor], Tensor]) -> GatherRows:
    """Gathers `transform(rows)` for rows [H, N, D] of each head of one codebook."""

    def gather(slots: Sequence[Slot], index: Tensor) -> Tensor:
        if len(slots) == 1:
            return transform(rows[slots[0][1]][index])
        return transform(torch.stack([rows[h][i] for (_, h), i in zip(slots, index.unbind(0), strict=True)]))

    return gather


@dataclass(frozen=True)
class Replacements:
    """Rows that may replace dead codes."""

    rows: Tensor  # [slots, n, D]
    valid: Tensor  # [slots, n] bool
    order: Tensor | None = None  # [slots, K] random numbers by which dead codes are ordered, if rows may be too few

    def part(self, first: int, last: int) -> Replacements:
        """Those of some slots."""
        order = None if self.order is None else self.order[first:last]
        return Replacements(self.rows[first:last], self.valid[first:last], order)


def draw_rows(num_rows: int, K: int, mask: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers [n] of n = min(num_rows, K) distinct random rows, and which of them [n] are not masked: the first ones.

    Shapes do not depend on the mask.
    """
    order, n = torch.randperm(num_rows, device=device), min(num_rows, K)
    if mask is None:
        return order[:n], torch.ones(n, dtype=torch.bool, device=device)
    order = order[(~mask[order]).to(torch.uint8).argsort(stable=True)]
    return order[:n], torch.arange(n, device=device) < mask.sum()


def draw_replacements(
    slots: Sequence[Slot], num_rows: int, K: int, mask: Tensor | None, gather: GatherRows, device: torch.device
) -> Replacements:
    """Distinct random rows of this process for each slot; num_rows is at least 1."""
    shuffle = mask is not None or num_rows < K
    drawn, order = [], []
    for _ in slots:
        drawn.append(draw_rows(num_rows, K, mask, device))
        if shuffle:
            order.append(torch.rand(K, dtype=torch.float32, device=device))
    index, valid = (torch.stack(column) for column in zip(*drawn, strict=True))
    rows = gather(slots, index)
    return Replacements(rows, valid & torch.isfinite(rows).all(2), torch.stack(order) if shuffle else None)


def valid_first(rows: Tensor, valid: Tensor) -> Replacements:
    """Replacements of rows [slots, K, D], those that are valid first."""
    order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
    return Replacements(_take(rows, order), valid.gather(1, order))


def replace_dead_codes(
    codebooks: Sequence[ReplaceableCodes],
    slots: Sequence[Slot],
    active: Sequence[Tensor | None],
    replacements: Callable[[Sequence[Slot]], Replacements],
    read_on_host: bool,
) -> None:
    """Replaces codes whose moving count is below the threshold.

    Args:
        codebooks: each with its own codes.
        slots: of codebooks with equal sizes, thresholds and options.
        active: bool scalar of each codebook, or None for all; where it is False, the codebook does not change.
        replacements: called with the slots that may have dead codes.
        read_on_host: leaves out slots without dead codes, on a CPU in eager mode.
    """
    first = codebooks[slots[0][0]]
    dead = torch.stack([codebooks[i].cluster_size[h] for i, h in slots]) < first.threshold_ema_dead_code  # [slots, K]
    given = [active[i] for i, _ in slots]
    flags = [flag for flag in given if flag is not None]
    if flags:
        dead = dead & torch.stack(flags)[:, None]
    if read_on_host and dead.device.type == "cpu" and not torch.compiler.is_compiling() and not is_traced():
        found = {i for (i, _), any_dead in zip(slots, dead.any(1).tolist(), strict=True) if any_dead}
        kept = [i in found for i, _ in slots]
        if not found:
            return
        if not all(kept):
            slots, dead = [slot for slot, keep in zip(slots, kept, strict=True) if keep], dead[kept]
    drawn, size = replacements(slots), slots_at_once(dead.device, len(slots))
    for p in range(0, len(slots), size):
        _overwrite_codes(codebooks, slots[p : p + size], dead[p : p + size], drawn.part(p, p + size))
    for i in dict.fromkeys(i for i, _ in slots):
        store_written(codebooks[i], "embed")


def replace_by_kernels(
    codebooks: Sequence[ReplaceableCodes], slots: Sequence[Slot], num_rows: int, gather: GatherRows
) -> bool:
    """`replace_dead_codes` in few launches on a GPU, by rows without a mask; other random rows than on a CPU.

    Returns:
        False, without a change, where the kernels do not apply: on a CPU, in compiled code, without rows, for other
        types than float32, and with the correction `reset_scale`.
    """
    if torch.compiler.is_compiling():
        return False
    first = codebooks[slots[0][0]]
    used = [codebooks[i] for i in dict.fromkeys(i for i, _ in slots)]
    state = [tensor for one in used for tensor in (one.embed.data, one.embed_avg, one.cluster_size)]
    if num_rows == 0 or "reset_scale" in first.corrections or not runs_by_kernels(state):
        return False
    from spinlock_fast.kernels.dead_codes import triton_replace

    sizes = used[0].cluster_size if len(used) == 1 else torch.cat([one.cluster_size for one in used])
    index = triton_replace.choose_rows(sizes, first.threshold_ema_dead_code, num_rows)
    rows = gather(slots, index)  # an index of -1 gathers some row
    start = 0
    for one in used:
        part = slice(start, start + one.num_codebooks)
        triton_replace.replace_codes(
            rows[part], index[part], one.embed.data, one.embed_avg, one.cluster_size, one.reset_cluster_size
        )
        store_written(one, "embed")
        start += one.num_codebooks
    return True


def runs_by_kernels(state: Sequence[Tensor]) -> bool:
    """Whether Triton kernels can change these tensors in place."""
    return (
        is_plain_call(state)
        and all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in state)
        and resolve_backend("auto", *state) == "triton"
    )


def slots_at_once(device: torch.device, slots: int) -> int:
    """How many of `slots` slots one set of operations changes: all on a GPU; on a CPU, single ones are in its cache."""
    return 1 if device.type == "cpu" else slots


def _overwrite_codes(
    codebooks: Sequence[ReplaceableCodes], slots: Sequence[Slot], dead: Tensor, replacements: Replacements
) -> None:
    """Replaces the i-th dead code of each slot by its i-th row; codes are in random order if rows may be too few."""
    rank = dead.cumsum(1) - 1
    if replacements.order is not None:
        order = replacements.order.masked_fill(~dead, 2.0).argsort(1)
        rank = torch.empty_like(rank).scatter_(
            1, order, torch.arange(dead.shape[1], device=dead.device).expand_as(rank)
        )
    in_rows, rank = rank < replacements.rows.shape[1], rank.clamp(0, replacements.rows.shape[1] - 1)
    replaced = dead & in_rows & replacements.valid.gather(1, rank)
    embeds = [codebooks[i].embed.data[h] for i, h in slots]
    sums = [codebooks[i].embed_avg[h] for i, h in slots]
    counts = [codebooks[i].cluster_size[h] for i, h in slots]
    rows = _take(replacements.rows, rank).to(sums[0])
    first = codebooks[slots[0][0]]
    size: Any = first.reset_cluster_size
    old_counts = torch.stack(counts)
    if "reset_scale" in first.corrections:
        size = old_counts.mean(1, keepdim=True).clamp(min=float(first.reset_cluster_size))
    row_size = size[..., None] if isinstance(size, Tensor) else size
    _copy(embeds, torch.where(replaced[..., None], rows.to(embeds[0]), torch.stack(embeds)))
    _copy(sums, torch.where(replaced[..., None], rows * row_size, torch.stack(sums)))
    _copy(counts, torch.where(replaced, size, old_counts))


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """rows [slots, K, D] at index [slots, n]."""
    return rows.gather(1, index[..., None].expand(*index.shape, rows.shape[2]))


def _copy(targets: list[Tensor], values: Tensor) -> None:
    """Copies values [n, ...] to n tensors."""
    if len(targets) > 1 and not torch.compiler.is_compiling():
        torch._foreach_copy_(targets, list(values.unbind(0)))
        return
    for target, value in zip(targets, values.unbind(0), strict=True):
        target.copy_(value)


def equal_options(codebooks: Sequence[ReplaceableCodes]) -> Iterator[list[Slot]]:
    """The slots of codebooks with dead-code replacement, grouped by size and options."""
    groups: dict[Any, list[Slot]] = {}
    for i, codebook in enumerate(codebooks):
        if codebook.has_dead_code_replacement and codebook.training:
            size = codebook.reset_cluster_size
            key = (
                codebook.embed.shape[1:],
                codebook.threshold_ema_dead_code,
                size,
                "reset_scale" in codebook.corrections,
            )
            groups.setdefault(key, []).extend((i, h) for h in range(codebook.num_codebooks))
    yield from groups.values()
