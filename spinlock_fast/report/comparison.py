"""Two to eight checkpoints side by side: metrics, matched categories, settings, agreement of tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.features.mutual_information import adjusted_mutual_information, contingency
from spinlock_fast.messages import printable
from spinlock_fast.report.checkpoint_summary import CheckpointSummary, read_checkpoint_summary
from spinlock_fast.report.data_statistics import measure_data

MAX_RUNS = 8
ABSENT = "-"

Matrix = NDArray[np.float64]


class MetricRow(NamedTuple):
    """One metric of all runs, as text."""

    label: str
    values: list[str]
    best: list[bool]  # more than one where values are equal; none where the runs cannot be compared by it


class Match(NamedTuple):
    """A category of another run, and its overlap with the category it was matched to."""

    category: int
    overlap: float  # Jaccard index of the two sets of feature names


@dataclass
class Agreement:
    """Agreement of the tokens of the same rows: adjusted mutual information of matched codebooks."""

    data: str  # the rows, as text
    mean: Matrix  # [R, R] over the codebooks that have a partner; NaN where none has
    codebooks: Matrix  # [R, C, L] of the first run's codebooks with those of each run; NaN without a partner


@dataclass
class Comparison:
    """What the runs share and where they differ."""

    labels: list[str]
    runs: list[CheckpointSummary]
    metrics: list[MetricRow]
    matches: list[list[Match | None]]  # [R][C] the partner in each run of each category of the first run
    settings: list[tuple[str, list[str]]]  # key and values of the settings that differ
    marked: bool  # whether best values are marked, which needs equal features and rows
    agreement: Agreement | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def levels(self) -> int:
        """Largest number of levels of a category in any run."""
        return max(run.levels for run in self.runs)

    def utilization(self) -> Matrix:
        """[R, C, L] share of the codes in use, of the partners of the first run's categories; NaN without a value."""
        result = np.full((len(self.runs), len(self.runs[0].categories), self.levels), np.nan)
        for r, (run, matches) in enumerate(zip(self.runs, self.matches, strict=True)):
            measured = run.per_category("utilization")
            for c, match in enumerate(matches if measured else ()):
                if match is not None and measured is not None:
                    values = measured[match.category]
                    result[r, c, : len(values)] = values[: self.levels]
        return result

    def unmatched(self, run: int) -> list[str]:
        """Categories of a run without a partner in the first run."""
        matched = {match.category for match in self.matches[run] if match is not None}
        return [name for c, name in enumerate(self.runs[run].categories) if c not in matched]


# Label, key in metrics.json, format, which is better.
_METRICS = (
    ("quality", "quality", ".4f", "high"),
    ("reconstruction error", "reconstruction_error", ".4f", "low"),
    ("loss, all terms", "val_loss", ".4f", ""),  # the weights of the terms may differ
    ("utilization", "utilization", ".3f", "high"),
    ("perplexity / K", "perplexity_over_k", ".3f", "high"),
    ("distance preservation, latents", "topo_pre", ".3f", "high"),
    ("distance preservation, codes", "topo_post", ".3f", "high"),
    ("largest category correlation", "category_correlation_max", ".3f", "low"),
    ("trainable parameters", "trainable_parameters", ",", ""),
    ("rows measured", "val_rows", ",", ""),
    ("epochs", "epochs", ",", ""),
    ("best epoch", "best_epoch", ",", ""),
)


