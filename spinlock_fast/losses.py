"""The training objective: five terms and their weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spinlock_fast.config import TrainingConfig
from spinlock_fast.kernels.code_decoders import partial_loss
from spinlock_fast.kernels.topo_loss import topographic_correlations
from spinlock_fast.model import CategoricalHierarchicalVQVAE
from spinlock_fast.quantize import GroupedVectorQuantizer

_TOPO_PRE_SHARE = 0.3
_TOPO_POST_SHARE = 0.7


class LossTerms(NamedTuple):
    """Unweighted terms, each a scalar."""

    reconstruction: Tensor
    vq: Tensor
    orthogonality: Tensor
    informativeness: Tensor
    topographic: Tensor

    def total(self, weights: LossWeights) -> Tensor:
        """The weighted sum; a term of weight 0 has no part in it, finite or not."""
        parts = [weight * term for weight, term in zip(weights, self, strict=True) if weight != 0.0]
        return torch.stack(parts).sum() if parts else torch.zeros_like(self.reconstruction)


class LossWeights(NamedTuple):
    """Factors of `LossTerms`."""

    reconstruction: float
    vq: float
    orthogonality: float
    informativeness: float
    topographic: float

    @classmethod
    def of(cls, config: TrainingConfig) -> LossWeights:
        return cls(
            config.reconstruction_weight,
            config.vq_weight,
            config.orthogonality_weight,
            config.informativeness_weight,
            config.topo_weight,
        )


def loss_terms(model: CategoricalHierarchicalVQVAE, x: Tensor, out: dict[str, Tensor], topo_samples: int) -> LossTerms:
    """All terms of a batch.

    Args:
        x: [B, F] the features.
        out: what `model(x)` returned.
        topo_samples: the topographic term takes the first so many rows.
    """
    layout, codes, codebook = model.quantizer.layout, out["tokens"], out["codebook"]
    rows = slice(0, topo_samples)
    pre, post = topographic_correlations(x[rows], out["latents"][rows], codes[rows], codebook, layout)
    return LossTerms(
        reconstruction=(out["reconstruction"] - x).square().mean(),
        vq=out["vq_loss"],
        orthogonality=code_orthogonality(model.quantizer),
        informativeness=partial_loss(x, out["quantized"], codes, codebook, model.code_decoders, layout),
        topographic=topographic_loss(pre, post),
    )


def code_orthogonality(quantizer: GroupedVectorQuantizer) -> Tensor:
    """Mean over codebooks of the mean squared cosine between two of its codes.

    Codes that follow a moving average are buffers, so this is then a constant without gradient; a
    codebook of one code counts as 0.
    """
    layout = quantizer.layout
    codes = layout.pad_codebook(quantizer.embedding)  # [G, K_max, D_max]
    unit = codes / codes.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(codes.dtype).tiny)
    cosine = unit @ unit.transpose(1, 2)
    off_diagonal = 1.0 - torch.eye(layout.max_codes, dtype=codes.dtype, device=codes.device)
    K = layout.indices(codes.device).num_codes
    pairs = (K * (K - 1.0)).clamp(min=1.0)
    mean_square: Tensor = (cosine * off_diagonal).square().sum((1, 2)) / pairs
    return mean_square.mean()


def topographic_loss(pre: Tensor, post: Tensor) -> Tensor:
    """0.3 (1 - pre) + 0.7 (1 - post)."""
    return _TOPO_PRE_SHARE * (1.0 - pre) + _TOPO_POST_SHARE * (1.0 - post)
