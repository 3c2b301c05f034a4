"""Discrete tokens for the behaviour of simulated dynamical systems."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spinlock_fast._native import __version__

if TYPE_CHECKING:
    from spinlock_fast.behaviour_loss import BehaviourLoss
    from spinlock_fast.checkpoints.directory import load_checkpoint
    from spinlock_fast.compat.pretrained import from_pretrained_codebook
    from spinlock_fast.dropin import GroupedResidualVQ, ResidualVQ, VectorQuantize
    from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
    from spinlock_fast.quantize import GroupedVectorQuantizer
    from spinlock_fast.tokenizer import Tokenizer
    from spinlock_fast.training.result import TrainResult
    from spinlock_fast.training.trainer import Trainer

_MODULES = {
    "BehaviourLoss": "behaviour_loss",
    "CategoricalHierarchicalVQVAE": "models.vqvae",
    "CategoricalVQVAEConfig": "models.vqvae",
    "GroupedResidualVQ": "dropin",
    "GroupedVectorQuantizer": "quantize",
    "ResidualVQ": "dropin",
    "Tokenizer": "tokenizer",
    "Trainer": "training.trainer",
    "TrainResult": "training.result",
    "VectorQuantize": "dropin",
    "from_pretrained_codebook": "compat.pretrained",
    "load_checkpoint": "checkpoints.directory",
}
# Forwarded to vector-quantize-pytorch where it is installed, so that one import serves both packages.
_FORWARDED = frozenset(
    [
        "BinaryMapper",
        "EvoLFQ",
        "FSP",
        "FSQ",
        "GroupedResidualFSQ",
        "GroupedResidualLFQ",
        "HierarchicalVQ",
        "LFQ",
        "LatentQuantize",
        "RandomProjectionQuantizer",
        "ResidualFSQ",
        "ResidualLFQ",
        "ResidualSimVQ",
        "Sequential",
        "SimVQ",
    ]
)

__all__ = [
    "BehaviourLoss",
    "CategoricalHierarchicalVQVAE",
    "CategoricalVQVAEConfig",
    "GroupedResidualVQ",
    "GroupedVectorQuantizer",
    "ResidualVQ",
    "Tokenizer",
    "TrainResult",
    "Trainer",
    "VectorQuantize",
    "__version__",
    "from_pretrained_codebook",
    "load_checkpoint",
]


def __getattr__(name: str) -> Any:
    # Lazy imports: `--help` and configuration errors need no torch.
    if name in _MODULES:
        return getattr(import_module(f"spinlock_fast.{_MODULES[name]}"), name)
    if name in _FORWARDED:
        try:
            return getattr(import_module("vector_quantize_pytorch"), name)
        except ModuleNotFoundError as error:
            if error.name != "vector_quantize_pytorch":
                raise
            raise ImportError(f"{name} is provided by another package: pip install vector-quantize-pytorch") from None
    raise AttributeError(f"module 'spinlock_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
