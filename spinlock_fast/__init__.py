"""Turns the behaviour of simulated dynamical systems into discrete tokens."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spinlock_fast._native import __version__

if TYPE_CHECKING:
    from spinlock_fast.checkpoint import load_checkpoint
    from spinlock_fast.compat.pretrained import from_pretrained_codebook
    from spinlock_fast.model import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
    from spinlock_fast.quantize import GroupedVectorQuantizer
    from spinlock_fast.tokenizer import Tokenizer
    from spinlock_fast.trainer import Trainer, TrainResult

_HOME = {
    "CategoricalHierarchicalVQVAE": "model",
    "CategoricalVQVAEConfig": "model",
    "GroupedVectorQuantizer": "quantize",
    "Tokenizer": "tokenizer",
    "Trainer": "trainer",
    "TrainResult": "trainer",
    "from_pretrained_codebook": "compat.pretrained",
    "load_checkpoint": "checkpoint",
}

__all__ = [
    "CategoricalHierarchicalVQVAE",
    "CategoricalVQVAEConfig",
    "GroupedVectorQuantizer",
    "Tokenizer",
    "TrainResult",
    "Trainer",
    "__version__",
    "from_pretrained_codebook",
    "load_checkpoint",
]


def __getattr__(name: str) -> Any:
    # torch is imported on first use, so that `--help` and configuration errors come at once.
    if name in _HOME:
        return getattr(import_module(f"spinlock_fast.{_HOME[name]}"), name)
    raise AttributeError(f"module 'spinlock_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
