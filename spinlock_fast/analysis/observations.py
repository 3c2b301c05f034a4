"""The data of an analysis: tokens, features and conditions of the operators of a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.data.feature_source import FeatureSource, column_names, decode_text
from spinlock_fast.distributed import SINGLE, Ranks
from spinlock_fast.errors import DataError
from spinlock_fast.models.code_search import code_distances
from spinlock_fast.models.input_check import InputCheck
from spinlock_fast.tokenizer import Tokenizer

PARAMETERS = "parameters/params"
LABELS = {
    "initial condition": "metadata/ic_types",
    "evolution policy": "metadata/evolution_policies",
    "noise regime": "metadata/noise_regimes",
    "grid size": "metadata/grid_sizes",
}

Progress = Callable[[int, int], None]
Floats = NDArray[np.float32]

_NAMED_COLUMNS = ("IdentityEncoder", "StatisticsEncoder")  # encoders whose columns are described by themselves


@dataclass(frozen=True)
class Codebooks:
    """The codebook of each token column."""

    names: list[str]  # [G] "cluster_1/L0"
    categories: list[str]  # [G]
    levels: list[int]  # [G]
    num_codes: list[int]  # [G]
    vectors: list[Floats]  # [G] of [K_g, D_g]

    @property
    def offsets(self) -> NDArray[np.int64]:
        """[G + 1] index of the first code of each codebook among all codes."""
        return np.concatenate([[0], np.cumsum(self.num_codes)])

    def by_category(self) -> dict[str, list[int]]:
        """Codebook indices of each category, coarse to fine."""
        indices: dict[str, list[int]] = {}
        for g, category in enumerate(self.categories):
            indices.setdefault(category, []).append(g)
        return indices


@dataclass(frozen=True)
class Observations:
    """N encoded operators.

    Args:
        rows: [N] row of each operator in the data set.
        tokens: [N, G].
        distance: [N, G] distance from the latent to its code.
        margin: [N, G] additional distance to the second-nearest code.
        features: [N, F] cleaned input features of the model, in the units of the encoders' columns.
        feature_names: [F].
        groups: feature indices of each category.
        measured: [N, M] raw columns of families with a mixing encoder: columns of 2-D datasets, means over time of
            3-D ones.
        measured_names: [M].
        parameters: theta [N] by name.
        labels: texts or integers [N] by name.
        notes: omitted parts, with the reason.
    """

    codebooks: Codebooks
    rows: NDArray[np.int64]
    tokens: NDArray[np.int64]
    distance: Floats
    margin: Floats
    features: Floats
    feature_names: list[str]
    groups: Mapping[str, Sequence[int]]
    measured: Floats
    measured_names: list[str]
    parameters: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    labels: dict[str, NDArray[Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def collect_observations(
    tokenizer: Tokenizer,
    data: str | Path | list[str],
    most_rows: int,
    memory_budget: int,
    progress: Progress | None = None,
    ranks: Ranks = SINGLE,
) -> Observations | None:
    """Encodes a file and reads the conditions of its operators.

    Args:
        most_rows: maximum number of rows; evenly spaced rows are taken from a larger file.
        ranks: if there are several, each encodes a share of the rows; all but rank 0 receive None.

    Raises:
        DataError: the file cannot be read, or does not fit the checkpoint.
    """
    codebooks = read_codebooks(tokenizer)
    notes: list[str] = []
    parts: list[_Block] = []
    with tokenizer.source(data) as source:
        total = source.rows
        rows = np.unique(np.linspace(0, total - 1, min(total, most_rows)).astype(np.int64))
        if len(rows) < total:
            notes.append(f"{len(rows):,} of {total:,} operators, evenly spaced, were analysed")
        mixed = [family.name for family in tokenizer.families if family.encoder_name not in _NAMED_COLUMNS]
        names = [name for family in mixed for name in measured_names(source, family)]
        check = InputCheck(tokenizer.training_range, total)
        for start, raw, x in tokenizer.raw_and_features(source, memory_budget, check, ranks):
            local_rows = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + len(x))] - start
            if local_rows.size:
                parts.append(_block(tokenizer, codebooks, {name: raw[name] for name in mixed}, x, local_rows, check))
            if progress is not None:
                progress(min(total, ranks.size * (start + len(x))), total)
        check.merge(ranks)
        parts = [part for of_rank in ranks.gather_on_main(parts) for part in of_rank]
        if not ranks.is_main:
            return None
        parameters, labels = read_conditions(source, rows, notes)
    notes[:0] = check.log_warnings()
    tokens, distance, margin, features, measured = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Observations(
        codebooks,
        rows,
        tokens,
        distance,
        margin,
        features,
        tokenizer.feature_names,
        tokenizer.model.config.group_indices,
        measured,
        names,
        parameters,
        labels,
        notes,
    )


def read_codebooks(tokenizer: Tokenizer) -> Codebooks:
    """The codebooks of a tokenizer."""
    model = tokenizer.model
    levels = [(name, level) for name in model.categories for level in range(len(model.levels[name]))]
    vectors = [model.quantizer.codebook(g).detach().cpu().numpy() for g in range(model.num_codebooks)]
    return Codebooks(
        [f"{name}/L{level}" for name, level in levels],
        [name for name, _ in levels],
        [level for _, level in levels],
        list(model.quantizer.num_codes),
        vectors,
    )


_Block = tuple[NDArray[np.int64], Floats, Floats, Floats, Floats]


def _block(
    tokenizer: Tokenizer,
    codebooks: Codebooks,
    raw: Mapping[str, Tensor],
    x: Floats,
    local_rows: NDArray[np.int64],
    check: InputCheck,
) -> _Block:
    model = tokenizer.model
    index = torch.from_numpy(local_rows)
    with torch.no_grad():
        rows = torch.from_numpy(x[local_rows]).to(tokenizer.device)
        tokens = model.get_tokens(rows)
        if bool((tokens < 0).any()):
            raise DataError("an operator overflows in the encoder: its features are far outside those of training")
        sampled = slice(None, None, check.stride)
        check.add_errors((model.decode_from_tokens(tokens[sampled]) - rows[sampled]).square().mean(1).cpu().numpy())
        distance, margin = code_distances(model.encode(rows), model.quantizer.embedding, tokens, model.quantizer.layout)
    columns = []
    for values in raw.values():
        chosen = values[index.to(values.device)]
        columns.append(chosen if chosen.ndim == 2 else chosen.nanmean(1))
    measured = torch.cat(columns, 1) if columns else torch.empty(len(local_rows), 0)
    return (
        tokens.cpu().numpy(),
        distance.cpu().numpy(),
        margin.clamp(min=0.0).cpu().numpy(),  # a rounding error, since codes are the nearest ones
        tokenizer.normalizer.inverse(x[local_rows]),
        measured.cpu().numpy(),
    )


def measured_names(source: FeatureSource, family: str) -> list[str]:
    """Names of the last axis of a family's dataset: attribute `feature_names` of it or its groups, else indices."""
    info = source.datasets[family]
    width = info.row_shape[-1]
    prefix = f"{family} mean over time" if len(info.row_shape) > 1 else family
    if (names := column_names(source.files, info.path, (width,), groups=2)) is not None:
        return [f"{prefix}: {name}" for name in names]
    return [f"{prefix}: column {i}" for i in range(width)]


