"""Triton kernel of Adam: all tensors of a model in one launch, in blocks small enough to fill a device.

`torch._fused_adam_` gives 65,536 entries to a block of threads, which leaves most of a large device idle. Addresses of
parameters and moments lie in a table on the device; those of gradients, which change, are arguments.
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

TENSORS = 32  # in one launch
_BLOCK = 1024
_OPTIONS: dict[str, Any] = {"BLOCK": _BLOCK, "TENSORS": TENSORS, "num_warps": 4, "num_stages": 1}


@triton.jit
def _at(address, ALIGNED: tl.constexpr):
    """Float32 numbers at an address; told that it is a multiple of 16 bytes, the compiler moves four at once."""
    pointer = address.to(tl.pointer_type(tl.float32), bitcast=True)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def adam_kernel(
    gradients,  # as many as there are tensors, at most TENSORS
    addresses_ptr,  # [5, TENSORS] int64: addresses of parameter, mean and square; entries; first block, or none
    count_ptr,  # [] float32, steps done before this one
    rate_ptr,  # [1] float32
    BETA1: tl.constexpr,  # numbers of the host, which have all of float64
    BETA2: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    DECOUPLED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    TENSORS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    all_t = tl.arange(0, TENSORS)
    t = tl.sum((tl.load(addresses_ptr + 4 * TENSORS + all_t) <= block).to(tl.int32), axis=0) - 1
    gradient = gradients[0].to(tl.int64)
    for i in tl.static_range(1, len(gradients)):
        gradient = tl.where(t == i, gradients[i].to(tl.int64), gradient)
    parameter, mean = tl.load(addresses_ptr + t), tl.load(addresses_ptr + TENSORS + t)
    square, entries = tl.load(addresses_ptr + 2 * TENSORS + t), tl.load(addresses_ptr + 3 * TENSORS + t)
    at = (block - tl.load(addresses_ptr + 4 * TENSORS + t)) * BLOCK + tl.arange(0, BLOCK)
    here = at < entries

    step = (tl.load(count_ptr) + 1.0).to(tl.float64)
    rate = tl.load(rate_ptr).to(tl.float64)
    size = (rate / (1.0 - tl.exp(step * LOG_BETA1))).to(tl.float32)
    root = tl.sqrt(1.0 - tl.exp(step * LOG_BETA2)).to(tl.float32)

    p = tl.load(_at(parameter, ALIGNED) + at, mask=here, other=0.0)
    g = tl.load(_at(gradient, ALIGNED) + at, mask=here, other=0.0)
    m = tl.load(_at(mean, ALIGNED) + at, mask=here, other=0.0)
    v = tl.load(_at(square, ALIGNED) + at, mask=here, other=0.0)
    if DECOUPLED:
        p -= (rate * WEIGHT_DECAY).to(tl.float32) * p
    else:
        g += WEIGHT_DECAY * p
    m = BETA1 * m + (1.0 - BETA1) * g
    v = BETA2 * v + (1.0 - BETA2) * g * g
    p -= size * m / (tl.sqrt(v) / root + EPS)
    tl.store(_at(parameter, ALIGNED) + at, p, mask=here)
    tl.store(_at(mean, ALIGNED) + at, m, mask=here)
    tl.store(_at(square, ALIGNED) + at, v, mask=here)


class Adam:
    """Moves parameters by Adam or AdamW; see `optimizer.FusedAdam`, whose tensors these are.

    Args:
        parameters, means, squares: float32, on one device, at most `TENSORS` of each, dense and equally strided. Their
            addresses are taken now: tensors that get other memory need another `Adam`.
        beta1, beta2, eps, weight_decay, decoupled: of Adam.
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
        none = torch.iinfo(torch.int64).max
        rows = [[t.data_ptr() for t in tensors] for tensors in (parameters, means, squares)]
        rows += [[p.numel() for p in parameters], [sum(blocks[:i]) for i in range(len(blocks))]]
        padded = [row + [none] * (TENSORS - len(row)) for row in rows]
        self.table = torch.tensor(padded, dtype=torch.int64, device="cpu").to(parameters[0].device)
        self._aligned = all(address % 16 == 0 for row in rows[:3] for address in row)
        self._options = launch_options(betas, eps, weight_decay, decoupled)

    @launches
    def __call__(self, gradients: Sequence[Tensor], count: Tensor, rate: Tensor) -> None:
        """Gradients with the strides of the parameters; `count` steps were done before."""
        aligned = self._aligned and all(gradient.data_ptr() % 16 == 0 for gradient in gradients)
        adam_kernel[(self.blocks,)](tuple(gradients), self.table, count, rate, ALIGNED=aligned, **self._options)


def launch_options(betas: tuple[float, float], eps: float, weight_decay: float, decoupled: bool) -> dict[str, Any]:
    return {
        "BETA1": betas[0],
        "BETA2": betas[1],
        "LOG_BETA1": math.log(betas[0]),
        "LOG_BETA2": math.log(betas[1]),
        "EPS": eps,
        "WEIGHT_DECAY": weight_decay,
        "DECOUPLED": decoupled,
        **_OPTIONS,
    }
