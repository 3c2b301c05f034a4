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

    With linear contributions of the codes to the output there are C more units, a linear one per component: widths H
    below are those of the hidden units, padded, and N = H + C, or N = H without.
    """

    tables: Tensor  # [sum K, N]: what each code adds to the hidden units, and to the components of the output
    w2: Tensor  # [H, F]
    directions: Tensor | None  # [F, C] the components; None without linear contributions
    gram: Tensor  # [N, N] products of the rows of P
    first: Tensor  # [H, _FILTER] leading columns of P
    head: Tensor  # [H, _HEAD]
    tail: Tensor  # [H, other columns]


def error_components(tables: Tensor, w2: Tensor, linear: Tensor | None) -> ErrorComponents:
    """The components of tables [sum K, H], w2 [H, F] and linear [sum K, F], for several searches."""
    gram = w2.double() @ w2.double().t()
    if not bool(torch.isfinite(gram).all()):
        return ErrorComponents(tables, w2, None, gram[:0], *[w2[:0]] * 3)
    if linear is None:
        shares, vectors = torch.linalg.eigh(gram)
        components = (vectors * shares.clamp(min=0.0).sqrt()).flip(1)[:, : max(min(w2.shape), _HEAD)].float()
        head, tail = components[:, :_HEAD], components[:, _HEAD:]
        head = F.pad(head, (0, _HEAD - head.shape[1]))
        gram, first, head, tail = map(_rows_padded, (_padded(gram.float()), head[:, :_FILTER], head, _padded(tail)))
        return ErrorComponents(_padded(tables), w2, None, gram, first, head, tail)
    # Any rotation of the output will do: these directions have most of what codes add to it.
    added = torch.nan_to_num(tables.relu() @ w2 + linear, posinf=0.0, neginf=0.0).double()
    added = added - added.mean(0)
    rotation = torch.linalg.eigh(added.t() @ added)[1].flip(1).float()
    columns = _HEAD + max(0, -(-(len(rotation) - _HEAD) // _MULTIPLE)) * _MULTIPLE
    directions = F.pad(rotation, (0, columns - len(rotation)))
    components = _rows_padded(w2 @ directions)  # P
    head, tail = components[:, :_HEAD].contiguous(), components[:, _HEAD:].contiguous()
    top = torch.cat([components @ components.t(), components], 1)
    bottom = torch.cat([components.t(), torch.eye(columns)], 1)
    tables = torch.cat([_padded(tables), linear @ directions], 1)
    return ErrorComponents(tables, w2, directions, torch.cat([top, bottom]), head[:, :_FILTER].contiguous(), head, tail)


def joint_search(
    components: ErrorComponents, layout: CodebookLayout, sweeps: int, cost: Tensor | None, begin: Start
) -> Tensor:
    """Codes [B, G] after `sweeps` sweeps; see `reference.joint_search`."""
    if not len(components.gram):
        return begin.codes
    residual = begin.sums.relu() @ components.w2 - begin.target
    codes, sums = begin.codes.clone(), _padded(begin.sums)
    gradient = _padded(residual @ components.w2.t())  # half that of the squared error
    linear_units = 0
    if components.directions is not None:
        linear_units = components.directions.shape[1]
        sums = F.pad(sums, (0, linear_units))
        gradient = torch.cat([gradient, residual @ components.directions], 1)
    library.joint_search(
        address(codes), address(sums), address(gradient), address(begin.tolerance.contiguous()), address(cost),
        address(components.tables), address(components.first), address(components.head), address(components.tail),
        address(components.gram), list(layout.num_codes), len(codes), sums.shape[1], linear_units,
        components.tail.shape[1], sweeps, torch.get_num_threads(),
    )  # fmt: skip
    return codes


def _padded(matrix: Tensor) -> Tensor:
    """A copy with zero columns up to a multiple of the width."""
    return F.pad(matrix, (0, -matrix.shape[1] % _MULTIPLE)).contiguous()


def _rows_padded(matrix: Tensor) -> Tensor:
    """A copy with zero rows up to a multiple of the width."""
    return F.pad(matrix, (0, 0, 0, -matrix.shape[0] % _MULTIPLE)).contiguous()
