"""Triton kernel of Adam: all tensors of a model in one launch, in blocks small enough to fill a GPU.

`torch._fused_adam_` gives 65,536 entries to a thread block, which leaves most of a large GPU idle. The addresses of
parameters and moments are in a table on the device; the gradients, whose addresses change, are arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.guard import launches

MAX_TENSORS = 32  # per launch
_BLOCK = 1024


@triton.jit
def _float32_pointer(address, ALIGNED: tl.constexpr):
    """An address as float32 pointer; a 16-byte alignment hint lets the compiler load four entries at once."""
    pointer = address.to(tl.pointer_type(tl.float32), bitcast=True)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def adam_kernel(
    gradients,  # tuple of at most MAX_TENSORS pointers
    addresses_ptr,  # [5, MAX_TENSORS] int64: parameter, mean, square, entries, first block; unused columns int64 max
    count_ptr,  # [] float32, steps done before
    rate_ptr,  # [1] float32, learning rate
    BETA1: tl.constexpr,  # constexpr: keeps float64 precision
    BETA2: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    DECOUPLED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_TENSORS: tl.constexpr,
):
    """p <- p - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps), see `reference`; BLOCK entries per program."""
    block = tl.program_id(0).to(tl.int64)
    all_t = tl.arange(0, MAX_TENSORS)  # [MAX_TENSORS]
    # The tensor of this block: the last one whose first block is not beyond it.
    t = tl.sum((tl.load(addresses_ptr + 4 * MAX_TENSORS + all_t) <= block).to(tl.int32), axis=0) - 1
    gradient = gradients[0].to(tl.int64)
    for i in tl.static_range(1, len(gradients)):
        gradient = tl.where(t == i, gradients[i].to(tl.int64), gradient)
    parameter, mean = tl.load(addresses_ptr + t), tl.load(addresses_ptr + MAX_TENSORS + t)
    square, entries = tl.load(addresses_ptr + 2 * MAX_TENSORS + t), tl.load(addresses_ptr + 3 * MAX_TENSORS + t)
    first_block = tl.load(addresses_ptr + 4 * MAX_TENSORS + t)
    offsets = (block - first_block) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = offsets < entries

    step = (tl.load(count_ptr) + 1.0).to(tl.float64)
    rate = tl.load(rate_ptr).to(tl.float64)
    step_size = (rate / (1.0 - tl.exp(step * LOG_BETA1))).to(tl.float32)
    correction = tl.sqrt(1.0 - tl.exp(step * LOG_BETA2)).to(tl.float32)

    p = tl.load(_float32_pointer(parameter, ALIGNED) + offsets, mask=inside, other=0.0)
    g = tl.load(_float32_pointer(gradient, ALIGNED) + offsets, mask=inside, other=0.0)
    m = tl.load(_float32_pointer(mean, ALIGNED) + offsets, mask=inside, other=0.0)
    v = tl.load(_float32_pointer(square, ALIGNED) + offsets, mask=inside, other=0.0)
    if DECOUPLED:
        p -= (rate * WEIGHT_DECAY).to(tl.float32) * p
    else:
        g += WEIGHT_DECAY * p
    m = BETA1 * m + (1.0 - BETA1) * g
    v = BETA2 * v + (1.0 - BETA2) * g * g
    p -= step_size * m / (tl.sqrt(v) / correction + EPS)
    tl.store(_float32_pointer(parameter, ALIGNED) + offsets, p, mask=inside)
    tl.store(_float32_pointer(mean, ALIGNED) + offsets, m, mask=inside)
    tl.store(_float32_pointer(square, ALIGNED) + offsets, v, mask=inside)


class AdamLauncher:
    """Updates a fixed set of parameters and moments in place; see `training.optimizer.FusedAdam`, which owns them.

    The addresses are read once: a tensor that moves to other memory needs a new launcher.

    Args:
        parameters, means, squares: float32 on one device, at most `MAX_TENSORS` of each, dense, with equal strides.
        betas, eps, weight_decay: of Adam.
        decoupled: AdamW instead of Adam.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        means: Sequence[Tensor],
        squares: Sequence[Tensor],
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        decoupled: bool,
    ) -> None:
        blocks = [triton.cdiv(p.numel(), _BLOCK) for p in parameters]
        self.blocks = sum(blocks)
        unused = torch.iinfo(torch.int64).max
        rows = [[t.data_ptr() for t in tensors] for tensors in (parameters, means, squares)]
        rows += [[p.numel() for p in parameters], [sum(blocks[:i]) for i in range(len(blocks))]]
        padded = [row + [unused] * (MAX_TENSORS - len(row)) for row in rows]
        self.table = torch.tensor(padded, dtype=torch.int64, device="cpu").to(parameters[0].device)
        self._aligned = all(address % 16 == 0 for row in rows[:3] for address in row)
        self._options = launch_options(betas, eps, weight_decay, decoupled)

    @launches
    def __call__(self, gradients: Sequence[Tensor], count: Tensor, rate: Tensor) -> None:
        """One step.

        Args:
            gradients: with the strides of the parameters.
            count: [] float32, the steps done before; not changed.
            rate: [1] float32, the learning rate.
        """
        aligned = self._aligned and all(gradient.data_ptr() % 16 == 0 for gradient in gradients)
        adam_kernel[(self.blocks,)](tuple(gradients), self.table, count, rate, ALIGNED=aligned, **self._options)


def launch_options(betas: tuple[float, float], eps: float, weight_decay: float, decoupled: bool) -> dict[str, Any]:
    """Keyword arguments of the launch, without ALIGNED."""
    return {
        "BETA1": betas[0],
        "BETA2": betas[1],
        "LOG_BETA1": math.log(betas[0]),
        "LOG_BETA2": math.log(betas[1]),
        "EPS": eps,
        "WEIGHT_DECAY": weight_decay,
        "DECOUPLED": decoupled,
        "BLOCK": _BLOCK,
        "MAX_TENSORS": MAX_TENSORS,
        "num_warps": 4,
        "num_stages": 1,
    }
