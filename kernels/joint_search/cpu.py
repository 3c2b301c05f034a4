"""Joint search by the native CPU kernels, with lower bounds of the error that reject most codes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.native import address, library
from spinlock_fast.kernels.joint_search.reference import Start

_FILTER, _HEAD = 4, 32  # components of the lower bounds, as in csrc/training/kernels.hpp
_MULTIPLE = 16  # of the widths of all matrices


class ErrorComponents(NamedTuple):
    """The decoder as the search reads it; `gram` is empty if its weights are not finite.

    H is the number of hidden units and F that of features, both padded. With linear contributions of the codes to the
    output there are N = H + F units, else N = H.
    """

    tables: Tensor  # [sum K, N]: what each code adds to the hidden units, and to the output
    w2: Tensor  # [hidden, features]
    gram: Tensor  # [H, N]: w2 w2^T, and w2
    first: Tensor  # [H, _FILTER] leading columns of P, see csrc/training/joint_search_impl.hpp
    head: Tensor  # [H, _HEAD]
    tail: Tensor  # [H, other columns], empty with linear contributions
    linear_head: Tensor | None = None  # [sum K, _HEAD] linear contributions in the components of `head`
    linear_gradient: Tensor | None = None  # [sum K, H] their products with w2


def error_components(tables: Tensor, w2: Tensor, linear: Tensor | None) -> ErrorComponents:
    """The components of tables [sum K, H], w2 [H, F] and linear [sum K, F], for several searches."""
    gram = w2.double() @ w2.double().t()
    if not bool(torch.isfinite(gram).all()):
        return ErrorComponents(tables, w2, gram[:0], *[w2[:0]] * 3)
    if linear is not None:
        directions = _leading_directions(tables.relu() @ w2 + linear)
        rows, head = _rows_padded(_padded(w2)), _rows_padded(w2 @ directions)
        both = torch.cat([_padded(_rows_padded(gram.float())), rows], 1)
        tables = torch.cat([_padded(tables), _padded(linear)], 1)
        products = (linear @ directions, _padded(linear @ w2.t()))
        return ErrorComponents(tables, w2, both, head[:, :_FILTER].contiguous(), head, head[:, :0], *products)
    shares, vectors = torch.linalg.eigh(gram)
    components = (vectors * shares.clamp(min=0.0).sqrt()).flip(1)[:, : max(min(w2.shape), _HEAD)].float()
    head, tail = components[:, :_HEAD], components[:, _HEAD:]
    head = F.pad(head, (0, _HEAD - head.shape[1]))
    gram, first, head, tail = map(_rows_padded, (_padded(gram.float()), head[:, :_FILTER], head, _padded(tail)))
    return ErrorComponents(_padded(tables), w2, gram, first, head, tail)


def _leading_directions(added: Tensor) -> Tensor:
    """Orthonormal columns [F, _HEAD] that hold most of the variance of rows [n, F], in falling order.

    By subspace iteration. Any orthonormal columns give valid lower bounds; these give large ones, which reject more
    codes. If F is smaller than _HEAD, the other columns are zero.
    """
    added = torch.nan_to_num(added, posinf=0.0, neginf=0.0)
    added = added - added.mean(0)
    features = added.shape[1]
    basis = torch.eye(features, dtype=added.dtype, device="cpu")
    if features > _HEAD:
        random = torch.Generator("cpu").manual_seed(0)
        basis = torch.randn(features, _HEAD + 8, generator=random, dtype=added.dtype, device="cpu")
        for _ in range(3):
            basis = torch.linalg.qr(added.t() @ (added @ basis)).Q
    projected = added @ basis
    directions = basis @ torch.linalg.eigh(projected.t() @ projected)[1].flip(1)[:, :_HEAD]
    return F.pad(directions, (0, _HEAD - directions.shape[1]))


def joint_search(
    components: ErrorComponents, layout: CodebookLayout, sweeps: int, cost: Tensor | None, begin: Start
) -> Tensor:
    """Codes [B, G] after `sweeps` sweeps; see `reference.joint_search`."""
    if not len(components.gram):
        return begin.codes
    residual = begin.sums.relu() @ components.w2 - begin.target
    codes, sums = begin.codes.clone(), _padded(begin.sums)
    gradient = _padded(residual @ components.w2.t())  # half that of the squared error
    linear_units = components.gram.shape[1] - sums.shape[1]
    if linear_units:
        sums, gradient = F.pad(sums, (0, linear_units)), torch.cat([gradient, _padded(residual)], 1)
    library.joint_search(
        address(codes), address(sums), address(gradient), address(begin.tolerance.contiguous()), address(cost),
        address(components.tables), address(components.first), address(components.head), address(components.tail),
        address(components.gram), address(components.linear_head), address(components.linear_gradient),
        list(layout.num_codes), len(codes), sums.shape[1], linear_units, components.tail.shape[1], sweeps,
        torch.get_num_threads(),
    )  # fmt: skip
    return codes


def _padded(matrix: Tensor) -> Tensor:
    """A copy with zero columns up to a multiple of the width."""
    return F.pad(matrix, (0, -matrix.shape[1] % _MULTIPLE)).contiguous()


def _rows_padded(matrix: Tensor) -> Tensor:
    """A copy with zero rows up to a multiple of the width."""
    return F.pad(matrix, (0, 0, 0, -matrix.shape[0] % _MULTIPLE)).contiguous()
