"""metrics.json of a converted checkpoint: its sizes, and what its training file, where given, lets us measure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spinlock_fast.config.schema import TrainingConfig
from spinlock_fast.data.host_rows import place_rows
from spinlock_fast.data.row_view import RowView
from spinlock_fast.features.categories import category_correlation, max_off_diagonal
from spinlock_fast.models.metrics import Metrics, add_model_metrics, evaluate
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE


def converted_metrics(
    model: CategoricalHierarchicalVQVAE,
    training: TrainingConfig,
    feature_names: Sequence[str],
    epoch: int,
    x: NDArray[np.float32] | None,
) -> Metrics:
    """Metrics of a converted model.

    Args:
        training: weights of the loss.
        feature_names: [F].
        epoch: of the original run.
        x: [N, F] cleaned, normalised rows of the training file; None: nothing is measured.

    Returns:
        Entries of `metrics.evaluate` on all rows where x is given, sizes of the model otherwise; and `converted_epoch`.
    """
    if x is None:
        metrics: Metrics = {"total_codes": model.quantizer.layout.total_codes, "categories": _sizes(model)}
        add_model_metrics(metrics, model, feature_names, 0.0)
        del metrics["category_correlation_max"]
    else:
        metrics = evaluate(model, place_rows(RowView(x), model.feature_order.device), training)
        correlation = max_off_diagonal(category_correlation(x, model.config.group_indices))
        add_model_metrics(metrics, model, feature_names, correlation)
        metrics |= {"samples": len(x), "rows": "all"}
    return metrics | {"converted_epoch": epoch}


def _sizes(model: CategoricalHierarchicalVQVAE) -> list[Metrics]:
    return [
        {
            "name": name,
            "features": len(members),
            "codes": [level.num_tokens for level in model.levels[name]],
            "dims": [level.latent_dim for level in model.levels[name]],
        }
        for name, members in model.config.group_indices.items()
    ]
