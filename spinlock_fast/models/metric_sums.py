"""Metrics of a model from sums over blocks of rows; sums of several ranks add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spinlock_fast.config.schema import TrainingConfig
from spinlock_fast.distributed import Ranks
from spinlock_fast.kernels._common.guard import device_guard
from spinlock_fast.kernels.code_decoders import code_statistics, decode_codes
from spinlock_fast.kernels.ema_update import code_usage
from spinlock_fast.kernels.topo_loss import topographic_correlations
from spinlock_fast.models.losses import TOPO_PRE_WEIGHT, LossTerms, LossWeights, code_orthogonality
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE

Metrics = dict[str, Any]

TOPO_ROWS = 1024
# Entries of `DeviceMetrics.scalars`, in this order.
SCALARS = (
    "reconstruction_error",
    "utilization",
    "perplexity",
    "perplexity_over_k",
    "val_loss",
    "topo_pre",
    "topo_post",
)


class DeviceMetrics(NamedTuple):
    """All measurements, on the device."""

    scalars: Tensor  # [7] float64
    feature_errors: Tensor  # [F] float64, mean squared error of the reconstruction from all codes
    partial: Tensor  # [G, F] float64, mean squared error of each partial decoder and feature
    utilization: Tensor  # [G]
    perplexity: Tensor  # [G]
    active: Tensor  # number of codes with at least one row
    used: Tensor  # [sum K] rows of each code

    def to_host(self) -> DeviceMetrics:
        """The same in host memory as float64, by one transfer."""
        packed = torch.cat([part.flatten().to(torch.float64) for part in self]).cpu()
        sizes = [part.numel() for part in self]
        return DeviceMetrics(*(p.view(part.shape) for p, part in zip(packed.split(sizes), self, strict=True)))


class MetricSums:
    """Sums over the rows of a data set, from which the metrics of a model follow.

    One process adds all rows and reads `metrics`. Of several ranks, each adds the rows of its share; `merge` then gives
    all of them the sums over all rows. `add` and `merge` do not synchronise with the device, unless `merge` has to read
    the number of rows.

    Args:
        model: the model, on the device of the rows. It is measured in eval mode; its mode is restored.
        first_row: with several ranks, the number of this rank's first row among the rows of all ranks: the topographic
            correlations are those of rows 0 .. 1,023.
    """

    def __init__(self, model: CategoricalHierarchicalVQVAE, first_row: int | None = None) -> None:
        layout, device, F = model.quantizer.layout, model.feature_order.device, model.config.input_dim
        self.model = model
        self.rows = 0  # added, of all ranks after `merge`
        self._first_row = first_row or 0

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        # Subtracting a centre from the rows reduces cancellation in sums of squares. Ranks need the same one: the mean
        # of normalised features is near 0, and float64 leaves enough digits if it is not.
        self._centre: Tensor | None = None if first_row is None else zeros(F)
        self._sums = {
            "error": zeros(),
            "vq": zeros(),
            "feature_errors": zeros(F),
            "scatter": zeros(F),
            "code_counts": zeros(layout.groups, layout.max_codes, 1),
            "code_sums": zeros(layout.groups, layout.max_codes, F),
            "uncoded": zeros(layout.groups),
        }
        self._sample: list[tuple[Tensor, Tensor, Tensor]] = []  # rows, latents and codes of the topographic sample

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Adds a block of rows [B, F]; B may be 0."""
        if not len(rows):
            return
        was_training = self.model.training
        self.model.eval()
        try:
            with device_guard(rows.device):
                self._add(rows)
        finally:
            self.model.train(was_training)

    def _add(self, rows: Tensor) -> None:
        sums = self._sums
        if self._centre is None:
            self._centre = rows.mean(0, dtype=torch.float64)
        out = self.model(rows)
        squared = (out["reconstruction"] - rows).square()
        sums["error"] += squared.sum(dtype=torch.float64)
        sums["feature_errors"] += squared.sum(0, dtype=torch.float64)
        sums["vq"] += out["vq_loss"].double() * rows.shape[0]
        centred = rows.double() - self._centre
        counts, code_sums = code_statistics(centred, out["tokens"], self.model.quantizer.layout)
        sums["code_counts"] += counts
        sums["code_sums"] += code_sums
        sums["scatter"] += centred.square_().sum(0)
        sums["uncoded"] += (out["tokens"] < 0).any(0)
        remaining = TOPO_ROWS - self._first_row - self.rows
        if remaining > 0:
            self._sample.append((rows[:remaining], out["latents"][:remaining], out["tokens"][:remaining]))
        self.rows += rows.shape[0]

    @torch.no_grad()
    def merge(self, ranks: Ranks, total_rows: int | None = None) -> None:
        """Replaces the sums by those over all ranks, which are equal bit by bit on each; one collective operation.

        Args:
            ranks: all of them call this once, after their last `add`.
            total_rows: rows of all ranks; None reads the number from the device.
        """
        if ranks.size == 1:
            return
        sampled = min(TOPO_ROWS, TOPO_ROWS if total_rows is None else total_rows)
        parts = [*self._sums.values(), *self._placed_sample(sampled)]
        count = parts[0].new_full((1,), self.rows)
        packed = ranks.sum_(torch.cat([part.double().flatten() for part in [*parts, count]]))
        self.rows = int(packed[-1]) if total_rows is None else total_rows
        merged = [
            flat.view(part.shape).to(part.dtype)
            for flat, part in zip(packed[:-1].split([part.numel() for part in parts]), parts, strict=True)
        ]
        rows, latents, codes = (part[: self.rows] for part in merged[len(self._sums) :])
        self._sums = dict(zip(self._sums, merged, strict=False))
        self._sample = [(rows, latents, codes)]

    def _placed_sample(self, count: int) -> list[Tensor]:
        """The topographic sample of `count` rows of all ranks, with zeros for the rows of the others."""
        layout = self.model.quantizer.layout
        placed = [
            torch.zeros(count, width, dtype=dtype, device=self.model.feature_order.device)
            for width, dtype in (
                (self.model.config.input_dim, torch.float32),
                (layout.total_dims, torch.float32),
                (layout.groups, torch.int64),
            )
        ]
        start = self._first_row
        for block in self._sample:
            for target, part in zip(placed, block, strict=True):
                target[start : start + len(part)] = part
            start += len(block[0])
        return placed

    @torch.no_grad()
    def measured(self, training: TrainingConfig) -> DeviceMetrics:
        """The metrics on the device, without synchronisation.

        Args:
            training: weights of the loss terms.
        """
        with device_guard(self.model.feature_order.device):
            return self._measured(LossWeights.of(training))

    def _measured(self, weights: LossWeights) -> DeviceMetrics:
        model, sums, N, F = self.model, self._sums, self.rows, self.model.config.input_dim
        layout = model.quantizer.layout
        codebook = model.quantizer.embedding.detach()
        index = layout.indices(codebook.device)
        assert self._centre is not None, "no rows"
        code_counts, code_sums = sums["code_counts"], sums["code_sums"]
        rows, latents, codes = (torch.cat(parts) for parts in zip(*self._sample, strict=True))
        pre, post = topographic_correlations(rows, latents, codes, codebook, layout)
        # All rows of a code share a partial reconstruction, so its error follows from the mean and scatter of the rows.
        code_means = code_sums / code_counts.clamp(min=1.0)
        residual = decode_codes(codebook, model.code_decoders, layout).double() - self._centre - code_means
        partial = (code_counts * (residual.square() - code_means.square())).sum(1) + sums["scatter"]
        partial = partial.masked_fill((sums["uncoded"] > 0)[:, None], torch.nan) / N  # [G, F]
        terms = LossTerms(
            reconstruction=sums["error"] / (N * F),
            vq=sums["vq"] / N,
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
        packed = torch.stack([scalars[name].double() for name in SCALARS])
        errors = sums["feature_errors"] / N
        return DeviceMetrics(packed, errors, partial, utilization, perplexity, (used > 0).sum(), used)

    def metrics(self, training: TrainingConfig) -> Metrics:
        """The metrics of the added rows, as returned by `metrics.evaluate`; synchronises with the device.

        Args:
            training: weights of the loss terms.
        """
        return metrics_of(self.model, self.measured(training).to_host(), self.rows)


def metrics_of(model: CategoricalHierarchicalVQVAE, measured: DeviceMetrics, rows: int) -> Metrics:
    """The dictionary of metrics, from measurements of a number of rows in host memory."""
    return {
        **named_scalars(measured.scalars.tolist()),
        "val_rows": rows,
        "total_codes": model.quantizer.layout.total_codes,
        "active_codes": int(measured.active),
        "categories": _categories(model, measured),
    }


def named_scalars(scalars: Sequence[float]) -> dict[str, float]:
    """Quality and the entries of `DeviceMetrics.scalars` by name."""
    error = scalars[0]
    return {"quality": min(max(1.0 - error, 0.0), 1.0), **dict(zip(SCALARS, scalars, strict=True))}


def _categories(model: CategoricalHierarchicalVQVAE, measured: DeviceMetrics) -> list[Metrics]:
    rows = []
    for name, members in model.config.group_indices.items():
        books = model.category_slice(name)
        levels = model.levels[name]
        rows.append(
            {
                "name": name,
                "features": len(members),
                "mse": float(measured.feature_errors[members].mean()),
                "partial_mse": float(measured.partial[books][:, members].mean()),
                "utilization": measured.utilization.tolist()[books],
                "perplexity": measured.perplexity.tolist()[books],
                "codes": [level.num_tokens for level in levels],
                "dims": [level.latent_dim for level in levels],
            }
        )
    return rows
