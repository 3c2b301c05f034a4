"""The page of a comparison, as blocks of `analysis_page`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spinlock_fast.report.analysis_page import Block
from spinlock_fast.report.comparison import ABSENT, Comparison, Match, number_text
from spinlock_fast.report.vocabulary_changes import DATA, EXPLANATION, category_changes


def comparison_blocks(comparison: Comparison, checkpoints: Sequence[str | Path]) -> list[Block]:
    """The page: runs, metrics, settings, matched categories, utilization, agreement, vocabularies, notes."""
    labels = comparison.labels
    directories = [(label, os.fspath(path)) for label, path in zip(labels, checkpoints, strict=True)]
    measured = [(run.measured_on if run.metrics else "no metrics") for run in comparison.runs]
    rows = [("run", "directory", "measured on")]
    rows += [(*names, on) for names, on in zip(directories, measured, strict=True)]
    metrics = [
        (row.label, *(f"{value} (best)" if good else value for value, good in zip(row.values, row.best, strict=True)))
        for row in comparison.metrics
    ]
    blocks = [
        Block("h1", [f"Comparison of {len(labels)} runs"]),
        Block("table", rows=rows),
        Block("picture", ["Metrics, settings, curves, matched categories, utilization and agreement of tokens"]),
        Block("h2", ["Metrics"]),
        Block("table", rows=[("metric", *labels), *metrics]),
        Block("h2", ["Settings that differ"]),
    ]
    if comparison.settings:
        settings = [(key, *values) for key, values in comparison.settings]
        blocks.append(Block("table", rows=[("setting", *labels), *settings]))
    else:
        blocks.append(Block("p", ["None of those recorded."]))
    blocks += [*_categories(comparison), *_utilization(comparison), *_agreement(comparison), *_vocabularies(comparison)]
    if comparison.notes:
        blocks += [Block("h2", ["Notes"]), Block("list", comparison.notes)]
    return blocks


def _categories(comparison: Comparison) -> list[Block]:
    labels, first = comparison.labels, comparison.runs[0]
    text = (
        f"Each category of {labels[0]}, its match in every other run, and the Jaccard index of their features: shared "
        "features divided by those of either. Matches are one to one, with the largest sum of indices."
    )
    rows = [(f"category of {labels[0]}", *labels[1:])]
    for c, name in enumerate(first.categories):
        partners = zip(comparison.runs[1:], comparison.matches[1:], strict=True)
        rows.append((name, *(_partner(run.categories, matches[c]) for run, matches in partners)))
    blocks = [Block("h2", ["Matched categories"]), Block("p", [text]), Block("table", rows=rows)]
    unmatched = [
        f"Without a match in {labels[0]}: {', '.join(names)} of {label}."
        for r, label in enumerate(labels)
        if (names := comparison.unmatched(r))
    ]
    return [*blocks, Block("list", unmatched)] if unmatched else blocks


def _partner(names: list[str], match: Match | None) -> str:
    return ABSENT if match is None else f"{names[match.category]} ({match.overlap:.2f})"


def _utilization(comparison: Comparison) -> list[Block]:
    values = comparison.utilization()
    if np.isnan(values).all():
        return []
    rows = [("codebook", *comparison.labels)]
    for c, name in enumerate(comparison.runs[0].categories):
        for level in range(comparison.levels):
            shares = values[:, c, level]
            if not np.isnan(shares).all():
                rows.append((f"{name}/L{level}", *(ABSENT if np.isnan(v) else f"{100 * v:.0f} %" for v in shares)))
    text = "Share of the codes in use, in the matched category of each run."
    return [Block("h2", ["Utilization"]), Block("p", [text]), Block("table", rows=rows)]


def _agreement(comparison: Comparison) -> list[Block]:
    agreement, labels = comparison.agreement, comparison.labels
    if agreement is None:
        return []
    text = (
        f"Adjusted mutual information of the tokens of matched codebooks of the same level, mean over them, on "
        f"{agreement.data}: 0 at chance level, 1 where the tokens determine each other."
    )
    mean = [(label, *map(number_text, row)) for label, row in zip(labels, agreement.mean.tolist(), strict=True)]
    rows = [(f"codebook of {labels[0]}", *labels[1:])]
    for c, name in enumerate(comparison.runs[0].categories):
        for level in range(comparison.levels):
            values = agreement.codebooks[1:, c, level].tolist()
            if not np.isnan(values).all():
                rows.append((f"{name}/L{level}", *map(number_text, values)))
    blocks = [Block("h2", ["Agreement of tokens"]), Block("p", [text]), Block("table", rows=[("run", *labels), *mean])]
    return [*blocks, Block("table", rows=rows)] if len(rows) > 1 else blocks


def _vocabularies(comparison: Comparison) -> list[Block]:
    blocks = []
    for label, run in zip(comparison.labels, comparison.runs, strict=True):
        vocabulary = run.vocabulary
        if not vocabulary:
            continue
        start, codes = vocabulary["init_from"], vocabulary["codes"]
        frozen = "" if start.get("freeze", "none") == "none" else f", frozen: {start['freeze']}"
        line = f"{label}: started from {start['name']}{frozen}; {codes['in_use_kept']:,} of {codes['in_use']:,} codes "
        line += "in use were kept"
        for name in ("new_data", "old_data"):
            if (equal := vocabulary[name].get("equal_tokens")) is not None:
                line += f"; {name.replace('_', ' ')}: {equal:.1%} equal tokens"
                before, after = (vocabulary[name].get(f"error_{when}") for when in ("before", "after"))
                line += f", error {before:.4f} -> {after:.4f}" if None not in (before, after) else ""
        blocks += [Block("list", [f"{line}."]), *_changes_table(vocabulary)]
    explanation = [Block("p", [EXPLANATION])] if any(block.kind == "table" for block in blocks) else []
    return [Block("h2", ["Vocabulary"]), *explanation, *blocks] if blocks else []


def _changes_table(vocabulary: dict[str, Any]) -> list[Block]:
    """By category; empty without codebooks."""
    changes = category_changes(vocabulary)
    if not changes:
        return []
    compared = [data for data in DATA if all(data in row.equal_tokens for row in changes)]
    heading = ["category", "codes", "kept", "of them moved", "replaced", "died", "newly used"]
    rows = [(*heading, *(f"equal tokens, {DATA[data]}, %" for data in compared))]
    for row in changes:
        numbers = (row.codes, row.kept, row.moved, row.replaced, row.died, row.newly_used)
        shares = (f"{100 * row.equal_tokens[data]:.1f}" for data in compared)
        rows.append((row.category, *(f"{number:,}" for number in numbers), *shares))
    return [Block("table", rows=rows)]
