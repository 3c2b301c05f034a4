"""Streams of random numbers: each use has a key of its own, so that no two uses of a seed draw the same numbers.

`SeedSequence([42, 0])` is `SeedSequence(42)`: zeros at the end do not count. A spawn key comes behind the seed's padded
words, so keys of different uses, or of other lengths, never give the same stream, nor that of the bare seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import IntEnum

import numpy as np
import torch

VERSION = 2  # 1: keys in a list with the seed, as in runs of earlier versions; they are resumed so

_version = ContextVar("version", default=VERSION)


class Stream(IntEnum):
    """What random numbers are for. The values are part of what a seed means: they never change."""

    SPLIT = 0
    CATEGORIES = 1
    ROW_ORDER = 2
    ANALYSIS = 3


def generator(seed: int, stream: Stream, *place: int) -> np.random.Generator:
    """The random numbers of one use of a seed.

    Args:
        seed: of the run.
        stream: the use.
        place: further numbers within the use, such as the epoch.
    """
    if _version.get() == 1 and stream is not Stream.ANALYSIS:
        return np.random.default_rng([seed, int(stream), *place])
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(int(stream), *place)))


def version() -> int:
    """The version of the streams in the present context; a run writes it to its states."""
    return _version.get()


@contextmanager
def streams_of(saved: int | None) -> Iterator[None]:
    """Within the block `generator` gives the streams that a run of an earlier version had; None: of the present one."""
    token = _version.set(VERSION if saved is None else saved)
    try:
        yield
    finally:
        _version.reset(token)


def seed_torch(seed: int, device: torch.device | None = None) -> None:
    """As `torch.manual_seed`, but on the CPU and one CUDA device alone: other devices keep their random state."""
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
