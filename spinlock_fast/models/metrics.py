"""What a trained model is worth, measured on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.config.schema import TrainingConfig
from spinlock_fast.data.host_rows import Rows, blocks_of
from spinlock_fast.features.names import count_families
from spinlock_fast.kernels._common.guard import device_guard
from spinlock_fast.kernels.code_decoders import code_statistics, decode_codes
from spinlock_fast.kernels.ema_update import perplexity, utilization
from spinlock_fast.kernels.topo_loss import topographic_correlations
from spinlock_fast.models.losses import TOPO_PRE_SHARE, LossTerms, LossWeights, code_orthogonality
from spinlock_fast.models.outliers import spoiled, without_outliers
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE

Metrics = dict[str, Any]

TOPO_ROWS = 1024
# What `_Measured.scalars` holds, in this order.
_SCALARS = (
    "reconstruction_error",
    "utilization",
    "perplexity",
    "perplexity_over_k",
    "val_loss",
    "topo_pre",
    "topo_post",
)


class _Measured(NamedTuple):
    """Everything that metrics are made of, on the device."""

    scalars: Tensor  # [7] float64
    feature_errors: Tensor  # [F] float64, mean squared error of the reconstruction from all codes
    partial: Tensor  # [G, F] float64, mean squared error of each partial decoder and feature
    utilization: Tensor  # [G]
    perplexity: Tensor  # [G]
    active: Tensor  # codes in use
    used: Tensor  # [codes] rows of each code


def evaluate(
    model: CategoricalHierarchicalVQVAE,
    x: Rows,
    training: TrainingConfig,
    numbers: NDArray[np.int64] | None = None,
    what: str = "",
) -> Metrics:
    """Metrics of a model on rows x [N, F]; see `evaluate_with_use`."""
    return evaluate_with_use(model, x, training, numbers, what)[0]


def evaluate_with_use(
    model: CategoricalHierarchicalVQVAE,
    x: Rows,
    training: TrainingConfig,
    numbers: NDArray[np.int64] | None = None,
    what: str = "",
) -> tuple[Metrics, Tensor]:
    """Metrics of a model on rows x [N, F], in eval mode.

    Rows of which no finite error or code exists would leave NaN of every mean: they are left out, counted in
    `rows_left_out`, and a warning names them.

    Args:
        model: to be measured.
        x: [N, F] rows.
        training: weights of the loss.
        numbers: [N] of the rows in the data, for the warning; 0 .. N - 1 when not given.
        what: kind of the rows, for the warning.

    Returns:
        quality, reconstruction_error, utilization, perplexity and perplexity_over_k (means over
        codebooks), val_rows, val_loss, topo_pre, topo_post (on the first min(1024, N) rows),
        active_codes, total_codes, and categories: name, features, mse (of the category's features, decoded from all
        codes), partial_mse (the same from one codebook alone, mean over its codebooks), utilization,
        perplexity, codes and dims per level. And the rows of each code [codes], of all codebooks in order.
    """
    layout = model.quantizer.layout
    left_out: list[int] = []
    with device_guard(x.device):
        packed, found = _measured(model, x, training)
        if spoiled(float(packed[0]), packed.tolist(), x.shape):
            x, _, left_out = without_outliers(model, x, numbers, what)
            packed, found = _measured(model, x, training)
    scalars, errors, partial, used, entropy, active, rows_of_codes = packed.split([part.numel() for part in found])
    metrics = {
        **_named(scalars.tolist()),
        "val_rows": x.shape[0],
        "total_codes": layout.total_codes,
        "active_codes": int(active),
        "categories": _categories(model, errors, partial.view(layout.groups, -1), used.tolist(), entropy.tolist()),
        **({"rows_left_out": left_out} if left_out else {}),
    }
    return metrics, rows_of_codes


def _measured(model: CategoricalHierarchicalVQVAE, x: Rows, training: TrainingConfig) -> tuple[Tensor, _Measured]:
    """What `measure` gives, in one tensor of the host (one transfer, and one wait) and on the device."""
    found = measure(model, x, training)
    return torch.cat([part.flatten().to(torch.float64) for part in found]).cpu(), found


class Validation:
    """What `evaluate` gives as numbers with a fraction: what a training run records and selects by.

    The device works in `run`, whose result keeps its place: a CUDA graph can hold it where the rows are on the device.

    Args:
        model: measured as it is at each call.
        x: [N, F] rows, which stay.
        training: weights of the loss.
    """

    def __init__(self, model: CategoricalHierarchicalVQVAE, x: Rows, training: TrainingConfig) -> None:
        self.model = model
        self.x = x
        self.training = training
        self._scalars = torch.zeros(len(_SCALARS), dtype=torch.float64, device=x.device)

    def run(self) -> None:
        """Measures, and waits for nothing."""
        self._scalars.copy_(measure(self.model, self.x, self.training).scalars)

    def result(self) -> dict[str, float]:
        """What `run` found; waits for it."""
        return _named(self._scalars.tolist())


def _named(scalars: Sequence[float]) -> dict[str, float]:
    error = scalars[0]
    return {"quality": min(max(1.0 - error, 0.0), 1.0), **dict(zip(_SCALARS, scalars, strict=True))}


@torch.no_grad()
def measure(model: CategoricalHierarchicalVQVAE, x: Rows, training: TrainingConfig) -> _Measured:
    """The part of `evaluate` that the device does; no shape depends on values, and nothing waits but for rows."""
    was_training = model.training
    model.eval()
    try:
        return _measure(model, x, LossWeights.of(training))
    finally:
        model.train(was_training)


def _measure(model: CategoricalHierarchicalVQVAE, x: Rows, weights: LossWeights) -> _Measured:
    layout = model.quantizer.layout
    N, F = x.shape
    index = layout.indices(x.device)
    first = min(TOPO_ROWS, N)
    error = torch.zeros((), dtype=torch.float64, device=x.device)
    vq = torch.zeros_like(error)
    feature_errors = torch.zeros(F, dtype=torch.float64, device=x.device)
    scatter = torch.zeros(F, dtype=torch.float64, device=x.device)
    code_counts = torch.zeros(layout.groups, layout.max_codes, 1, dtype=torch.float64, device=x.device)
    code_sums = torch.zeros(layout.groups, layout.max_codes, F, dtype=torch.float64, device=x.device)
    uncoded = torch.zeros(layout.groups, dtype=torch.bool, device=x.device)
    centre = torch.zeros_like(scatter)
    seen: list[Tensor] = []
    latents: list[Tensor] = []
    codes: list[Tensor] = []
    done = 0
    for rows in blocks_of(x):
        if not done:
            centre = rows.mean(0, dtype=torch.float64)  # near that of all rows: sums of squares cancel less about it
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
        if done < first:
            seen.append(rows[: first - done])
            latents.append(out["latents"][: first - done])
            codes.append(out["tokens"][: first - done])
        done += rows.shape[0]
    codebook = model.quantizer.embedding.detach()
    pre, post = topographic_correlations(torch.cat(seen), torch.cat(latents), torch.cat(codes), codebook, layout)
    # Rows of one code have one partial reconstruction: what is left of them is their scatter about its mean.
    code_means = code_sums / code_counts.clamp(min=1.0)
    off = decode_codes(codebook, model.code_decoders, layout).double() - centre - code_means
    partial = (code_counts * (off.square() - code_means.square())).sum(1) + scatter
    partial = partial.masked_fill(uncoded[:, None], torch.nan) / N  # [G, F]
    terms = LossTerms(
        reconstruction=error / (N * F),
        vq=vq / N,
        orthogonality=code_orthogonality(model.quantizer).double(),
        informativeness=partial.mean(),
        topographic=(1.0 - torch.lerp(post, pre, TOPO_PRE_SHARE)).double(),
    )
    used = code_counts.flatten()[index.packed_codes]
    share, entropy = utilization(used, layout), perplexity(used, layout)
    scalars = {
        "reconstruction_error": terms.reconstruction,
        "utilization": share.mean(),
        "perplexity": entropy.mean(),
        "perplexity_over_k": (entropy / index.num_codes).mean(),
        "val_loss": terms.total(weights),
        "topo_pre": pre,
        "topo_post": post,
    }
    packed = torch.stack([scalars[name].double() for name in _SCALARS])
    return _Measured(packed, feature_errors / N, partial, share, entropy, (used > 0).sum(), used)


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


def complete(
    metrics: Metrics,
    model: CategoricalHierarchicalVQVAE,
    feature_names: Sequence[str],
    category_correlation_max: float,
) -> None:
    """Adds what does not depend on the rows: families, names, sizes, backend, device, versions.

    Of each category `also_reads` names the features in no category that its encoder reads.
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
    """What results are quoted with."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def versions() -> dict[str, str]:
    """Versions that determine the numbers."""
    from spinlock_fast import __version__

    return {"spinlock_fast": __version__, "torch": torch.__version__, "numpy": np.__version__}