def compare_runs(
    checkpoints: Sequence[str | Path], data: str | Path | list[str] | None = None, device: str | torch.device = "cpu"
) -> Comparison:
    """Reads two to eight checkpoints; the first is the one that the others are matched to.

    Args:
        data: HDF5 file, glob or list. If given, all metrics are measured on all of its rows, and the tokens of these
            rows are compared; else metrics are those of metrics.json.

    Raises:
        ConfigError: too few or too many checkpoints, or one of them twice.
        DataError: a checkpoint cannot be read, or does not fit the data.
    """
    paths = [Path(path) for path in checkpoints]
    if not 2 <= len(paths) <= MAX_RUNS:
        raise ConfigError(f"compare: expected 2 to {MAX_RUNS} checkpoints, got {len(paths)}")
    resolved = [path.resolve() for path in paths]
    for path in paths:
        if resolved.count(path.resolve()) > 1:
            raise ConfigError(f"compare: {path} is given twice")
    labels = run_labels(resolved)
    runs = [read_checkpoint_summary(path, device) for path in paths]
    tokens = [_measure(label, run, data) for label, run in zip(labels, runs, strict=True)] if data is not None else []
    notes = [f"{label}: {note}" for label, run in zip(labels, runs, strict=True) for note in run.notes]
    incomparable = _incomparable(labels, runs, measured_alike=data is not None)
    notes += incomparable + _nameless(runs)
    result = Comparison(
        labels=labels,
        runs=runs,
        metrics=[*_sizes(runs), *_metric_rows(runs, marked=not incomparable)],
        matches=[match_categories(runs[0], run) for run in runs],
        settings=differing_settings(runs),
        marked=not incomparable,
        notes=notes,
    )
    if tokens:
        result.agreement = _agreement(result, tokens)
    return result


