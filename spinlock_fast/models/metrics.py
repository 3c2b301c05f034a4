"""Metrics of a trained model on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.config.schema import TrainingConfig
from spinlock_fast.data.host_rows import Rows, row_blocks
from spinlock_fast.distributed import SINGLE, Ranks
from spinlock_fast.features.names import count_families
from spinlock_fast.kernels._common.guard import device_guard
from spinlock_fast.models.metric_sums import SCALARS, DeviceMetrics, MetricSums, metrics_of, named_scalars
from spinlock_fast.models.metric_sums import Metrics as Metrics
from spinlock_fast.models.outliers import has_unusable_values, without_outliers
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE


def evaluate(
    model: CategoricalHierarchicalVQVAE,
    x: Rows,
    training: TrainingConfig,
    numbers: NDArray[np.int64] | None = None,
    what: str = "",
    ranks: Ranks = SINGLE,
) -> Metrics:
    """Metrics of a model on rows x [N, F]; see `evaluate_with_counts`."""
    return evaluate_with_counts(model, x, training, numbers, what, ranks)[0]


def evaluate_with_counts(
    model: CategoricalHierarchicalVQVAE,
    x: Rows,
    training: TrainingConfig,
    numbers: NDArray[np.int64] | None = None,
    what: str = "",
    ranks: Ranks = SINGLE,
) -> tuple[Metrics, Tensor]:
    """Metrics of a model on rows x [N, F], in eval mode.

    Rows without a finite error or code would make every mean NaN: they are left out and listed in `rows_left_out`
    and in a warning.

    Args:
        model: the model.
        x: [N, F] normalised rows.
        training: weights of the loss terms.
        numbers: [N] numbers of the rows in the data, for the warning; 0 .. N - 1 if not given.
        what: kind of the rows, for the warning.
        ranks: if there are several, x are the rows of this rank, in order of the ranks; all receive the same metrics.

    Returns:
        quality, reconstruction_error, utilization, perplexity and perplexity_over_k (means over
        codebooks), val_rows, val_loss, topo_pre, topo_post (on the first min(1024, N) rows),
        active_codes, total_codes, and categories: name, features, mse (of the category's features, decoded from all
        codes), partial_mse (the same from one codebook alone, mean over its codebooks), utilization,
        perplexity, codes and dims per level. And the number of rows of each code [sum K].
    """
    with device_guard(x.device):
        measured, N = _measure_on_host(model, x, training, ranks)
        values = torch.cat([part.flatten() for part in measured]).tolist()
        left_out: list[int] = []
        if has_unusable_values(float(measured.scalars[0]), values, (N, x.shape[1])):
            x, _, left_out = without_outliers(model, x, numbers, what, ranks)
            measured, N = _measure_on_host(model, x, training, ranks)
    metrics = metrics_of(model, measured, N)
    return {**metrics, **({"rows_left_out": left_out} if left_out else {})}, measured.used


def _measure_on_host(
    model: CategoricalHierarchicalVQVAE, x: Rows, training: TrainingConfig, ranks: Ranks
) -> tuple[DeviceMetrics, int]:
    """The measurements in host memory, and the number of rows of all ranks."""
    first_row, total = _place_of(x, ranks)
    return measure(model, x, training, ranks, first_row, total).to_host(), total


def _place_of(x: Rows, ranks: Ranks) -> tuple[int, int]:
    """Number of this rank's first row among those of all ranks, and the number of all rows."""
    counts = ranks.gather_objects(x.shape[0])
    return sum(counts[: ranks.rank]), sum(counts)


class Validation:
    """The scalar metrics of `evaluate`, measured repeatedly during training.

    `run` writes to a tensor with a fixed address, so it can be captured in a CUDA graph if the rows are on the device.

    Args:
        model: the model, with its current weights at each call.
        x: [N, F] normalised rows, at a fixed address.
        training: weights of the loss terms.
        ranks: if there are several, x are the rows of this rank, in order of the ranks; all receive the same metrics.
    """

    def __init__(
        self, model: CategoricalHierarchicalVQVAE, x: Rows, training: TrainingConfig, ranks: Ranks = SINGLE
    ) -> None:
        self.model = model
        self.x = x
        self.training = training
        self.ranks = ranks
        self._first_row, self.total_rows = _place_of(x, ranks)
        self._scalars = torch.zeros(len(SCALARS), dtype=torch.float64, device=x.device)

    def run(self) -> None:
        """Measures, without host synchronisation; with several ranks, by one collective operation."""
        measured = measure(self.model, self.x, self.training, self.ranks, self._first_row, self.total_rows)
        self._scalars.copy_(measured.scalars)

    def result(self) -> dict[str, float]:
        """The metrics of the last `run`; synchronises with the device."""
        return named_scalars(self._scalars.tolist())


def measure(
    model: CategoricalHierarchicalVQVAE,
    x: Rows,
    training: TrainingConfig,
    ranks: Ranks = SINGLE,
    first_row: int = 0,
    total_rows: int | None = None,
) -> DeviceMetrics:
    """The measurements of `evaluate`. No shape depends on values; only rows in host memory are waited for.

    Args:
        first_row: with several ranks, the number of this rank's first row among those of all ranks.
        total_rows: with several ranks, the number of rows of all; see `MetricSums.merge`.
    """
    sums = MetricSums(model, first_row if ranks.size > 1 else None)
    for rows in row_blocks(x):
        sums.add(rows)
    sums.merge(ranks, total_rows)
    return sums.measured(training)


def add_model_metrics(
    metrics: Metrics,
    model: CategoricalHierarchicalVQVAE,
    feature_names: Sequence[str],
    category_correlation_max: float,
) -> None:
    """Adds, in place, what does not depend on the rows: families, names, sizes, backend, device, versions.

    `also_reads` of a category lists the uncategorised features that its encoder reads.
    """
    trainable, codes = model.num_parameters()
    config = model.config
    for category, (name, members) in zip(metrics["categories"], config.group_indices.items(), strict=True):
        families = category["families"] = count_families(feature_names, members)
        category["purity"] = max(families.values()) / len(members)
        category["feature_names"] = [feature_names[i] for i in members]
        category["also_reads"] = [feature_names[i] for i in config.extra_inputs.get(name, [])]
    metrics |= {
        "features": config.input_dim,
        "category_correlation_max": category_correlation_max,
        "parameters": trainable + codes,
        "trainable_parameters": trainable,
        "code_entries": codes,
        "backend": model.quantizer.backend,
        "device": device_name(model.feature_order.device),
        "versions": versions(),
    }


def device_name(device: torch.device) -> str:
    """Name of the device, as reported with results."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def versions() -> dict[str, str]:
    """Versions of the packages that determine the results."""
    from spinlock_fast import __version__

    return {"spinlock_fast": __version__, "torch": torch.__version__, "numpy": np.__version__}
