"""Generates docs/features.md, the list of all features."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

from spinlock_fast.descriptors.registry import CROSS_IN_SUMMARY, PER_TRAJECTORY, TEMPORAL, Feature
from spinlock_fast.simulate.parameters import PARAMETER_NAMES

_INTRODUCTION = """# Features

What `python -m spinlock_fast.generate` computes. This page is made from
`spinlock_fast/descriptors/registry.py` by `spinlock_fast/simulate/feature_page.py`; a test compares the two.

u is the field's unit, px a grid spacing, side the length of the periodic square, step one update, 1 a pure
number; `< >` is the mean over the grid. States are `u_1 .. u_T`; `u_0` is `inputs/fields`. Every ratio has a tiny
constant under it, so that a zero field gives finite values. Spatial and spectral features are computed
for each channel and averaged over the three.

- **TEMPORAL** `features/temporal/features` [N, T, 63]: the first three tables, averaged over realizations.
- **SUMMARY** `features/summary/per_trajectory/features` [N, M, 120]: the mean over time of the spatial, spectral
  and twelve of the cross-channel features, then the tables temporal, causality, invariant_drift and
  operator_sensitivity (NaN unless `--operator-sensitivity`; Phi is one step without noise and dropout, u the last
  state of the trajectory). Probes are 64 fixed points of the grid.
- `features/summary/aggregated/features` [N, 360]: mean, standard deviation (over M, not M - 1) and coefficient of
  variation (`std / |mean|`, at most 100) over realizations, 120 columns each.
- **ARCHITECTURE** `features/architecture/aggregated/features` [N, 12]: theta scaled to [0, 1]; `parameters/params`
  holds it in its own units, a choice as its position in the list of choices.

Fields are clipped at +/- `clip` (10) at every step. `metadata/diverged` is 1 where, at some step of some
realization, at least one percent of a state's values lay at that bound.
"""


def markdown() -> str:
    """The page docs/features.md."""
    parts = [_INTRODUCTION]
    parts += _tables("TEMPORAL", TEMPORAL)
    parts += _tables("SUMMARY per trajectory", PER_TRAJECTORY, skip=("spatial", "spectral", "cross_channel"))
    parts.append(f"\n## SUMMARY, cross_channel\n\nMeans over time of {', '.join(CROSS_IN_SUMMARY)}.\n")
    parts.append("\n## ARCHITECTURE\n\n" + ", ".join(PARAMETER_NAMES) + ".\n")
    return "".join(parts)


def _as_html(formula: str) -> str:
    """A formula with Markdown characters escaped; as code where it has mathematical signs."""
    text = html.escape(formula, quote=False)
    for sign in "|*_`\\":
        text = text.replace(sign, f"&#{ord(sign)};")
    return f"<code>{text}</code>" if re.search(r"[<>|^=/]|sqrt|\bln\b", formula) else text


def _tables(title: str, groups: dict[str, tuple[Feature, ...]], skip: Iterable[str] = ()) -> list[str]:
    out, column = [], 0
    for group, features in groups.items():
        rows = [
            f"| {column + i} | `{group}_{f.name}` | {f.unit} | {_as_html(f.formula)} | {f.source} |"
            for i, f in enumerate(features)
        ]
        column += len(features)
        if group not in skip:
            head = "| column | name | unit | formula | source |\n| --- | --- | --- | --- | --- |\n"
            out.append(f"\n## {title}, {group} ({len(features)})\n\n{head}" + "\n".join(rows) + "\n")
    return out
