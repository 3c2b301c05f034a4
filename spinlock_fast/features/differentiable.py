"""Raw families to normalised features, differentiable: the encoders, cleaning and normalisation of a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, Self

import torch
from torch import Tensor, nn

from spinlock_fast.config.schema import DEFAULT_DATASETS
from spinlock_fast.descriptors.registry import aggregated_names, temporal_names
from spinlock_fast.errors import DataError
from spinlock_fast.features.cleaning import FeatureCleaner
from spinlock_fast.features.encode import ANY_LENGTH, STANDARDIZE_CLIP, FamilyEncoder
from spinlock_fast.features.encoders import IdentityEncoder
from spinlock_fast.features.normalize import Normalizer
from spinlock_fast.features.statistics_encoder import STATISTICS, StatisticsEncoder

_UNKNOWN_LENGTH = 8  # states of a family of any length that is missing


class _InwardClamp(torch.autograd.Function):
    """clamp(x, low, high); a value outside keeps the gradient that leads back to the bounds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(x < low, x > high)
        return torch.minimum(torch.maximum(x, low), high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        below, above = ctx.saved_tensors
        grad = grads[0]
        # Descent increases a value whose gradient is negative.
        outward = (below & (grad > 0.0)) | (above & (grad < 0.0))
        return grad.masked_fill(outward, 0.0), None, None


def inward_clamp(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """clamp(x, low, high). Its gradient is one within the bounds.

    The gradient of `torch.clamp` is zero outside, where a prediction needs it most. Here gradient descent may move a
    value outside back to the bounds, and no further away.
    """
    return _InwardClamp.apply(x, low, high)  # type: ignore[no-any-return,no-untyped-call]


class DifferentiableFeatures(nn.Module):
    """{family: [N, ...]} -> cleaned, normalised features [N, F], as `Tokenizer.features`, with gradients.

    A frozen copy: without parameters that are trained, and always in eval mode. Missing values (NaN) are replaced as in
    `Tokenizer.features`, and have no gradient.

    Args:
        families: encoders, in the order of the columns.
        cleaner: which columns are kept, and their bounds; outside of the bounds see `inward_clamp`.
        normalizer: centre and scale of each feature.
    """

    anchor: Tensor

    def __init__(self, families: Sequence[FamilyEncoder], cleaner: FeatureCleaner, normalizer: Normalizer) -> None:
        super().__init__()
        self.families = {family.name: _FrozenFamily(family) for family in families}
        self.encoders = nn.ModuleList([family.encoder for family in self.families.values()])
        self.register_buffer("anchor", torch.zeros(()), persistent=False)  # has the device and the type
        self._keep = torch.from_numpy(cleaner.keep.nonzero()[0])
        self._bounds = torch.from_numpy(cleaner.low), torch.from_numpy(cleaner.high)
        self._normalization = torch.from_numpy(normalizer.center), torch.from_numpy(normalizer.scale)
        self.train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Constants stay float64, as the tokenizer has them.
        device = self.anchor.device
        self._keep = self._keep.to(device)
        self._bounds = self._bounds[0].to(device), self._bounds[1].to(device)
        self._normalization = self._normalization[0].to(device), self._normalization[1].to(device)
        for family in self.families.values():
            family.move(device)
        return self

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)

    def available(self, given: Mapping[str, Tensor]) -> Tensor:
        """[F] bool, on the CPU: features made of values that are given.

        Args:
            given: [D] bool of each family with values: which columns of its last axis have one. A family that is not
                there has none.
        """
        columns = [
            family.available(given[name]) if name in given else torch.zeros(family.output_dim, dtype=torch.bool)
            for name, family in self.families.items()
        ]
        return torch.cat(columns)[self._keep.cpu()]

    def forward(self, raw: Mapping[str, Tensor], rows: int) -> Tensor:
        """Features [N, F].

        Args:
            raw: {family: [N, *row_shape]}; a family that is not there is missing in all rows.
            rows: N.

        Raises:
            DataError: a family has another shape.
        """
        columns = []
        for name, family in self.families.items():
            values = raw.get(name)
            if values is None:
                values = family.missing(rows, self.anchor)
            elif not family.accepts(values.shape[1:]) or len(values) != rows:
                expected = ", ".join("any" if n == ANY_LENGTH else str(n) for n in (rows, *family.row_shape))
                raise DataError(f"family {name!r}: expected [{expected}], got {list(values.shape)}")
            columns.append(family(values.to(self.anchor)))
        x = torch.cat(columns, 1)[:, self._keep]
        low, high = (bound.to(x.dtype) for bound in self._bounds)
        center, scale = self._normalization
        return ((inward_clamp(x, low, high) - center) / scale).to(x.dtype)


class _FrozenFamily:
    """`FamilyEncoder` with gradients."""

    def __init__(self, family: FamilyEncoder) -> None:
        self.name, self.row_shape, self.accepts = family.name, family.row_shape, family.accepts
        self.encoder: nn.Module = deepcopy(family.encoder).requires_grad_(False)
        self.output_dim: int = family.encoder.output_dim
        self.center, self.scale = family.center, family.scale
        fill = torch.zeros(()) if family.fill is None else family.fill
        self.fill, self.dropped = torch.nan_to_num(fill, nan=0.0), fill.isnan()
        self.column_names = raw_columns(family)
        self.move(torch.device("cpu"))

    def move(self, device: torch.device) -> None:
        self.fill, self.dropped = self.fill.to(device), self.dropped.to(device)
        if self.center is not None and self.scale is not None:
            self.center, self.scale = self.center.to(device), self.scale.to(device)

    def missing(self, rows: int, like: Tensor) -> Tensor:
        """Rows without a value."""
        shape = [_UNKNOWN_LENGTH if n == ANY_LENGTH else n for n in self.row_shape]
        return torch.full((rows, *shape), torch.nan, dtype=like.dtype, device=like.device)

    def available(self, given: Tensor) -> Tensor:
        """[output_dim] bool from [D] bool of the last axis."""
        if isinstance(self.encoder, IdentityEncoder):
            return given.expand(self.row_shape).reshape(-1)
        if isinstance(self.encoder, StatisticsEncoder):
            return given.repeat_interleave(len(STATISTICS))
        return given.all().expand(self.output_dim)

    def __call__(self, raw: Tensor) -> Tensor:
        values = torch.where(raw.isnan() | self.dropped, self.fill.to(raw.dtype), raw)
        if self.center is not None and self.scale is not None:
            values = (values - self.center.to(raw.dtype)) / self.scale.to(raw.dtype)
            bound = values.new_full((), STANDARDIZE_CLIP)
            values = inward_clamp(values, -bound, bound)
        columns: Tensor = self.encoder(values)
        return columns


def raw_columns(family: FamilyEncoder) -> list[str] | None:
    """Names of the columns of the last axis of a family's rows; None where they are not known."""
    names = family.column_names
    if names is not None and isinstance(family.encoder, StatisticsEncoder):
        return [name.rpartition("::")[0] for name in names[:: len(STATISTICS)]]
    if names is not None and len(family.row_shape) == 1:
        return names
    for kind, known in (("summary", aggregated_names()), ("temporal", temporal_names())):
        if family.dataset == DEFAULT_DATASETS[kind] and family.row_shape[-1] == len(known):
            return known  # of a file of `generate`
    return None
