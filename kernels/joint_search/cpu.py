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
    """The second layer as the search reads it; `gram` is empty if it is not finite."""

    gram: Tensor  # [H, H] w2 w2^T, padded
    w2: Tensor  # [H, F]
    first: Tensor  # [H, _FILTER] leading components of `gram`, padded rows
    head: Tensor  # [H, _HEAD]
    tail: Tensor  # [H, other components]


def error_components(w2: Tensor) -> ErrorComponents:
    """The components of w2 [H, F], for several searches with the same decoder."""
    gram = w2.double() @ w2.double().t()
    if not bool(torch.isfinite(gram).all()):
        return ErrorComponents(gram[:0], w2, *[w2[:0]] * 3)
    shares, vectors = torch.linalg.eigh(gram)
    components = (vectors * shares.clamp(min=0.0).sqrt()).flip(1)[:, : max(min(w2.shape), _HEAD)].float()
    head, tail = components[:, :_HEAD], components[:, _HEAD:]
    head = F.pad(head, (0, _HEAD - head.shape[1]))
    gram, first, head, tail = map(_rows_padded, (_padded(gram.float()), head[:, :_FILTER], head, _padded(tail)))
    return ErrorComponents(gram, w2, first, head, tail)


def joint_search(
    second: ErrorComponents, tables: Tensor, layout: CodebookLayout, sweeps: int, cost: Tensor | None, begin: Start
) -> Tensor:
    """Codes [B, G] after `sweeps` sweeps; see `reference.joint_search`."""
    if not len(second.gram):
        return begin.codes
    hidden = len(second.w2)
    gradient = (
        begin.sums.relu() @ second.gram[:hidden, :hidden] - begin.target @ second.w2.t()
    )  # half the gradient of the squared error
    codes, sums, gradient, tables = begin.codes.clone(), _padded(begin.sums), _padded(gradient), _padded(tables)
    library.joint_search(
        address(codes), address(sums), address(gradient), address(begin.tolerance.contiguous()), address(cost),
        address(tables), address(second.first), address(second.head), address(second.tail),
        address(second.gram), list(layout.num_codes), len(codes), sums.shape[1], second.tail.shape[1], sweeps,
        torch.get_num_threads(),
    )  # fmt: skip
    return codes


def _padded(matrix: Tensor) -> Tensor:
    """A copy with zero columns up to a multiple of the width."""
    return F.pad(matrix, (0, -matrix.shape[1] % _MULTIPLE)).contiguous()


def _rows_padded(matrix: Tensor) -> Tensor:
    """A copy with zero rows up to a multiple of the width."""
    return F.pad(matrix, (0, 0, 0, -matrix.shape[0] % _MULTIPLE)).contiguous()
