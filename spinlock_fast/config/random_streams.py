"""Random streams: each use of a seed has its own key, so that no two uses draw the same numbers.

Keys are spawn keys of `SeedSequence`. Keys appended to the seed would not be unique: `SeedSequence([42, 0])` equals
`SeedSequence(42)`, since trailing zeros are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import IntEnum

import numpy as np
import torch

VERSION = 2  # 1: keys in a list with the seed, used to resume runs of earlier versions

_version = ContextVar("version", default=VERSION)


class Stream(IntEnum):
    """Use of a random stream. The values determine the numbers of a seed and never change."""

    SPLIT = 0
    CATEGORIES = 1
    ROW_ORDER = 2
    ANALYSIS = 3


def generator(seed: int, stream: Stream, *place: int) -> np.random.Generator:
    """The random generator of one use of a seed.

    Args:
        seed: seed of the run.
        stream: the use.
        place: further keys, such as the epoch.
    """
    if _version.get() == 1 and stream is not Stream.ANALYSIS:
        return np.random.default_rng([seed, int(stream), *place])
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(int(stream), *place)))


def version() -> int:
    """The version of the streams in the current context; a run saves it with its state."""
    return _version.get()


@contextmanager
def streams_of(saved: int | None) -> Iterator[None]:
    """Within the block, `generator` returns the streams of a saved version; None: of the current version."""
    token = _version.set(VERSION if saved is None else saved)
    try:
        yield
    finally:
        _version.reset(token)


def seed_torch(seed: int, device: torch.device | None = None) -> None:
    """`torch.manual_seed` for the CPU and one CUDA device; other devices keep their random state."""
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def forked_rng(device: torch.device) -> Iterator[None]:
    """Restores the caller's random state on exit; a CUDA device is the current device inside the block."""
    if device.type != "cuda":
        with torch.random.fork_rng(devices=[]):
            yield
        return
    with torch.cuda.device(device), torch.random.fork_rng(devices=[torch.cuda.current_device()]):
        yield