def read_conditions(
    source: FeatureSource, rows: NDArray[np.int64], notes: list[str]
) -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[Any]]]:
    """Parameters and labels of some rows by name; missing datasets are noted."""
    values = _read(source, PARAMETERS, rows, notes)
    parameters: dict[str, NDArray[np.float64]] = {}
    if values is not None:
        if values.ndim != 2 or values.dtype.kind not in "fiub":
            raise _wrong_shape(source, PARAMETERS, "numbers [N, P]", values)
        names = _parameter_names(source, values.shape[1])
        parameters = {name: values[:, i].astype(np.float64) for i, name in enumerate(names)}
    labels = {}
    for name, path in LABELS.items():
        values = _read(source, path, rows, notes)
        if values is not None:
            if values.ndim != 1 or values.dtype.kind not in "OSfiub":
                raise _wrong_shape(source, path, "texts or numbers [N]", values)
            labels[name] = np.array([decode_text(v) for v in values]) if values.dtype.kind in "OS" else values
    return parameters, labels


def _wrong_shape(source: FeatureSource, path: str, expected: str, values: NDArray[Any]) -> DataError:
    return DataError(f"{source.files[0]}: {path}: expected {expected}, got {values.dtype} of shape {values.shape}")


def _parameter_names(source: FeatureSource, width: int) -> list[str]:
    if (names := column_names(source.files, PARAMETERS, (width,), groups=1)) is not None:
        return names
    return [f"theta[{i}]" for i in range(width)]


def _read(source: FeatureSource, path: str, rows: NDArray[np.int64], notes: list[str]) -> NDArray[Any] | None:
    values_of_file = source.read_whole(path)
    if values_of_file is None:
        notes.append(f"the data have no {path}")
        return None
    if len(values_of_file) != source.rows:
        raise DataError(
            f"{source.files[0]}: {path}: has {len(values_of_file)} rows, but the features have {source.rows}"
        )
    values: NDArray[Any] = values_of_file[rows]
    return values