def run_labels(paths: Sequence[Path]) -> list[str]:
    """Names of different directories: as many of their last components as distinguish them, without a common end."""
    parts = [path.parts for path in paths]
    while len({own[-1:] for own in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [own[:-1] for own in parts]
    labels = []
    for own in parts:
        depth = 1
        while sum(other[-depth:] == own[-depth:] for other in parts) > 1:
            depth += 1
        labels.append(printable(str(Path(*own[-depth:]))))
    return labels


def number_text(value: float) -> str:
    """A number with two decimals and no negative zero, or a mark for NaN."""
    return ABSENT if math.isnan(value) else f"{round(value, 2) + 0.0:.2f}"


def match_categories(first: CheckpointSummary, other: CheckpointSummary) -> list[Match | None]:
    """The partner of each category of the first run: one to one, with the largest sum of overlaps (Kuhn 1955).

    Categories without a feature in common are not matched.
    """
    own, others = ([{run.feature_names[i] for i in group} for group in run.groups] for run in (first, other))
    overlap = np.array([[len(a & b) / len(a | b) for b in others] for a in own])
    matches: list[Match | None] = [None] * len(own)
    for i, j in zip(*(side.tolist() for side in linear_sum_assignment(-overlap)), strict=True):
        if overlap[i, j] > 0.0:
            matches[i] = Match(j, float(overlap[i, j]))
    return matches


def differing_settings(runs: Sequence[CheckpointSummary]) -> list[tuple[str, list[str]]]:
    """Settings whose values differ between the runs that record them, without the output directory."""
    flat = [None if run.config is None else _flat(run.config.model_dump(mode="json")) for run in runs]
    keys = dict.fromkeys(key for settings in flat if settings is not None for key in settings)
    rows = []
    for key in keys:
        values = [settings.get(key, ABSENT) for settings in flat if settings is not None]
        if len(set(values)) > 1 and key not in ("output_dir", "training.checkpoint_dir"):
            rows.append((key, ["not recorded" if own is None else own.get(key, ABSENT) for own in flat]))
    return rows


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted key -> value as text."""
    result: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = printable(value if isinstance(value, str) else json.dumps(value))
    return result


def _measure(label: str, run: CheckpointSummary, data: str | Path | list[str]) -> NDArray[np.int64]:
    """The tokens [N, G] of the data; replaces the measured metrics of the run by those of all rows of the data."""
    recorded, notes = run.metrics, list(run.notes)
    run.metrics = {}
    try:
        tokens = measure_data(run, data).tokens
    except DataError as error:
        raise DataError(f"{label}: {error}") from None
    run.metrics, run.notes = recorded | run.metrics, notes
    return tokens


def _incomparable(labels: list[str], runs: list[CheckpointSummary], measured_alike: bool) -> list[str]:
    """Why no metric is marked as the best, in one line; empty if the runs have the same features and rows."""
    unmeasured = [label for label, run in zip(labels, runs, strict=True) if "quality" not in run.metrics]
    if unmeasured:
        return [f"no best metrics are marked: {', '.join(unmeasured)} has none (--data measures them)"]
    if len({frozenset(run.feature_names) for run in runs}) > 1:
        return ["no best metrics are marked: the runs have different features"]
    if not measured_alike and len({_rows_of(run) for run in runs}) > 1:
        return ["no best metrics are marked: they were measured on different rows (--data measures them on the same)"]
    return []


def _rows_of(run: CheckpointSummary) -> str:
    """What determines the validation rows of a run, as far as it is recorded."""
    config, metrics = run.config, run.metrics
    split = (
        None
        if config is None
        else (
            *(config.dataset_path, config.random_seed),
            *(config.training.val_fraction, config.training.test_fraction, run.tokenizer.origin.streams),
        )
    )
    return repr((split, metrics.get("samples"), metrics.get("val_rows"), metrics.get("rows")))


def _nameless(runs: list[CheckpointSummary]) -> list[str]:
    families = sorted({name for run in runs for name in run.nameless_families})
    if not families:
        return []
    text = ", ".join(map(printable, families))
    return [f"features of {text} have no names: they are matched by number, which holds for equal encoders only"]


def _sizes(runs: list[CheckpointSummary]) -> list[MetricRow]:
    def row(label: str, values: list[str]) -> MetricRow:
        return MetricRow(label, values, [False] * len(values))

    return [
        row("features", [f"{len(run.feature_names):,}" for run in runs]),
        row("categories", [f"{len(run.categories):,}" for run in runs]),
        row("codebooks", [f"{len(run.codebooks):,}" for run in runs]),
        row("codes", [f"{run.total_codes:,}" for run in runs]),
        row("bits of the tokens", [f"{sum(math.log2(book.codes) for book in run.codebooks):.1f}" for run in runs]),
    ]


def _metric_rows(runs: list[CheckpointSummary], marked: bool) -> list[MetricRow]:
    rows = []
    for label, key, form, better in _METRICS:
        values = [run.metrics.get(key) for run in runs]
        if all(value is None for value in values):
            continue
        texts = [ABSENT if value is None else format(value, form) for value in values]
        known = [value for value in values if value is not None]
        best = [False] * len(runs)
        if better and marked and len(known) == len(runs):
            extreme = format(max(known) if better == "high" else min(known), form)
            best = [text == extreme for text in texts]  # values that read the same are equally good
            best = [False] * len(runs) if all(best) else best
        rows.append(MetricRow(label, texts, best))
    seconds = [run.metrics.get("seconds", {}).get("total") for run in runs]
    if any(value is not None for value in seconds):
        texts = [ABSENT if value is None else f"{value:,.0f}" for value in seconds]
        rows.append(MetricRow("seconds, total", texts, [False] * len(runs)))
    return rows


def _agreement(comparison: Comparison, tokens: list[NDArray[np.int64]]) -> Agreement:
    runs = comparison.runs
    mean = np.eye(len(runs))
    shape = (len(runs), len(runs[0].categories), comparison.levels)
    codebooks = np.full(shape, np.nan)
    for r, s in combinations(range(len(runs)), 2):
        matches = comparison.matches[s] if r == 0 else match_categories(runs[r], runs[s])
        values = _codebook_agreement((runs[r], tokens[r]), (runs[s], tokens[s]), matches, comparison.levels)
        known = values[~np.isnan(values)]
        mean[r, s] = mean[s, r] = known.mean() if known.size else np.nan
        if r == 0:
            codebooks[s] = values
    return Agreement(f"{len(tokens[0]):,} rows", mean, codebooks)


def _codebook_agreement(
    first: tuple[CheckpointSummary, NDArray[np.int64]],
    other: tuple[CheckpointSummary, NDArray[np.int64]],
    matches: list[Match | None],
    levels: int,
) -> Matrix:
    """[C, L] adjusted mutual information of each codebook of the first run and that of the same level in its match."""
    (run, tokens), (other_run, other_tokens) = first, other
    partner = {(book.category, book.level): h for h, book in enumerate(other_run.codebooks)}
    result = np.full((len(run.categories), levels), np.nan)
    for g, book in enumerate(run.codebooks):
        match = matches[book.category]
        h = None if match is None else partner.get((match.category, book.level))
        if h is not None:
            shape = (book.codes, other_run.codebooks[h].codes)
            table = contingency(tokens[:, g], other_tokens[:, h], shape)
            result[book.category, book.level] = adjusted_mutual_information(table)
    return result
