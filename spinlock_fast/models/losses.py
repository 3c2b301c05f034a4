"""The training loss: five terms and their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from spinlock_fast.config.schema import TrainingConfig
from spinlock_fast.kernels._common.dropout import BatchSlice
from spinlock_fast.kernels._common.streams import defer, run_on_side_streams
from spinlock_fast.kernels._common.table_cache import TableCache
from spinlock_fast.kernels.code_cosines import mean_squared_cosine
from spinlock_fast.kernels.code_decoders import partial_loss
from spinlock_fast.kernels.topo_loss import topographic_loss
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE
from spinlock_fast.quantize import GroupedVectorQuantizer

# Weight of the correlation of distances between features and latents; the rest is that of latents and codes.
TOPO_PRE_WEIGHT = 0.3

GatherRows = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

_weight_tensors: TableCache[Tensor] = TableCache(64)


def _weight_tensor(weights: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    key = (weights, dtype, device)
    return _weight_tensors.get(key, device, lambda: torch.tensor(weights, dtype=dtype, device=device))


class LossTerms(NamedTuple):
    """Unweighted loss terms, each a scalar."""

    reconstruction: Tensor
    vq: Tensor
    orthogonality: Tensor
    informativeness: Tensor
    topographic: Tensor

    def total(self, weights: LossWeights) -> Tensor:
        """The weighted sum. Terms of weight 0 are left out, so they need not be finite."""
        terms, factors = self._weighted(weights)
        return torch.stack(terms) @ factors if terms else torch.zeros_like(self.reconstruction)

    def backward(self, weights: LossWeights) -> None:
        """Backpropagates `total` from each term, without computing the sum."""
        terms, factors = self._weighted(weights)
        roots = [(term, factor) for term, factor in zip(terms, factors, strict=True) if term.requires_grad]
        torch.autograd.backward([term for term, _ in roots], [factor for _, factor in roots])

    def _weighted(self, weights: LossWeights) -> tuple[list[Tensor], Tensor]:
        """Terms with a weight, and their weights [terms]."""
        pairs = [(weight, term) for weight, term in zip(weights, self, strict=True) if weight != 0.0]
        weight_values, like = tuple(weight for weight, _ in pairs), self.reconstruction
        return [term for _, term in pairs], _weight_tensor(weight_values, like.dtype, like.device)


class LossWeights(NamedTuple):
    """Weights of `LossTerms`."""

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
    apply_ema: Callable[[], None] | None = None,
    batch: BatchSlice | None = None,
    gather: GatherRows | None = None,
) -> LossTerms:
    """The loss terms of a batch.

    Independent terms run on side streams of a CUDA device. The code update and the orthogonality of codes without a
    gradient are deferred: only the optimizer waits for them, see `streams.defer`.

    Args:
        x: [B, F] reconstruction targets.
        out: the outputs of `model(x)`, or of `model.encode_and_quantize(x)`, in which case the decoder runs here.
        topo_samples: number of leading rows that enter the topographic term.
        apply_ema: the code update returned by `model.encode_and_quantize(x)`.
        batch: position of the rows in a batch that several ranks share.
        gather: gives the rows of the topographic term from all ranks; x, latents and codes to the same of the sample.
    """
    layout, codes, codebook = model.quantizer.layout, out["tokens"], out["codebook"]
    quantized = out["quantized"]
    rows = x, out["latents"], codes

    def topographic() -> Tensor:
        # Slicing all rows would add a copy to the backward pass.
        if gather is not None:
            first_x, first_latents, first_codes = gather(*rows)
        else:
            first_x, first_latents, first_codes = (t[:topo_samples] if topo_samples < len(t) else t for t in rows)
        return topographic_loss(first_x, first_latents, first_codes, codebook, layout, TOPO_PRE_WEIGHT)

    def reconstruction_error() -> Tensor:
        reconstruction = out["reconstruction"] if "reconstruction" in out else model.decode(quantized, batch)
        squared = torch.nn.functional.mse_loss(reconstruction, x, reduction="none")
        if model.config.extra_inputs:
            squared = squared * model.error_weight
        # Mean by rows first: a full reduction zeroes a buffer, after which a CUDA graph idles for 12 us.
        return squared.mean(1).mean()

    def informativeness() -> Tensor:
        return partial_loss(x, quantized, codes, codebook, model.code_decoders, layout)

    def orthogonality_after_update() -> Tensor:
        if apply_ema is not None:
            apply_ema()
        return code_orthogonality(model.quantizer)

    inputs = [x, *out.values(), model.quantizer.embedding]
    works = [topographic, reconstruction_error, informativeness]
    if model.quantizer.use_ema:
        orthogonality = defer(orthogonality_after_update, inputs)
        topo, reconstruction, partial = run_on_side_streams(works, inputs)
    else:
        topo, reconstruction, partial, orthogonality = run_on_side_streams([*works, orthogonality_after_update], inputs)
    return LossTerms(reconstruction, out["vq_loss"], orthogonality, partial, topo)


def code_orthogonality(quantizer: GroupedVectorQuantizer) -> Tensor:
    """Mean over codebooks of the mean squared cosine similarity between distinct codes; a scalar.

    Codes updated by moving average are buffers, so the term has no gradient then. A codebook of one code counts as 0.
    """
    return mean_squared_cosine(quantizer.embedding, quantizer.layout)
