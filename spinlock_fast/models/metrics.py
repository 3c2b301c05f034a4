"""Metrics of a trained model on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.config.schema import TrainingConfig
from spinlock_fast.data.host_rows import Rows, row_blocks
from spinlock_fast.features.names import count_families
from spinlock_fast.kernels._common.guard import device_guard
from spinlock_fast.kernels.code_decoders import code_statistics, decode_codes
from spinlock_fast.kernels.ema_update import code_usage
from spinlock_fast.kernels.topo_loss import topographic_correlations
from spinlock_fast.models.losses import TOPO_PRE_WEIGHT, LossTerms, LossWeights, code_orthogonality
from spinlock_fast.models.outliers import has_unusable_values, without_outliers
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE

Metrics = dict[str, Any]

TOPO_ROWS = 1024
# Entries of `_DeviceMetrics.scalars`, in this order.
_SCALARS = (
    "reconstruction_error",
    "utilization",
    "perplexity",
    "perplexity_over_k",
    "val_loss",
    "topo_pre",
    "topo_post",
)


class _DeviceMetrics(NamedTuple):
    """All measurements, on the device."""

    scalars: Tensor  # [7] float64
    feature_errors: Tensor  # [F] float64, mean squared error of the reconstruction from all codes
    partial: Tensor  # [G, F] float64, mean squared error of each partial decoder and feature
    utilization: Tensor  # [G]
    perplexity: Tensor  # [G]
    active: Tensor  # number of codes with at least one row
    used: Tensor  # [sum K] rows of each code


def evaluate(
    model: CategoricalHierarchicalVQVAE,
    x: Rows,
    training: TrainingConfig,
    numbers: NDArray[np.int64] | None = None,
    what: str = "",
) -> Metrics:
    """Metrics of a model on rows x [N, F]; see `evaluate_with_counts`."""
    return evaluate_with_counts(model, x, training, numbers, what)[0]


def evaluate_with_counts(
    model: CategoricalHierarchicalVQVAE,
    x: Rows,
    training: TrainingConfig,
    numbers: NDArray[np.int64] | None = None,
    what: str = "",
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

    Returns:
        quality, reconstruction_error, utilization, perplexity and perplexity_over_k (means over
        codebooks), val_rows, val_loss, topo_pre, topo_post (on the first min(1024, N) rows),
        active_codes, total_codes, and categories: name, features, mse (of the category's features, decoded from all
        codes), partial_mse (the same from one codebook alone, mean over its codebooks), utilization,
        perplexity, codes and dims per level. And the number of rows of each code [sum K].
    """
    layout = model.quantizer.layout
    left_out: list[int] = []
    with device_guard(x.device):
        packed, measured = _measure_to_host(model, x, training)
        if has_unusable_values(float(packed[0]), packed.tolist(), x.shape):
            x, _, left_out = without_outliers(model, x, numbers, what)
            packed, measured = _measure_to_host(model, x, training)
    scalars, errors, partial, used, entropy, active, rows_of_codes = packed.split([part.numel() for part in measured])
    metrics = {
        **_named_scalars(scalars.tolist()),
        "val_rows": x.shape[0],
        "total_codes": layout.total_codes,
        "active_codes": int(active),
        "categories": _categories(model, errors, partial.view(layout.groups, -1), used.tolist(), entropy.tolist()),
        **({"rows_left_out": left_out} if left_out else {}),
    }
    return metrics, rows_of_codes


def _measure_to_host(
    model: CategoricalHierarchicalVQVAE, x: Rows, training: TrainingConfig
) -> tuple[Tensor, _DeviceMetrics]:
    """The result of `measure`, packed into one host tensor (one transfer and synchronisation), and on the device."""
    measured = measure(model, x, training)
    return torch.cat([part.flatten().to(torch.float64) for part in measured]).cpu(), measured


class Validation:
    """The scalar metrics of `evaluate`, measured repeatedly during training.

    `run` writes to a tensor with a fixed address, so it can be captured in a CUDA graph if the rows are on the device.

    Args:
        model: the model, with its current weights at each call.
        x: [N, F] normalised rows, at a fixed address.
        training: weights of the loss terms.
    """

    def __init__(self, model: CategoricalHierarchicalVQVAE, x: Rows, training: TrainingConfig) -> None:
        self.model = model
        self.x = x
        self.training = training
        self._scalars = torch.zeros(len(_SCALARS), dtype=torch.float64, device=x.device)

    def run(self) -> None:
        """Measures, without host synchronisation."""
        self._scalars.copy_(measure(self.model, self.x, self.training).scalars)

    def result(self) -> dict[str, float]:
        """The metrics of the last `run`; synchronises with the device."""
        return _named_scalars(self._scalars.tolist())


