"""Resolving device names."""

from __future__ import annotations

import re

import torch

from spinlock_fast.distributed import current_ranks
from spinlock_fast.errors import ConfigError
from spinlock_fast.kernels._common.backend import resolve_backend
from spinlock_fast.messages import shown


def resolve_device(name: str) -> torch.device:
    """The device for "auto", "cpu", "cuda" or "cuda:N"; raises ConfigError for another or an unavailable one.

    With several ranks, "cuda" is the device with the number of the local rank, so that each rank has its own.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", name, re.ASCII):
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:N, got {shown(name)}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    ranks = current_ranks()
    if name == "cuda" and ranks.size > 1:
        device = torch.device("cuda", ranks.local_rank)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"device: {device} is not available; {torch.cuda.device_count()} CUDA devices were found")
    try:
        resolve_backend("auto", torch.empty(0, device=device))
    except (ValueError, RuntimeError) as error:  # SPINLOCK_FAST_BACKEND is invalid
        raise ConfigError(str(error)) from None
    return device
