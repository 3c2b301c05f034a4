"""Copies of codes that move in place before the backward pass has read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spinlock_fast.kernels._common.export import exporting


def snapshot(codes: Tensor) -> Tensor:
    """A copy of `codes`, with their gradient, that holds what they are now.

    `clone` does in eager mode. Under `torch.compile` it does not: Inductor removes a clone, and recomputes it in the
    backward pass from a buffer that has moved. The operator is opaque to both.
    """
    if torch.compiler.is_compiling() and not exporting():
        copy: Tensor = torch.ops.spinlock_fast.snapshot(codes)
        return copy
    return codes.clone()


torch.library.define("spinlock_fast::snapshot", "(Tensor codes) -> Tensor")


@torch.library.impl("spinlock_fast::snapshot", "default")
def _snapshot(codes: Tensor) -> Tensor:
    return codes.clone()


def _fake_snapshot(codes: Tensor) -> Tensor:
    return torch.empty_like(codes)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return grad


torch.library.register_fake("spinlock_fast::snapshot", _fake_snapshot)
torch.library.register_autograd("spinlock_fast::snapshot", _backward, setup_context=_keep)
