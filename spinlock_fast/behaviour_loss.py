"""A loss on the behaviour of predicted fields, measured by a tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from types import NoneType
from typing import Any, Self

import torch
from torch import Tensor, nn

from spinlock_fast.config.schema import DEFAULT_DATASETS
from spinlock_fast.descriptors.batched import BatchDescriber
from spinlock_fast.descriptors.describe import Families
from spinlock_fast.descriptors.gradients import is_constant
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.features.differentiable import DifferentiableFeatures
from spinlock_fast.features.names import family_of
from spinlock_fast.messages import shown
from spinlock_fast.tokenizer import Tokenizer

log = logging.getLogger(__name__)

WEIGHTS = {"commitment": 0.1, "latent": 1.0, "reconstruction": 0.01, "tokens": 0.1}
OF_TARGET = ("latent", "tokens")  # terms that need a target
_NOT_OF_FIELDS = "operator_sensitivity"  # descriptors that need the operator, in files of `generate`
_DESCRIBE = ("axes", "spacing", "periodic", "time_step")

Descriptors = Callable[[Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Behaviour:
    """What a tokenizer computes from N trajectories. `behaviour[i]` selects trajectories."""

    features: Tensor  # [N, F] cleaned and normalised, as `Tokenizer.features`
    latents: Tensor  # [N, sum D], before quantization
    codes: Tensor  # [N, sum D], the codes nearest to them, without gradient
    tokens: Tensor  # [N, G] int64
    finite: Tensor  # [N] bool; False: a value is not finite, or a descriptor overflows; other entries are then unusable
    available: Tensor  # [F] bool: features made of values that are given

    def __getitem__(self, rows: Any) -> Behaviour:
        parts = (self.features, self.latents, self.codes, self.tokens, self.finite)
        features, latents, codes, tokens, finite = (part[rows] for part in parts)
        return Behaviour(features, latents, codes, tokens, finite, self.available)

    def __len__(self) -> int:
        return len(self.finite)

    def detach(self) -> Behaviour:
        """Without gradients."""
        return Behaviour(*(getattr(self, name).detach() for name in self.__dataclass_fields__))


class BehaviourLoss(nn.Module):
    """Differentiable loss between the behaviour of predicted and target fields.

    Predicted fields pass through the descriptors, encoders, cleaning, normalisation and encoder network of a tokenizer.
    All of them are a frozen copy: the module has no parameters and no state, stays in eval mode, and leaves the
    tokenizer as it is. z_g are the latents of codebook g, of D_g dimensions, e_gk its codes, * marks the target. All
    terms are means over trajectories, and over codebooks or features:

    - commitment: ||z_g - e_g||^2 / D_g, e_g the code nearest to z_g.
    - latent: ||z_g - z*_g||^2 / D_g.
    - reconstruction: (x - decoded)^2, x the normalised features of the prediction, decoded those of its tokens.
    - tokens: -ln p_g(k*), k* the target's token, with soft assignments p_g(k) proportional to
      exp(-2 ||z_g - e_gk||^2 / (temperature s_g)) (Agustsson et al. 2017), s_g the mean squared distance of a code of
      codebook g from the nearest other one.

    Codes and tokens of the prediction are constants in the gradient, which is exact nearly everywhere. Only outside of
    the clip bounds of cleaning it is not that of the clipped value, which is zero: see `inward_clamp`.

    Args:
        tokenizer: a tokenizer of fields; it is copied to its device.
        descriptors: arguments of `describe`: any of axes, spacing, periodic and time_step. The default of each is what
            `extract` recorded in the data set of the checkpoint. Or a function that takes the place of `describe`:
            fields -> {family: [N, ...]}, differentiable.
        weights: weight of each term in `total`. Terms that are not named are not computed. The default has all four.
        temperature: of the soft assignments.

    Raises:
        ConfigError: an unknown term or argument, or a value out of range.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        descriptors: Mapping[str, Any] | Descriptors | None = None,
        weights: Mapping[str, float] | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(tokenizer, Tokenizer):
            raise ConfigError(
                f"tokenizer: expected a Tokenizer, such as Tokenizer.from_checkpoint(...), got {shown(tokenizer)}"
            )
        if not 0.0 < temperature < float("inf"):
            raise ConfigError(f"temperature must be positive, got {temperature}")
        self.weights = _checked_weights(WEIGHTS if weights is None else weights)
        self.temperature = temperature
        self.missing = 0  # trajectories that the last call left out
        self._needs_target = weights is not None
        self._describe = _describer(tokenizer, descriptors)
        self.feature_names = list(tokenizer.feature_names)
        self._datasets = {family.name: family.dataset for family in tokenizer.families}
        model = deepcopy(tokenizer.model).eval().requires_grad_(False)
        features = DifferentiableFeatures(tokenizer.families, tokenizer.cleaner, tokenizer.normalizer)
        # In a tuple, not registered: neither an optimizer, `requires_grad_` nor a checkpoint of a module that has this
        # loss as a part reaches the tokenizer.
        self._frozen = (features, model)
        self._alignments: dict[Any, tuple[Tensor, Tensor] | None] = {}
        self._spread: Tensor | None = None
        self.train(False)
        self.to(tokenizer.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module in self._frozen:
            module._apply(fn)
        self._spread = None
        return self

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return self._frozen[0].anchor.device

    @property
    def columns_without_gradient(self) -> list[str]:
        """Features whose gradient is zero nearly everywhere: they count, or give the position of a maximum."""
        return [name for name in self.feature_names if is_constant(name)]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        predicted_fields: Tensor,
        target_fields: Tensor | Behaviour | None = None,
        families: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """The terms of the loss, by name, and `total`, their weighted sum; scalars.

        A trajectory is left out of all terms if a value of its prediction or its target is not finite, or if a
        descriptor overflows; `missing` is the number of these. Categories that read a family which is neither
        described nor given are left out as well.

        Args:
            predicted_fields: with the axes of `describe`, on any device where the loss is.
            target_fields: fields of the same shape, without gradient, or their `encode`, to compute it once. Without a
                target, the terms latent and tokens are left out; it is an error if `weights` named them.
            families: {family: [N, ...]} values that fields do not give, such as parameters of the simulations. Of a
                family that is described in part, the columns that are not.

        Raises:
            DataError: shapes differ, a family is missing, or no trajectory is left.
        """
        if target_fields is None and self._needs_target and (lost := [t for t in OF_TARGET if t in self.weights]):
            raise DataError(f"target_fields: needed for the terms {', '.join(lost)}")
        if not isinstance(target_fields, (Tensor, Behaviour, NoneType)):
            raise DataError(f"target_fields: expected a torch tensor, got {type(target_fields).__name__}")
        if (
            isinstance(target_fields, Tensor)
            and isinstance(predicted_fields, Tensor)
            and target_fields.shape != predicted_fields.shape
        ):
            shapes = list(predicted_fields.shape), list(target_fields.shape)
            raise DataError(f"predicted_fields is {shapes[0]}, target_fields {shapes[1]}")
        target = target_fields
        if isinstance(target, Tensor):
            with torch.no_grad():
                target = self.encode(target, families)
        predicted = self.encode(predicted_fields, families)
        if target is not None and len(target) != len(predicted):
            raise DataError(f"predicted_fields has {len(predicted)} trajectories, target_fields {len(target)}")
        finite = predicted.finite if target is None else predicted.finite & target.finite
        left = finite.nonzero()[:, 0]
        self.missing = len(finite) - len(left)
        if not len(left):
            raise DataError(f"none of {len(finite)} trajectories has finite descriptors in prediction and target")
        if self.missing:
            predicted, target = predicted[left], None if target is None else target[left]
        with torch.autocast(predicted_fields.device.type, enabled=False):
            terms = self._terms(predicted, None if target is None else target.detach())
            total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return {**terms, "total": total}

    def encode(self, fields: Tensor, families: Mapping[str, Any] | None = None) -> Behaviour:
        """Features, latents and tokens of fields; arguments and errors as in `forward`.

        Differentiable where `fields` requires a gradient.
        """
        if not isinstance(fields, Tensor):
            raise DataError(f"fields: expected a torch tensor, got {type(fields).__name__}; torch.as_tensor makes one")
        features, model = self._frozen
        with torch.autocast(fields.device.type, enabled=False):
            if fields.device != self.device:
                raise DataError(f"fields are on {fields.device}, the loss on {self.device}: move it by .to(device)")
            raw, given, finite = self._families(fields, dict(families or {}))
            available = features.available(given)
            self._check_available(available, given)
            x = features(raw, len(finite))
            latents = model.encode(x)
            with torch.no_grad():
                assignment = model.quantizer.assign(latents.detach())
            finite = finite & (assignment.codes >= 0).all(1)
            return Behaviour(x, latents, assignment.quantized, assignment.codes, finite, available)

    def left_out(self, available: Tensor) -> list[str]:
        """Categories that read a feature which is not available [F] bool; see `Behaviour.available`."""
        known = available.tolist()
        inputs = self._frozen[1].config.inputs
        return [name for name, members in inputs.items() if not all(known[i] for i in members)]

    def _families(
        self, fields: Tensor, supplied: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """{family: values}, {family: [D] bool columns that have values}, and [N] bool finite trajectories."""
        described = self._describe(fields)
        names = described.names if isinstance(described, Families) else {}
        if unknown := [name for name in supplied if name not in self._datasets]:
            raise DataError(f"families: {shown(unknown[0])} is none of {', '.join(self._datasets)}")
        sizes = {len(values) for values in described.values()}
        if len(sizes) != 1:
            raise DataError(f"descriptors: families have {sorted(sizes)} trajectories")
        finite = torch.ones(sizes.pop(), dtype=torch.bool, device=fields.device)
        raw, given = {}, {}
        for name, dataset in self._datasets.items():
            kind = next((kind for kind in described if name == kind or dataset == DEFAULT_DATASETS.get(kind)), None)
            own = supplied.get(name)
            own = None if own is None else torch.as_tensor(own).to(fields.device)
            if kind is None:
                if own is not None:
                    raw[name], given[name] = own, torch.ones(own.shape[-1], dtype=torch.bool)
                continue
            values = described[kind]
            finite = finite & torch.isfinite(values.detach()).flatten(1).all(1)
            raw[name], given[name] = self._aligned(name, values, names.get(kind), own)
        for name in raw:
            rows = finite.view(-1, *[1] * (raw[name].ndim - 1))
            if len(raw[name]) == len(finite):  # other shapes are reported later
                raw[name] = torch.where(rows, raw[name], torch.nan)
        return raw, given, finite

    def _aligned(
        self, name: str, values: Tensor, columns: list[str] | None, own: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Described values in the columns of a family, and [D] bool columns that have values.

        Args:
            columns: names of the last axis of `values`.
            own: values [N, ..., D] of the columns that are not described.
        """
        key = (name, tuple(columns or ()), values.shape[-1], values.device)
        if key not in self._alignments:
            self._alignments[key] = self._alignment(name, values, columns)
        alignment = self._alignments[key]
        if alignment is None:
            if own is not None:
                raise DataError(f"families: {name!r} is computed from the fields")
            return values, torch.ones(values.shape[-1], dtype=torch.bool)
        index, present = alignment
        values = values.index_select(-1, index)
        if own is None:
            return values.masked_fill(~present, torch.nan), present.cpu()
        if own.shape != values.shape:
            raise DataError(f"family {name!r}: expected {list(values.shape)}, got {list(own.shape)}")
        return torch.where(present, values, own.to(values.dtype)), torch.ones(len(index), dtype=torch.bool)

    def _alignment(self, name: str, values: Tensor, columns: list[str] | None) -> tuple[Tensor, Tensor] | None:
        """[D] position of each column of a family in the described ones, and whether it is there; None: the same."""
        family = self._frozen[0].families[name]
        expected, width = family.column_names, family.row_shape[-1]
        if columns is None or expected is None or not set(columns) & set(expected):
            if values.shape[-1] != width:
                raise DataError(
                    f"family {name!r}: the fields give {values.shape[-1]} columns, the tokenizer was trained on "
                    f"{width}; channels, axes and realizations must be the same"
                )
            return None
        if columns == expected:
            return None
        if isinstance(self._describe, BatchDescriber):
            lacking = [column for column in expected if column not in columns and not column.startswith(_NOT_OF_FIELDS)]
            if others := lacking + [column for column in columns if column not in expected]:
                text = "the fields do not give" if lacking else "the tokenizer was not trained on"
                raise DataError(
                    f"family {name!r}: {text} {shown(others[0])}; channels, axes and realizations must be the same"
                )
        place = {column: i for i, column in enumerate(columns)}
        index = torch.tensor([place.get(column, 0) for column in expected])
        present = torch.tensor([column in place for column in expected])
        return index.to(values.device), present.to(values.device)

    def _check_available(self, available: Tensor, given: Mapping[str, Tensor]) -> None:
        if bool(available.all()):
            return
        lost = self.left_out(available)
        absent = dict.fromkeys(
            family_of(name) for name, known in zip(self.feature_names, available.tolist(), strict=True) if not known
        )
        parts = [f"{name} (in part)" if name in given else name for name in absent]
        text = f"values of {', '.join(parts)} are not given by the fields, nor in `families`"
        if len(lost) == len(self._frozen[1].categories):
            raise DataError(f"{text}: every category reads them")
        key = ("warned", tuple(lost))
        if key not in self._alignments:
            self._alignments[key] = None
            log.warning("%s: left out of the behaviour loss: %s", text, ", ".join(lost) or "reconstruction of these")

    def _terms(self, predicted: Behaviour, target: Behaviour | None) -> dict[str, Tensor]:
        model = self._frozen[1]
        index = model.quantizer.layout.indices(self.device)
        lost = set(self.left_out(predicted.available))
        kept = torch.tensor(
            [float(name not in lost) for name in model.categories for _ in model.levels[name]], device=self.device
        )
        by_codebook = (kept / kept.sum()).to(predicted.latents.dtype)  # [G]
        by_column = (by_codebook / index.dims.to(by_codebook))[index.codebook_of_column]  # [sum D]
        terms = {}
        for name in self.weights:
            if target is None and name in OF_TARGET:
                continue
            if name == "commitment":
                terms[name] = ((predicted.latents - predicted.codes).square() * by_column).sum(1).mean()
            elif name == "latent" and target is not None:
                terms[name] = ((predicted.latents - target.latents).square() * by_column).sum(1).mean()
            elif name == "tokens" and target is not None:
                terms[name] = (self._cross_entropy(predicted.latents, target.tokens) * by_codebook).sum(1).mean()
            else:
                with torch.no_grad():
                    decoded = model.reconstruct(predicted.codes, predicted.tokens)
                known = predicted.available.to(self.device, predicted.features.dtype)
                terms[name] = ((predicted.features - decoded).square() @ (known / known.sum())).mean()
        return terms

    def _cross_entropy(self, latents: Tensor, tokens: Tensor) -> Tensor:
        """-ln p of tokens [N, G] under the soft assignments of latents [N, sum D]: [N, G]."""
        quantizer = self._frozen[1].quantizer
        layout = quantizer.layout
        codes = layout.pad_codebook(quantizer.embedding.to(latents.dtype))  # [G, K, D]
        mask = layout.indices(self.device).code_mask  # [G, K]
        if self._spread is None:
            self._spread = _code_spread(codes, mask)
        z = layout.pad_columns(latents)  # [G, N, D]
        # ||z||^2 is the same for all codes.
        distance = codes.square().sum(2)[:, None] - 2.0 * z @ codes.mT
        logits = (-2.0 / self.temperature) * distance / self._spread[:, None, None]
        log_p = logits.masked_fill(~mask[:, None], -torch.inf).log_softmax(2)
        return -log_p.gather(2, tokens.T[..., None])[..., 0].T


def _code_spread(codes: Tensor, mask: Tensor) -> Tensor:
    """[G] mean squared distance of a code of codes [G, K, D] from the nearest other one; 1 for a single code."""
    distance = torch.cdist(codes, codes, compute_mode="donot_use_mm_for_euclid_dist").square()
    # Equal codes are one.
    alone = ~(mask[:, None] & mask[:, :, None]) | (distance <= 1e-12 * codes.square().sum(2).amax(1)[:, None, None])
    nearest = distance.masked_fill(alone, torch.inf).amin(2)
    known = torch.isfinite(nearest)
    total = nearest.masked_fill(~known, 0.0).sum(1)
    return torch.where(known.any(1), total / known.sum(1).clamp(min=1), 1.0)


def _checked_weights(weights: Mapping[str, float]) -> dict[str, float]:
    for name, weight in weights.items():
        if name not in WEIGHTS:
            raise ConfigError(f"weights: {shown(name)} is none of the terms {', '.join(WEIGHTS)}")
        if not 0.0 <= weight < float("inf"):
            raise ConfigError(f"weights: {name} must be at least 0, got {shown(weight)}")
    if not weights:
        raise ConfigError(f"weights: name at least one of the terms {', '.join(WEIGHTS)}")
    return {name: float(weight) for name, weight in weights.items()}


def _describer(tokenizer: Tokenizer, descriptors: Mapping[str, Any] | Descriptors | None) -> Descriptors:
    if callable(descriptors):
        return descriptors
    arguments = dict(descriptors or {})
    if unknown := [name for name in arguments if name not in _DESCRIBE]:
        raise ConfigError(f"descriptors: {shown(unknown[0])} is none of {', '.join(_DESCRIBE)}")
    unset = [name for name in ("spacing", "periodic", "time_step") if arguments.get(name) is None]
    if tokenizer.field_grid is None and unset:
        log.warning(
            "the checkpoint does not record the grid of its fields: %s as in `describe` by default; set `descriptors`",
            ", ".join(unset),
        )
    return BatchDescriber(tokenizer.field_grid, **arguments)
