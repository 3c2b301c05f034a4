"""The training objective: five terms and their weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spinlock_fast.config import TrainingConfig
from spinlock_fast.kernels.layout import CodebookLayout
from spinlock_fast.kernels.vq_assign import quantize
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
    partial = model.partial_reconstructions(out["quantized"])  # [G, B, F]
    rows = slice(0, topo_samples)
    pre, post = topographic_correlations(
        x[rows], out["latents"][rows], out["quantized"][rows].detach(), model.quantizer.layout
    )
    return LossTerms(
        reconstruction=(out["reconstruction"] - x).square().mean(),
        vq=out["vq_loss"],
        orthogonality=code_orthogonality(model.quantizer),
        informativeness=(partial - x).square().mean(),
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


def pairwise_distances(points: Tensor) -> Tensor:
    """Euclidean distances [G, S, S] between the rows of [G, S, D]; differentiable, with gradient 0 at distance 0.

    Uses |a|^2 + |b|^2 - 2 a.b on centred points. What is below the rounding error of that sum counts
    as distance 0.
    """
    points = points - points.mean(1, keepdim=True)
    norms = points.square().sum(-1)
    both = norms[:, :, None] + norms[:, None, :]
    square = torch.baddbmm(both, points, points.transpose(1, 2), alpha=-2.0)
    rounding = (8.0 + points.shape[-1] ** 0.5) * torch.finfo(points.dtype).eps
    distances: Tensor = _RootAbove.apply(square, rounding * both.detach())  # type: ignore[no-untyped-call]
    return distances


class _RootAbove(torch.autograd.Function):
    """sqrt(square) where it is above a floor, else 0 with gradient 0; a third of the passes of `torch.where`."""

    @staticmethod
    def forward(ctx: Any, square: Tensor, floor: Tensor) -> Tensor:
        root = square.sqrt().masked_fill_(square <= floor, 0.0)
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (root,) = ctx.saved_tensors
        return (0.5 * grads[0]).div_(root).masked_fill_(root == 0.0, 0.0), None


def pair_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of two distance matrices [S, S] over the pairs i < j; 0 where one is constant."""
    S = a.shape[0]
    off_diagonal = 1.0 - torch.eye(S, dtype=a.dtype, device=a.device)
    pairs = max(S * (S - 1), 1)
    a, a_variance, a_varies = _centred(a, off_diagonal, pairs)
    b, b_variance, b_varies = _centred(b, off_diagonal, pairs)
    both = a_varies & b_varies
    norm = torch.where(both, a_variance, 1.0).sqrt() * torch.where(both, b_variance, 1.0).sqrt()
    return torch.where(both, (a * b).sum() / pairs / norm, 0.0)


def _centred(values: Tensor, off_diagonal: Tensor, pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values without their mean, their variance, and whether it is more than rounding."""
    mean = (values * off_diagonal).sum() / pairs
    centred = (values - mean) * off_diagonal
    variance = centred.square().sum() / pairs
    rounding = (16.0 * torch.finfo(values.dtype).eps * mean.detach()).square()
    return centred, variance, variance > rounding.clamp(min=torch.finfo(values.dtype).tiny)


def topographic_correlations(
    x: Tensor, latents: Tensor, quantized: Tensor, layout: CodebookLayout
) -> tuple[Tensor, Tensor]:
    """How well distances survive encoding and quantization.

    Args:
        x: [S, F] features.
        latents: [S, sum D].
        quantized: [S, sum D] codes of the latents; their distances pass the gradient straight
            through to the latents.

    Returns:
        corr(d_x, d_z) and corr(d_z, d_e), where d_x are distances of features and d_z, d_e the means
        over codebooks of distances of latents and of codes.
    """
    d_x = pairwise_distances(x.detach()[None])[0]
    d_z = pairwise_distances(layout.pad_columns(latents)).mean(0)
    d_e = pairwise_distances(layout.pad_columns(quantize(latents, quantized, layout))).mean(0)
    return pair_correlation(d_x, d_z), pair_correlation(d_z, d_e)


def topographic_loss(pre: Tensor, post: Tensor) -> Tensor:
    """0.3 (1 - pre) + 0.7 (1 - post)."""
    return _TOPO_PRE_SHARE * (1.0 - pre) + _TOPO_POST_SHARE * (1.0 - post)
