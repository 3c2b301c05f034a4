"""The training objective: five terms and their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from spinlock_fast.config.schema import TrainingConfig
from spinlock_fast.kernels._common.streams import defer, run_on_side_streams
from spinlock_fast.kernels._common.table_cache import TableCache
from spinlock_fast.kernels.code_decoders import partial_loss
from spinlock_fast.kernels.topo_loss import topographic_loss
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE
from spinlock_fast.quantize import GroupedVectorQuantizer

TOPO_PRE_SHARE = 0.3  # the rest is that of the second correlation


_weights: TableCache[Tensor] = TableCache(64)


def _factors(weights: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    key = (weights, dtype, device)
    return _weights.get(key, device, lambda: torch.tensor(weights, dtype=dtype, device=device))


class LossTerms(NamedTuple):
    """Unweighted terms, each a scalar."""

    reconstruction: Tensor
    vq: Tensor
    orthogonality: Tensor
    informativeness: Tensor
    topographic: Tensor

    def total(self, weights: LossWeights) -> Tensor:
        """The weighted sum; a term of weight 0 has no part in it, finite or not."""
        used, factors = self._weighted(weights)
        return torch.stack(used) @ factors if used else torch.zeros_like(self.reconstruction)

    def backward(self, weights: LossWeights) -> None:
        """The gradients of `total`, without waiting for it."""
        used, factors = self._weighted(weights)
        roots = [(term, factor) for term, factor in zip(used, factors, strict=True) if term.requires_grad]
        torch.autograd.backward([term for term, _ in roots], [factor for _, factor in roots])

    def _weighted(self, weights: LossWeights) -> tuple[list[Tensor], Tensor]:
        used = [(weight, term) for weight, term in zip(weights, self, strict=True) if weight != 0.0]
        factors = _factors(tuple(weight for weight, _ in used), self.reconstruction.dtype, self.reconstruction.device)
        return [term for _, term in used], factors


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


def loss_terms(
    model: CategoricalHierarchicalVQVAE,
    x: Tensor,
    out: dict[str, Tensor],
    topo_samples: int,
    move_codes: Callable[[], None] | None = None,
) -> LossTerms:
    """All terms of a batch.

    Args:
        x: [B, F] the features.
        out: what `model(x)` returned, or `model.to_codes(x)`: then decoding is done beside the other terms.
        topo_samples: the topographic term takes the first so many rows.
        move_codes: what `model.to_codes(x)` has left to do. Nothing waits for it before the optimizer, nor for the
            orthogonality of codes without a gradient, see `streams.defer`.
    """
    layout, codes, codebook = model.quantizer.layout, out["tokens"], out["codebook"]
    quantized = out["quantized"]
    rows = x, out["latents"], codes

    def topographic() -> Tensor:
        # A slice of all rows would be copied by its gradient.
        first_x, first_latents, first_codes = (t[:topo_samples] if topo_samples < len(t) else t for t in rows)
        return topographic_loss(first_x, first_latents, first_codes, codebook, layout, TOPO_PRE_SHARE)

    def error() -> Tensor:
        reconstruction = out["reconstruction"] if "reconstruction" in out else model.decode(quantized)
        squared = torch.nn.functional.mse_loss(reconstruction, x, reduction="none")
        if model.config.extra_inputs:
            squared = squared * model.error_weight
        # Row by row: the mean of all at once needs memory set to zero, after which a CUDA graph idles for 12 us.
        return squared.mean(1).mean()

    def informativeness() -> Tensor:
        return partial_loss(x, quantized, codes, codebook, model.code_decoders, layout)

    def orthogonality_of_moved() -> Tensor:
        if move_codes is not None:
            move_codes()
        return code_orthogonality(model.quantizer)

    inputs = [x, *out.values(), model.quantizer.embedding]
    works = [topographic, error, informativeness]
    if model.quantizer.use_ema:
        orthogonality = defer(orthogonality_of_moved, inputs)
        topo, reconstruction, partial = run_on_side_streams(works, inputs)
    else:
        topo, reconstruction, partial, orthogonality = run_on_side_streams([*works, orthogonality_of_moved], inputs)
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
