"""What a trained model is worth, measured on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spinlock_fast.config import TrainingConfig
from spinlock_fast.features.names import count_families
from spinlock_fast.kernels.code_decoders import code_statistics, decode_codes
from spinlock_fast.kernels.ema_update import perplexity, utilization
from spinlock_fast.kernels.topo_loss import topographic_correlations
from spinlock_fast.losses import LossTerms, LossWeights, code_orthogonality, topographic_loss
from spinlock_fast.model import CategoricalHierarchicalVQVAE

Metrics = dict[str, Any]

TOPO_ROWS = 1024
_ROWS_AT_ONCE = 1024


@torch.no_grad()
def evaluate(model: CategoricalHierarchicalVQVAE, x: Tensor, training: TrainingConfig) -> Metrics:
    """Metrics of a model on rows x [N, F], all of them, in eval mode.

    Returns:
        quality, reconstruction_error, utilization, perplexity and perplexity_over_k (means over
        codebooks), val_rows, val_loss, topo_pre, topo_post (on the first min(1024, N) rows),
        active_codes, total_codes, and categories: name, features, partial_mse, utilization,
        perplexity, codes and dims per level.
    """
    was_training = model.training
    model.eval()
    try:
        return _evaluate(model, x, training)
    finally:
        model.train(was_training)


def _evaluate(model: CategoricalHierarchicalVQVAE, x: Tensor, training: TrainingConfig) -> Metrics:
    layout = model.quantizer.layout
    N, F = x.shape
    index = layout.indices(x.device)
    error = torch.zeros((), dtype=torch.float64, device=x.device)
    vq = torch.zeros_like(error)
    code_counts = torch.zeros(layout.groups, layout.max_codes, 1, dtype=torch.float64, device=x.device)
    code_sums = torch.zeros(layout.groups, layout.max_codes, F, dtype=torch.float64, device=x.device)
    centre = x.double().mean(0)  # sums of squares cancel less about it
    latents: list[Tensor] = []
    tokens: list[Tensor] = []
    for rows in x.split(_ROWS_AT_ONCE):
        out = model(rows)
        error += (out["reconstruction"] - rows).square().sum(dtype=torch.float64)
        vq += out["vq_loss"].double() * rows.shape[0]
        counts, sums = code_statistics(rows.double() - centre, out["tokens"], layout)
        code_counts += counts
        code_sums += sums
        tokens.append(out["tokens"])
        if len(latents) * _ROWS_AT_ONCE < TOPO_ROWS:
            latents.append(out["latents"])
    first = slice(0, min(TOPO_ROWS, N))
    codebook = model.quantizer.embedding.detach()
    codes = torch.cat(tokens)
    pre, post = topographic_correlations(x[first], torch.cat(latents)[first], codes[first], codebook, layout)
    # Rows of one code have one partial reconstruction: what is left of them is their scatter about its mean.
    code_means = code_sums / code_counts.clamp(min=1.0)
    off = decode_codes(codebook, model.code_decoders, layout).double() - centre - code_means
    partial = (code_counts * (off.square() - code_means.square())).sum(1) + (x.double() - centre).square().sum(0)
    partial = partial.masked_fill((codes < 0).any(0)[:, None], torch.nan)  # [G, F]
    terms = LossTerms(
        reconstruction=error / (N * F),
        vq=vq / N,
        orthogonality=code_orthogonality(model.quantizer).double(),
        informativeness=partial.sum() / (layout.groups * N * F),
        topographic=topographic_loss(pre, post).double(),
    )
    counts = code_counts.flatten()[index.packed_codes]
    used = utilization(counts, layout)
    entropy = perplexity(counts, layout)
    sizes = torch.tensor([float(k) for k in layout.num_codes], device=x.device)
    reconstruction_error = float(terms.reconstruction)
    return {
        "quality": min(max(1.0 - reconstruction_error, 0.0), 1.0),
        "reconstruction_error": reconstruction_error,
        "utilization": float(used.mean()),
        "perplexity": float(entropy.mean()),
        "perplexity_over_k": float((entropy / sizes).mean()),
        "val_rows": N,
        "val_loss": float(terms.total(LossWeights.of(training))),
        "topo_pre": float(pre),
        "topo_post": float(post),
        "total_codes": layout.total_codes,
        "active_codes": int((counts > 0).sum()),
        "categories": _categories(model, partial / N, used.tolist(), entropy.tolist()),
    }


def _categories(
    model: CategoricalHierarchicalVQVAE, partial: Tensor, used: Sequence[float], entropy: Sequence[float]
) -> list[Metrics]:
    rows = []
    for name, members in model.config.group_indices.items():
        books = model.category_slice(name)
        levels = model.levels[name]
        rows.append(
            {
                "name": name,
                "features": len(members),
                "partial_mse": float(partial[books][:, members].mean()),
                "utilization": list(used[books]),
                "perplexity": list(entropy[books]),
                "codes": [level.num_tokens for level in levels],
                "dims": [level.latent_dim for level in levels],
            }
        )
    return rows


def complete(
    metrics: Metrics,
    model: CategoricalHierarchicalVQVAE,
    feature_names: Sequence[str],
    category_correlation_max: float,
) -> None:
    """Adds what does not depend on the rows: families, names, sizes, backend, device, versions."""
    trainable, codes = model.num_parameters()
    for category, members in zip(metrics["categories"], model.config.group_indices.values(), strict=True):
        families = category["families"] = count_families(feature_names, members)
        category["purity"] = max(families.values()) / len(members)
        category["feature_names"] = [feature_names[i] for i in members]
    metrics |= {
        "category_correlation_max": category_correlation_max,
        "parameters": trainable + codes,
        "trainable_parameters": trainable,
        "code_entries": codes,
        "backend": model.quantizer.backend,
        "device": device_name(model.feature_order.device),
        "versions": versions(),
    }


def device_name(device: torch.device) -> str:
    """What results are quoted with."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def versions() -> dict[str, str]:
    """Versions that determine the numbers."""
    from spinlock_fast import __version__

    return {"spinlock_fast": __version__, "torch": torch.__version__, "numpy": np.__version__}
