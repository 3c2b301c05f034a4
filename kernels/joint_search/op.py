"""Joint search of codes: checks of arguments, choice of the implementation."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import partial

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
    perturbations: int = 0,
    tables: Tensor | None = None,
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
        perturbations: how often codes are moved out of a local minimum, each time with `sweeps` more sweeps.
        tables: [sum K, H] what each code adds to the hidden layer; E_g W1_g if not given.

    Returns:
        [B, G] int64. Implementations may choose differently where errors are equal up to rounding.

    Raises:
        TypeError: wrong type of an argument.
        ValueError: shapes that do not match, tensors on different devices, `sweeps`, `perturbations` or
            `search_weight` below 0, `candidates` below 1 or with perturbations, or latents that are missing.
        IndexError: on a CPU, a code outside its codebook.
    """
    check(
        "joint_search",
        ("x", x, ("B", "F"), FLOAT),
        ("codes", codes, ("B", layout.groups), INDEX),
        ("codebook", codebook, (layout.total_entries,), FLOAT),
        ("latents", latents, ("B", layout.total_dims), FLOAT),
        ("decoder.w1", decoder.w1, (layout.total_dims, "H"), SAME),
        ("tables", tables, (layout.total_codes, "H"), FLOAT),
        ("decoder.b1", decoder.b1, ("H",), SAME),
        ("decoder.w2", decoder.w2, ("H", "F"), SAME),
        ("decoder.b2", decoder.b2, ("F",), SAME),
        ("decoder.linear", decoder.linear, (layout.total_codes, "F"), SAME),
    )
    check_codes("joint_search", codes, layout)
    if sweeps < 0:
        raise ValueError(f"joint_search: sweeps must be at least 0, got {sweeps}")
    if not 0.0 <= search_weight < math.inf:
        raise ValueError(f"joint_search: search_weight must be a finite number of at least 0, got {search_weight}")
    if candidates is not None and candidates < 1:
        raise ValueError(f"joint_search: candidates must be at least 1, got {candidates}")
    if perturbations < 0:
        raise ValueError(f"joint_search: perturbations must be at least 0, got {perturbations}")
    if perturbations and candidates is not None:
        raise ValueError("joint_search: perturbations move codes to any other, so candidates must be None")
    if latents is None and (candidates is not None or search_weight):
        raise ValueError("joint_search: candidates and search_weight need latents")
    if (decoder.w1 is None) == (tables is None):
        raise ValueError("joint_search: give either decoder.w1 or tables")
    given = [t for t in (x, codebook, tables, *decoder) if t is not None]
    wide = functools.reduce(torch.promote_types, [t.dtype for t in given], torch.float32)
    x, codebook = x.to(wide), codebook.to(wide)
    w1 = None if decoder.w1 is None else decoder.w1.to(wide)
    linear = None if decoder.linear is None else decoder.linear.to(wide).contiguous()
    decoder = Decoder(w1, decoder.b1.to(wide), decoder.w2.to(wide), decoder.b2.to(wide), linear)
    if not sweeps or not x.shape[0]:
        return codes.clone()
    with no_autocast(x.device), full_float32(x.device):
        if w1 is not None:
            tables = reference.code_tables(codebook, w1, layout)
        assert tables is not None
        tables = tables.to(wide).contiguous()
        sizes = layout.indices(x.device).num_codes.to(torch.int64)
        searched = ((codes >= 0) & (codes < sizes)).all(1) & torch.isfinite(x).all(1)
        rows = torch.where(searched[:, None], x, 0.0)
        first = torch.where(searched[:, None], codes, 0)
        cost = None
        if latents is not None and (search_weight or candidates is not None):
            cost = _costs(latents.to(wide), first, codebook, layout, search_weight, candidates)

        def at(codes: Tensor) -> Start:
            begin = reference.start(rows, codes, tables, decoder, layout)
            return begin if cost is None else _with_cost(cost, begin, layout)

        search = _implementation(backend, tables, decoder, layout, sweeps, cost, x, codebook)
        found = search(at(first))
        if perturbations:
            best = at(found)
            for moves in torch.tensor(reference.perturbations(layout, perturbations), device=x.device):
                best = _lower(at(search(at((best.codes + moves) % sizes))), best)
            found = best.codes
    return torch.where(searched[:, None], found, codes)


def _implementation(
    backend: Backend,
    tables: Tensor,
    decoder: Decoder,
    layout: CodebookLayout,
    sweeps: int,
    cost: Tensor | None,
    x: Tensor,
    codebook: Tensor,
) -> Callable[[Start], Tensor]:
    """The search of the backend that suits the tensors: from a start to codes [B, G]."""
    w2, linear = decoder.w2, decoder.linear
    given = [t for t in (x, codebook, tables, *decoder[1:]) if t is not None]
    implementation = choose_implementation(backend, *given)
    if implementation == "cpu":
        return partial(cpu.joint_search, cpu.error_components(tables, w2, linear), layout, sweeps, cost)
    if implementation == "triton":
        from spinlock_fast.kernels.joint_search import triton_forward

        return lambda begin: triton_forward.joint_search(begin, tables, w2, layout, sweeps, cost, linear)
    return lambda begin: _by_blocks(begin, tables, w2, layout, sweeps, cost, linear)


def _lower(tried: Start, best: Start) -> Start:
    """Of each row, `tried` if its error is clearly lower."""
    lower = tried.error < best.error - best.tolerance
    chosen = (
        torch.where(lower if new.ndim == 1 else lower[:, None], new, old) for new, old in zip(tried, best, strict=True)
    )
    return Start(*chosen)


def _by_blocks(
    begin: Start,
    tables: Tensor,
    w2: Tensor,
    layout: CodebookLayout,
    sweeps: int,
    cost: Tensor | None,
    linear: Tensor | None,
) -> Tensor:
    """`reference.joint_search` of blocks of rows, which bounds its memory."""
    rows = max(1, _CANDIDATE_ENTRIES // (layout.max_codes * max(w2.shape)))
    blocks = [Start(*parts) for parts in zip(*(part.split(rows) for part in begin), strict=True)]
    costs = [None] * len(blocks) if cost is None else cost.split(rows)
    return torch.cat(
        [reference.joint_search(b, tables, w2, layout, sweeps, c, linear) for b, c in zip(blocks, costs, strict=True)]
    )


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


def _with_cost(cost: Tensor, begin: Start, layout: CodebookLayout) -> Start:
    """The start with the costs of its codes in its error, and their rounding error in its tolerance."""
    own = cost.gather(1, begin.codes + layout.indices(cost.device).code_offsets).sum(1)
    rounding = reference.ROUNDING * torch.finfo(cost.dtype).eps * own
    return begin._replace(tolerance=begin.tolerance + rounding, error=begin.error + own)
