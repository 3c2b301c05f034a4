"""Joint search of codes: checks of arguments, choice of the implementation."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from spinlock_fast.kernels._common.backend import Backend
from spinlock_fast.kernels._common.guard import FLOAT, INDEX, SAME, check, check_codes
from spinlock_fast.kernels._common.implementation import choose_implementation
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.precision import full_float32, no_autocast
from spinlock_fast.kernels.joint_search import cpu, reference
from spinlock_fast.kernels.joint_search.reference import Decoder, Start

_CANDIDATE_ENTRIES = 1 << 22  # [B, K, H] values of the reference that exist at once


@torch.no_grad()
def joint_search(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    decoder: Decoder,
    layout: CodebookLayout,
    sweeps: int = 2,
    search_weight: float = 0.0,
    latents: Tensor | None = None,
    candidates: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Codes with a lower |R(k) - x|^2 + w sum_g |z_g - E_g[k_g]|^2 of each row; see `reference`.

    The sum of a row never increases, from call to call and from sweep to sweep. Rows with a code of -1, or with values
    that are not finite, keep their codes.

    Args:
        x: [B, F]; half precision is computed in float32.
        codes: [B, G] int64, where the search starts: the nearest codes, usually.
        codebook: [sum K D] code vectors.
        decoder: R, of H hidden units.
        layout: sizes of the group.
        sweeps: passes over the codebooks, at least 0.
        search_weight: w, at least 0.
        latents: z [B, sum D]; needed for `search_weight` and `candidates`.
        candidates: only the code where the search starts and so many of the nearest ones may be taken; None: any.
        backend: "auto", "triton" or "reference", see `resolve_backend`.

    Returns:
        [B, G] int64. Implementations may choose differently where errors are equal up to rounding.

    Raises:
        TypeError: wrong type of an argument.
        ValueError: shapes that do not match, tensors on different devices, `sweeps` or `search_weight` below 0,
            `candidates` below 1, or latents that are missing.
        IndexError: on a CPU, a code outside its codebook.
    """
    check(
        "joint_search",
        ("x", x, ("B", "F"), FLOAT),
        ("codes", codes, ("B", layout.groups), INDEX),
        ("codebook", codebook, (layout.total_entries,), FLOAT),
        ("latents", latents, ("B", layout.total_dims), FLOAT),
        ("decoder.w1", decoder.w1, (layout.total_dims, "H"), SAME),
        ("decoder.b1", decoder.b1, ("H",), SAME),
        ("decoder.w2", decoder.w2, ("H", "F"), SAME),
        ("decoder.b2", decoder.b2, ("F",), SAME),
    )
    check_codes("joint_search", codes, layout)
    if sweeps < 0:
        raise ValueError(f"joint_search: sweeps must be at least 0, got {sweeps}")
    if not 0.0 <= search_weight < math.inf:
        raise ValueError(f"joint_search: search_weight must be a finite number of at least 0, got {search_weight}")
    if candidates is not None and candidates < 1:
        raise ValueError(f"joint_search: candidates must be at least 1, got {candidates}")
    if latents is None and (candidates is not None or search_weight):
        raise ValueError("joint_search: candidates and search_weight need latents")
    wide = functools.reduce(torch.promote_types, [t.dtype for t in (x, codebook, *decoder)], torch.float32)
    x, codebook, decoder = x.to(wide), codebook.to(wide), Decoder(*(t.to(wide) for t in decoder))
    if not sweeps or not x.shape[0]:
        return codes.clone()
    implementation = choose_implementation(backend, x, codebook, *decoder)
    with no_autocast(x.device), full_float32(x.device):
        tables = reference.code_tables(codebook, decoder.w1, layout)
        sizes = layout.indices(x.device).num_codes
        searched = ((codes >= 0) & (codes < sizes)).all(1) & torch.isfinite(x).all(1)
        rows = torch.where(searched[:, None], x, 0.0)
        begin = reference.start(rows, torch.where(searched[:, None], codes, 0), tables, decoder, layout)
        cost = None
        if latents is not None and (search_weight or candidates is not None):
            cost = _costs(latents.to(wide), begin.codes, codebook, layout, search_weight, candidates)
            begin = _with_rounding_of(cost, begin, layout)
        if implementation == "cpu":
            found = cpu.joint_search(begin, tables, decoder.w2, layout, sweeps, cost)
        elif implementation == "triton":
            from spinlock_fast.kernels.joint_search import triton_forward

            found = triton_forward.joint_search(begin, tables, decoder.w2, layout, sweeps, cost)
        else:
            found = _by_blocks(begin, tables, decoder.w2, layout, sweeps, cost)
    return torch.where(searched[:, None], found, codes)


def _by_blocks(
    begin: Start, tables: Tensor, w2: Tensor, layout: CodebookLayout, sweeps: int, cost: Tensor | None
) -> Tensor:
    """`reference.joint_search` of blocks of rows, which bounds its memory."""
    rows = max(1, _CANDIDATE_ENTRIES // (layout.max_codes * max(w2.shape)))
    blocks = [Start(*parts) for parts in zip(*(part.split(rows) for part in begin), strict=True)]
    costs = [None] * len(blocks) if cost is None else cost.split(rows)
    found = [reference.joint_search(b, tables, w2, layout, sweeps, c) for b, c in zip(blocks, costs, strict=True)]
    return torch.cat(found)


def _costs(
    latents: Tensor, codes: Tensor, codebook: Tensor, layout: CodebookLayout, weight: float, candidates: int | None
) -> Tensor:
    """[B, sum K] w |z_g - e|^2 of every code; infinite for codes that may not be taken."""
    parts = []
    for g, (K, D) in enumerate(zip(layout.num_codes, layout.dims, strict=True)):
        vectors = codebook[layout.entry_slice(g)].view(K, D)
        exact = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(latents[:, layout.column_slice(g)], vectors, compute_mode=exact).square()
        cost = weight * distances
        if candidates is not None:
            near = distances.topk(min(candidates, K), largest=False).indices
            taken = torch.cat([near, codes[:, g : g + 1]], 1)
            cost = torch.full_like(cost, torch.inf).scatter_(1, taken, cost.gather(1, taken))
        parts.append(cost)
    return torch.cat(parts, 1)


def _with_rounding_of(cost: Tensor, begin: Start, layout: CodebookLayout) -> Start:
    """The start with the rounding error of the costs in its tolerance."""
    own = cost.gather(1, begin.codes + layout.indices(cost.device).code_offsets).sum(1)
    return begin._replace(tolerance=begin.tolerance + reference.ROUNDING * torch.finfo(cost.dtype).eps * own)