def _named_scalars(scalars: Sequence[float]) -> dict[str, float]:
    error = scalars[0]
    return {"quality": min(max(1.0 - error, 0.0), 1.0), **dict(zip(_SCALARS, scalars, strict=True))}


@torch.no_grad()
def measure(model: CategoricalHierarchicalVQVAE, x: Rows, training: TrainingConfig) -> _DeviceMetrics:
    """The measurements of `evaluate`. No shape depends on values; only rows in host memory are waited for."""
    was_training = model.training
    model.eval()
    try:
        return _measure(model, x, LossWeights.of(training))
    finally:
        model.train(was_training)


def _measure(model: CategoricalHierarchicalVQVAE, x: Rows, weights: LossWeights) -> _DeviceMetrics:
    layout = model.quantizer.layout
    N, F = x.shape
    index = layout.indices(x.device)
    topo_count = min(TOPO_ROWS, N)
    error = torch.zeros((), dtype=torch.float64, device=x.device)
    vq = torch.zeros_like(error)
    feature_errors = torch.zeros(F, dtype=torch.float64, device=x.device)
    scatter = torch.zeros(F, dtype=torch.float64, device=x.device)
    code_counts = torch.zeros(layout.groups, layout.max_codes, 1, dtype=torch.float64, device=x.device)
    code_sums = torch.zeros(layout.groups, layout.max_codes, F, dtype=torch.float64, device=x.device)
    uncoded = torch.zeros(layout.groups, dtype=torch.bool, device=x.device)
    centre = torch.zeros_like(scatter)
    topo_rows: list[Tensor] = []
    latents: list[Tensor] = []
    codes: list[Tensor] = []
    done = 0
    for rows in row_blocks(x):
        if not done:
            centre = rows.mean(0, dtype=torch.float64)  # shifts sums of squares, which reduces cancellation
        out = model(rows)
        squared = (out["reconstruction"] - rows).square()
        error += squared.sum(dtype=torch.float64)
        feature_errors += squared.sum(0, dtype=torch.float64)
        vq += out["vq_loss"].double() * rows.shape[0]
        centred = rows.double() - centre
        counts, sums = code_statistics(centred, out["tokens"], layout)
        code_counts += counts
        code_sums += sums
        scatter += centred.square_().sum(0)
        uncoded |= (out["tokens"] < 0).any(0)
        if done < topo_count:
            topo_rows.append(rows[: topo_count - done])
            latents.append(out["latents"][: topo_count - done])
            codes.append(out["tokens"][: topo_count - done])
        done += rows.shape[0]
    codebook = model.quantizer.embedding.detach()
    pre, post = topographic_correlations(torch.cat(topo_rows), torch.cat(latents), torch.cat(codes), codebook, layout)
    # All rows of a code share a partial reconstruction, so its error follows from the mean and scatter of the rows.
    code_means = code_sums / code_counts.clamp(min=1.0)
    residual = decode_codes(codebook, model.code_decoders, layout).double() - centre - code_means
    partial = (code_counts * (residual.square() - code_means.square())).sum(1) + scatter
    partial = partial.masked_fill(uncoded[:, None], torch.nan) / N  # [G, F]
    terms = LossTerms(
        reconstruction=error / (N * F),
        vq=vq / N,
        orthogonality=code_orthogonality(model.quantizer).double(),
        informativeness=partial.mean(),
        topographic=(1.0 - torch.lerp(post, pre, TOPO_PRE_WEIGHT)).double(),
    )
    used = code_counts.flatten()[index.packed_codes]
    # The reference computes in float64 on every device.
    utilization, perplexity = code_usage(used, layout, backend="reference")
    scalars = {
        "reconstruction_error": terms.reconstruction,
        "utilization": utilization.mean(),
        "perplexity": perplexity.mean(),
        "perplexity_over_k": (perplexity / index.num_codes).mean(),
        "val_loss": terms.total(weights),
        "topo_pre": pre,
        "topo_post": post,
    }
    packed = torch.stack([scalars[name].double() for name in _SCALARS])
    return _DeviceMetrics(packed, feature_errors / N, partial, utilization, perplexity, (used > 0).sum(), used)


def _categories(
    model: CategoricalHierarchicalVQVAE,
    feature_errors: Tensor,
    partial: Tensor,
    used: Sequence[float],
    entropy: Sequence[float],
) -> list[Metrics]:
    rows = []
    for name, members in model.config.group_indices.items():
        books = model.category_slice(name)
        levels = model.levels[name]
        rows.append(
            {
                "name": name,
                "features": len(members),
                "mse": float(feature_errors[members].mean()),
                "partial_mse": float(partial[books][:, members].mean()),
                "utilization": list(used[books]),
                "perplexity": list(entropy[books]),
                "codes": [level.num_tokens for level in levels],
                "dims": [level.latent_dim for level in levels],
            }
        )
    return rows


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
