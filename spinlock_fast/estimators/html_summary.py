"""HTML of tokenizers and training results for notebooks: no script, and the colours of the notebook's theme."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spinlock_fast.messages import printable, shown
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE

_MAX_CATEGORIES = 100
# Inherited colours only: notebooks have themes of their own, light or dark, whatever the system prefers.
_TABLE = "border-collapse:collapse;text-align:left;color:inherit;background:none"
_CELL = "padding:.15em 1.2em .15em 0;border-bottom:1px solid rgba(128,128,128,.4);text-align:left;color:inherit"


def model_html(
    title: str,
    model: CategoricalHierarchicalVQVAE,
    feature_names: Sequence[str],
    metrics: Mapping[str, Any],
    more: Iterable[tuple[str, str]] = (),
) -> str:
    """Sizes of a model, further rows, main metrics, and its categories.

    Args:
        feature_names: [F], or empty.
        metrics: contents of metrics.json; entries that are not numbers are left out.
        more: labels and values.
    """
    rows = [*_model_rows(model), *more, *_metric_rows(metrics)]
    return _div(title, rows, _categories(model, feature_names))


def tokenizer_html(tokenizer: Any) -> str:
    """`model_html` of a fitted `Tokenizer`, with its families and checkpoint."""
    families = ", ".join(f"{family.name} ({family.encoder_name})" for family in tokenizer.families)
    more = [("families", families), ("checkpoint", tokenizer.checkpoint_hash[:12] or "not saved")]
    return model_html("Tokenizer", tokenizer.model, tokenizer.feature_names, tokenizer.metrics, more)


def unfitted_html(title: str, settings: Mapping[str, Any] | None) -> str:
    """The settings of an estimator that is not fitted."""
    given = settings.items() if isinstance(settings, Mapping) else ()
    rows = [(str(name), value if isinstance(value, str) else shown(value)) for name, value in given]
    return _div(f"{title} (not fitted)", rows)


def _div(title: str, rows: Sequence[tuple[str, str]], details: str = "") -> str:
    cells = "".join(f"<tr><th {_style('row')}>{_text(k)}</th><td {_style()}>{_text(v)}</td></tr>" for k, v in rows)
    table = f'<table style="{_TABLE}"><tbody>{cells}</tbody></table>' if cells else ""
    return f'<div style="color:inherit"><strong>{_text(title)}</strong>{table}{details}</div>'


def _model_rows(model: CategoricalHierarchicalVQVAE) -> list[tuple[str, str]]:
    """Sizes of a model."""
    codes = [codebook.num_tokens for codebooks in model.levels.values() for codebook in codebooks]
    bits = sum(map(math.log2, codes))
    return [
        ("tokens", f"[N, {len(codes)}], {bits:.1f} bits a row"),
        ("codes", f"{sum(codes):,} in {len(codes):,} codebooks of {len(model.categories):,} categories"),
        ("features", f"{model.config.input_dim:,}"),
    ]


def _metric_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The main metrics of metrics.json; entries that are not numbers are left out."""
    on = metrics.get("val_rows")
    where = "rows" if metrics.get("rows") == "all" else "validation rows"
    rows = [
        (label, f"{value:.4f}")
        for label, key in (
            ("quality", "quality"),
            ("reconstruction error", "reconstruction_error"),
            ("utilization", "utilization"),
            ("perplexity / K", "perplexity_over_k"),
        )
        if isinstance(value := metrics.get(key), int | float)
    ]
    return [*rows, ("measured on", f"{on:,} {where}")] if rows and isinstance(on, int) else rows


def _categories(model: CategoricalHierarchicalVQVAE, names: Sequence[str]) -> str:
    """A folded table of the categories: number of features, codes of each level, first features."""
    head = ("category", "features", "codes", "first features")
    shown_groups = list(model.config.group_indices.items())[:_MAX_CATEGORIES]
    rows = []
    for category, members in shown_groups:
        codes = " / ".join(str(codebook.num_tokens) for codebook in model.levels[category])
        first = ", ".join(names[i] for i in members[:3] if i < len(names))
        rows.append((category, f"{len(members):,}", codes, first + (", …" if len(members) > 3 and first else "")))
    body = "".join(f"<tr>{''.join(f'<td {_style()}>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    header = "".join(f"<th {_style('col')}>{_text(cell)}</th>" for cell in head)
    more = len(model.categories) - len(rows)
    rest = f"<p>{more:,} more</p>" if more > 0 else ""
    table = f'<table style="{_TABLE}"><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>'
    return f"<details><summary>{len(model.categories):,} categories</summary>{table}{rest}</details>"


def _style(scope: str = "") -> str:
    return f'scope="{scope}" style="{_CELL}"' if scope else f'style="{_CELL}"'


def _text(text: str) -> str:
    return html.escape(printable(text))
