"""The training objective: five terms and their weights."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from spinlock_fast.config import TrainingConfig
from spinlock_fast.kernels.code_decoders import partial_loss
from spinlock_fast.kernels.streams import side_by_side
from spinlock_fast.kernels.topo_loss import topographic_correlations
from spinlock_fast.model import CategoricalHierarchicalVQVAE
from spinlock_fast.quantize import GroupedVectorQuantizer

_TOPO_PRE_SHARE = 0.3  # the rest is that of the second correlation


@cache
def _factors(weights: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(weights, dtype=dtype, device=device)


class LossTerms(NamedTuple):
    """Unweighted terms, each a scalar."""

    reconstruction: Tensor
    vq: Tensor
    orthogonality: Tensor
    informativeness: Tensor
    topographic: Tensor

    def total(self, weights: LossWeights) -> Tensor:
        """The weighted sum; a term of weight 0 has no part in it, finite or not."""
        used = [(weight, term) for weight, term in zip(weights, self, strict=True) if weight != 0.0]
        if not used:
            return torch.zeros_like(self.reconstruction)
        factors = _factors(tuple(weight for weight, _ in used), self.reconstruction.dtype, self.reconstruction.device)
        return torch.stack([term for _, term in used]) @ factors


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
        out: what `model(x)` returned, or `model.to_codes(x)`: then decoding is done beside the other terms.
        topo_samples: the topographic term takes the first so many rows.
    """
    layout, codes, codebook = model.quantizer.layout, out["tokens"], out["codebook"]
    latents, quantized = out["latents"], out["quantized"]
    rows = slice(0, topo_samples)

    def topographic() -> Tensor:
        return topographic_loss(*topographic_correlations(x[rows], latents[rows], codes[rows], codebook, layout))

    def error() -> Tensor:
        reconstruction = out["reconstruction"] if "reconstruction" in out else model.decode(quantized)
        if not model.config.extra_inputs:
            return torch.nn.functional.mse_loss(reconstruction, x)
        return ((reconstruction - x).square() * model.error_weight).mean()

    def informativeness() -> Tensor:
        return partial_loss(x, quantized, codes, codebook, model.code_decoders, layout)

    topo, reconstruction, partial, orthogonality = side_by_side(
        [topographic, error, informativeness, lambda: code_orthogonality(model.quantizer)],
        [x, *out.values(), model.quantizer.embedding],
    )
    return LossTerms(reconstruction, out["vq_loss"], orthogonality, partial, topo)


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
    return 1.0 - torch.lerp(post, pre, _TOPO_PRE_SHARE)
