"""Metrics of the tokens of the joint search, beside those of the nearest codes."""

from __future__ import annotations

from typing import Any

import torch

from spinlock_fast.data.host_rows import Rows, row_blocks
from spinlock_fast.distributed import SINGLE, Ranks
from spinlock_fast.kernels._common.guard import device_guard
from spinlock_fast.kernels.ema_update import code_usage
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE

_PERTURBATIONS = 8  # in the metrics reported beside those of the search without


def joint_searches(model: CategoricalHierarchicalVQVAE, x: Rows, ranks: Ranks = SINGLE) -> dict[str, Any]:
    """`joint_metrics`, with those of a search with perturbations as the entry `perturbed`."""
    perturbed = joint_metrics(model, x, ranks, perturbations=_PERTURBATIONS)
    return {**joint_metrics(model, x, ranks), "perturbed": perturbed}


@torch.no_grad()
def joint_metrics(
    model: CategoricalHierarchicalVQVAE, x: Rows, ranks: Ranks = SINGLE, sweeps: int = 2, perturbations: int = 0
) -> dict[str, Any]:
    """Metrics of `model.get_tokens(x, "joint", sweeps, perturbations=perturbations)` on rows x [N, F].

    Rows without a finite error are left out.

    Args:
        ranks: if there are several, x are the rows of this rank; all return the same metrics.

    Returns:
        sweeps; perturbations; reconstruction_error (mean squared error); changed, the share of tokens that differ from
        the nearest codes; utilization, perplexity and perplexity_over_k (means over codebooks); and categories: name,
        mse of the category's features, utilization and perplexity per level.
    """
    layout, device = model.quantizer.layout, model.feature_order.device
    index = layout.indices(device)
    errors = torch.zeros(model.config.input_dim, dtype=torch.float64, device=device)
    counts = torch.zeros(layout.total_codes, dtype=torch.float64, device=device)
    changed, rows = counts.new_zeros(()), counts.new_zeros(())
    with device_guard(device):
        for block in row_blocks(x):
            nearest = model.get_tokens(block)
            coded = (nearest >= 0).all(1)
            tokens = model.get_tokens(block[coded], "joint", sweeps, perturbations=perturbations)
            squared = (model.decode_from_tokens(tokens) - block[coded]).double().square()
            used = squared.isfinite().all(1)
            errors += squared[used].sum(0)
            counts += torch.bincount((tokens[used] + index.code_offsets).flatten(), minlength=layout.total_codes)
            changed += (nearest[coded] != tokens)[used].sum()
            rows += used.sum()
        packed = ranks.sum_(torch.cat([errors, counts, changed[None], rows[None]])).cpu()
    errors, counts, (changed, rows) = packed.split([len(errors), len(counts), 2])
    errors /= rows
    utilization, perplexity = code_usage(counts, layout, backend="reference")
    categories = []
    for name, members in model.config.group_indices.items():
        books = model.category_slice(name)
        levels = {"utilization": utilization[books].tolist(), "perplexity": perplexity[books].tolist()}
        categories.append({"name": name, "mse": float(errors[members].mean()), **levels})
    return {
        "sweeps": sweeps,
        "perturbations": perturbations,
        "reconstruction_error": float(errors.mean()),
        "changed": float(changed / (rows * layout.groups)),
        "utilization": float(utilization.mean()),
        "perplexity": float(perplexity.mean()),
        "perplexity_over_k": float((perplexity / torch.tensor(layout.num_codes)).mean()),
        "categories": categories,
    }
