"""Joint search of codes: checks of arguments, choice of the implementation."""

from __future__ import annotations

import functools

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
    latents: Tensor | None = None,
    candidates: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Codes whose joint reconstruction has a lower squared error |R(k) - x|^2; see `reference`.

    The error of a row never increases, from call to call and from sweep to sweep. Rows with a code of -1, or with
    values that are not finite, keep their codes.

    Args:
        x: [B, F]; half precision is computed in float32.
        codes: [B, G] int64, where the search starts: the nearest codes, usually.
        codebook: [sum K D] code vectors.
        decoder: R, of H hidden units.
        layout: sizes of the group.
        sweeps: passes over the codebooks, at least 0.
        latents: [B, sum D]; needed for `candidates`.
        candidates: only so many of the nearest codes of each codebook may be taken; None: any.
        backend: "auto", "triton" or "reference", see `resolve_backend`.

    Returns:
        [B, G] int64. Implementations may choose differently where errors are equal up to rounding.

    Raises:
        TypeError: wrong type of an argument.
        ValueError: shapes that do not match, tensors on different devices, `sweeps` below 0 or `candidates` below 1.
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
    if candidates is not None and (candidates < 1 or latents is None):
        raise ValueError(f"joint_search: candidates must be at least 1, with latents, got {candidates}")
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
        allowed = None
        if candidates is not None and latents is not None:
            allowed = _nearest(latents.to(wide), codebook, layout, candidates)
        if implementation == "cpu":
            found = cpu.joint_search(begin, tables, decoder.w2, layout, sweeps, allowed)
        elif implementation == "triton":
            from spinlock_fast.kernels.joint_search import triton_forward

            found = triton_forward.joint_search(begin, tables, decoder.w2, layout, sweeps, allowed)
        else:
            found = _by_blocks(begin, tables, decoder.w2, layout, sweeps, allowed)
    return torch.where(searched[:, None], found, codes)


def _by_blocks(
    begin: Start, tables: Tensor, w2: Tensor, layout: CodebookLayout, sweeps: int, allowed: Tensor | None
) -> Tensor:
    """`reference.joint_search` of blocks of rows, which bounds its memory."""
    if allowed is None:
        allowed = begin.codes.new_ones(1, layout.total_codes, dtype=torch.bool).expand(len(begin.codes), -1)
    rows = max(1, _CANDIDATE_ENTRIES // (layout.max_codes * max(w2.shape)))
    blocks = zip(*(part.split(rows) for part in (*begin, allowed)), strict=True)
    return torch.cat([reference.joint_search(Start(*b[:4]), tables, w2, layout, sweeps, b[4]) for b in blocks])


def _nearest(latents: Tensor, codebook: Tensor, layout: CodebookLayout, count: int) -> Tensor:
    """[B, sum K] bool: the `count` nearest codes of each codebook."""
    parts = []
    for g, (K, D) in enumerate(zip(layout.num_codes, layout.dims, strict=True)):
        vectors = codebook[layout.entry_slice(g)].view(K, D)
        distances = torch.cdist(latents[:, layout.column_slice(g)], vectors)
        near = distances.topk(min(count, K), largest=False).indices
        parts.append(torch.zeros_like(distances, dtype=torch.bool).scatter_(1, near, True))
    return torch.cat(parts, 1)
