"""Joint search of codes in plain PyTorch.

The decoder reconstructs a row x from the codes k_1, ..., k_G of all codebooks:

    R(k) = relu(b1 + sum_g T_g[k_g]) W2 + b2,   T_g = E_g W1_g  [K_g, H], one row per code,

with the code vectors E_g [K_g, D_g] and the rows W1_g of the first weights that read codebook g. A decoder may add
sum_g L_g[k_g] to this, with L_g [K_g, F]. The search minimises

    |R(k) - x|^2 + w sum_g |z_g - E_g[k_g]|^2

with the latents z and a weight w that keeps the codes near them; 0 minimises the error of the reconstruction alone.
Starting from given codes, codebook g = 1, ..., G in turn takes the best code while the others stay, the lowest index of
equal ones; this is a sweep (coordinate descent; Besag 1986 calls it iterated conditional modes). A code stays unless
another is better by more than the rounding errors of the search, so that the sum never increases. From the nearest
codes the second term cannot decrease, so the error of the reconstruction never exceeds theirs.

Sweeps end in a local minimum. A perturbation moves the codes of a few codebooks and sweeps again; the result is kept if
the sum is lower (iterated local search; Martinez et al. 2016, "Revisiting additive quantization").
"""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spinlock_fast.kernels._common.layout import CodebookLayout

# Smallest accepted change of |r|^2, in units of the machine epsilon times |r| (|r| + |x - b2|), at r = R(k) - x.
ROUNDING = 32.0
_PERTURBED = 2  # codebooks whose codes a perturbation moves


class Decoder(NamedTuple):
    """Parameters of the decoder that reads the codes of all codebooks."""

    w1: Tensor | None  # [sum D, H]; None if the tables T are given
    b1: Tensor  # [H]
    w2: Tensor  # [H, F]
    b2: Tensor  # [F]
    linear: Tensor | None = None  # [sum K, F] L of all codebooks


class Start(NamedTuple):
    """Where the search of a batch starts."""

    codes: Tensor  # [B, G] int64, none of them -1
    sums: Tensor  # [B, H] b1 + sum_g T_g[k_g]
    target: Tensor  # [B, F] x - b2 - sum_g L_g[k_g]
    tolerance: Tensor  # [B] smallest accepted change of the squared error
    error: Tensor  # [B] what the search minimises, at these codes


def code_tables(codebook: Tensor, w1: Tensor, layout: CodebookLayout) -> Tensor:
    """T [sum K, H]: the contribution of every code to the first layer."""
    slices = [(layout.entry_slice(g), layout.num_codes[g], layout.column_slice(g)) for g in range(layout.groups)]
    return torch.cat([codebook[entries].view(K, -1) @ w1[columns] for entries, K, columns in slices])


def start(x: Tensor, codes: Tensor, tables: Tensor, decoder: Decoder, layout: CodebookLayout) -> Start:
    """The start of a search from codes [B, G] for rows x [B, F]."""
    rows = codes + layout.indices(x.device).code_offsets
    sums = decoder.b1 + F.embedding_bag(rows, tables, mode="sum")
    target = x - decoder.b2
    length = target.norm(dim=1)
    if decoder.linear is not None:
        target = target - F.embedding_bag(rows, decoder.linear, mode="sum")
    size = (target - sums.relu() @ decoder.w2).norm(dim=1)
    tolerance = ROUNDING * torch.finfo(x.dtype).eps * size * (size + length)
    return Start(codes, sums, target, tolerance, size.square())


def perturbations(layout: CodebookLayout, count: int) -> list[list[int]]:
    """`count` times the moves of the codes of each codebook (modulo its size), the same for all rows of all batches.

    So the codes of a row do not depend on the other rows of its batch.
    """
    draw = random.Random(0)
    movable = [g for g, size in enumerate(layout.num_codes) if size > 1]
    moves = []
    for _ in range(count if movable else 0):
        moved = draw.sample(movable, min(_PERTURBED, len(movable)))
        moves.append([draw.randrange(1, size) if g in moved else 0 for g, size in enumerate(layout.num_codes)])
    return moves


def joint_search(
    begin: Start,
    tables: Tensor,
    w2: Tensor,
    layout: CodebookLayout,
    sweeps: int,
    cost: Tensor | None,
    linear: Tensor | None = None,
) -> Tensor:
    """Codes [B, G] after `sweeps` sweeps; `cost` [B, sum K] is added to the error by each code."""
    codes, sums, target = begin.codes.clone(), begin.sums, begin.target
    rows = torch.arange(len(codes), device=codes.device)
    for _ in range(sweeps):
        for g in range(layout.groups):
            of_codebook = layout.code_slice(g)
            table = tables[of_codebook]  # [K, H]
            candidates = (sums - table[codes[:, g]])[:, None] + table  # [B, K, H]
            residuals = candidates.relu() @ w2 - target[:, None]  # [B, K, F]
            if linear is not None:
                residuals += linear[of_codebook] - linear[of_codebook][codes[:, g], None]
            errors = residuals.square().sum(-1)  # [B, K]
            if cost is not None:
                errors = errors + cost[:, of_codebook]
            current = errors[rows, codes[:, g]]
            best = torch.where(errors.isfinite(), errors, torch.inf).argmin(1)
            lower = errors[rows, best] < current - begin.tolerance
            best = torch.where(lower, best, codes[:, g])
            sums = torch.where(lower[:, None], candidates[rows, best], sums)
            if linear is not None:
                target = target + linear[of_codebook][codes[:, g]] - linear[of_codebook][best]
            codes[:, g] = best
    return codes
