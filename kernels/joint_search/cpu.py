"""Joint search by the native CPU kernels, with lower bounds of the error that reject most codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.native import address, library
from spinlock_fast.kernels.joint_search.reference import Start

_FILTER, _HEAD = 4, 32  # components of the lower bounds, as in csrc/training/kernels.hpp
_MULTIPLE = 16  # of the widths of all matrices


def joint_search(
    begin: Start, tables: Tensor, w2: Tensor, layout: CodebookLayout, sweeps: int, cost: Tensor | None
) -> Tensor:
    """Codes [B, G] after `sweeps` sweeps; see `reference.joint_search`."""
    gram = w2.double() @ w2.double().t()  # [H, H]
    if not bool(torch.isfinite(gram).all()):
        return begin.codes
    shares, vectors = torch.linalg.eigh(gram)
    components = (vectors * shares.clamp(min=0.0).sqrt()).flip(1)[:, : max(min(w2.shape), _HEAD)].float()
    gradient = begin.sums.relu() @ gram.float() - begin.target @ w2.t()  # half the gradient of the squared error
    codes, sums, gradient, tables = begin.codes.clone(), _padded(begin.sums), _padded(gradient), _padded(tables)
    head, tail = components[:, :_HEAD], components[:, _HEAD:]
    head = F.pad(head, (0, _HEAD - head.shape[1]))
    rejecting, head, tail, gram = map(_rows_padded, (head[:, :_FILTER], head, _padded(tail), _padded(gram.float())))
    library.joint_search(
        address(codes), address(sums), address(gradient), address(begin.tolerance.contiguous()), address(cost),
        address(tables), address(rejecting), address(head), address(tail), address(gram), list(layout.num_codes),
        len(codes), sums.shape[1], tail.shape[1], sweeps, torch.get_num_threads(),
    )  # fmt: skip
    return codes


def _padded(matrix: Tensor) -> Tensor:
    """A copy with zero columns up to a multiple of the width."""
    return F.pad(matrix, (0, -matrix.shape[1] % _MULTIPLE)).contiguous()


def _rows_padded(matrix: Tensor) -> Tensor:
    """A copy with zero rows up to a multiple of the width."""
    return F.pad(matrix, (0, 0, 0, -matrix.shape[0] % _MULTIPLE)).contiguous()
