"""Measures of drift and the verdict on them.

A measure counts as changed if it is both large and unlikely by chance. The population stability index (PSI) of n rows
against m rows in B bins is about (B - 1) (1 / n + 1 / m) if nothing has changed; only its excess over that is judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtrc
from scipy.stats import chi2

from spinlock_fast.drift.counts import DriftCounts
from spinlock_fast.models.reference_statistics import ReferenceStatistics

STABLE, WATCH, DRIFTED = "stable", "watch", "drifted"
STATUSES = (STABLE, WATCH, DRIFTED)

PSI_LIMITS = (0.1, 0.25)  # excess PSI of `watch` and `drifted`
SHARE_LIMITS = (0.05, 0.15)  # the same for the increase of a share of the rows
FALSE_ALARMS = 0.02  # probability that any measure of unchanged rows is significant, at most
DRIFTED_SHARE = 0.1  # share of the features, or of the codebooks, that makes the verdict `drifted`
_FEWEST_EXPECTED = 5  # rows in a bin; rarer bins are merged
FEW_ROWS = 100

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Change:
    """Size of a change in excess of what is expected, its p-value, and the limits of the size."""

    size: float
    p_value: float
    limits: tuple[float, float]

    def status(self, level: float) -> str:
        """The status at a significance level."""
        if self.p_value >= level:
            return STABLE
        return STATUSES[sum(self.size >= limit for limit in self.limits)]


def population_stability(counts: Ints, reference: Ints, *, ordered: bool) -> tuple[float, float, Change]:
    """PSI of counts [B] against reference counts [B], its expectation without change, and the change.

    Bins in which fewer than 5 rows are expected are merged with neighbours, or, if not `ordered`, with the next rarer.
    Shares are those of counts + 1/2, so that empty bins have a finite PSI. The p-value is that of Pearson's chi-squared
    test of two samples.
    """
    n, m = int(counts.sum()), int(reference.sum())
    if not n or not m:
        return 0.0, 0.0, Change(0.0, 1.0, PSI_LIMITS)
    order = np.arange(len(counts)) if ordered else np.argsort(-reference, kind="stable")
    a, b = _merged(counts[order], reference[order])
    if len(a) < 2:
        return 0.0, 0.0, Change(0.0, 1.0, PSI_LIMITS)
    p, q = (a + 0.5) / (n + 0.5 * len(a)), (b + 0.5) / (m + 0.5 * len(b))
    psi = float(((p - q) * np.log(p / q)).sum())
    expected = (len(a) - 1) * (1.0 / n + 1.0 / m)
    statistic = float(((a * np.sqrt(m / n) - b * np.sqrt(n / m)) ** 2 / (a + b)).sum())
    return psi, expected, Change(psi - expected, float(chi2.sf(statistic, len(a) - 1)), PSI_LIMITS)


def distance_growth(counts: Ints, reference: Ints) -> tuple[float, float, Change]:
    """`population_stability` of distances in ordered bins [B]; no change unless their mean bin has grown.

    Smaller distances are no drift: rows that the model was trained on are closer to their codes than the held-out rows
    of the reference.
    """
    psi, expected, change = population_stability(counts, reference, ordered=True)
    place = np.arange(len(counts))
    grown = counts @ place * reference.sum() > reference @ place * counts.sum()
    return psi, expected, change if grown else Change(0.0, 1.0, PSI_LIMITS)


def _merged(counts: Ints, reference: Ints) -> tuple[Ints, Ints]:
    """Counts of consecutive bins, merged until at least 5 rows are expected in each bin of both samples."""
    n, m = counts.sum(), reference.sum()
    smaller = min(n, m) / (n + m)
    starts, expected = [0], 0.0
    for i, rows in enumerate(counts + reference):
        if expected >= _FEWEST_EXPECTED:
            starts.append(i)
            expected = 0.0
        expected += smaller * rows
    if expected < _FEWEST_EXPECTED and len(starts) > 1:
        starts.pop()
    return np.add.reduceat(counts, starts), np.add.reduceat(reference, starts)


def share_increase(count: int, rows: int, reference: int, reference_rows: int) -> Change:
    """Increase of the share of rows; the p-value is that of the conditional binomial test of two counts."""
    total = count + reference
    p_value = float(bdtrc(count - 1, total, rows / (rows + reference_rows))) if count else 1.0
    return Change(count / rows - reference / reference_rows, p_value, SHARE_LIMITS)


def judge(counts: DriftCounts, reference: ReferenceStatistics) -> dict[str, Any]:
    """The verdict on the rows of a file.

    Returns:
        verdict, reasons (texts), rows, thresholds, and lists of features, codebooks and families with their measures
        and statuses; see docs/drift.md.
    """
    judged = [
        [_feature(counts, reference, f) for f in range(len(reference.features))],
        [_codebook(counts, reference, g) for g in range(len(reference.codebooks))],
        [_family(counts, reference, i) for i in range(len(reference.missing))],
    ]
    level = FALSE_ALARMS / sum(len(changes) for part in judged for _, changes in part)
    features, codebooks, families = ([_with_status(entry, level) for entry in part] for part in judged)
    verdict, reasons = _verdict(features, codebooks, families)
    rows, empty, overflowed = counts.rows.tolist()
    return {
        "verdict": verdict,
        "reasons": reasons,
        "rows": rows,
        "rows_without_a_family": empty,
        "rows_that_overflow": overflowed,
        "reference": {"rows": reference.rows, "distance_rows": reference.distance_rows},
        "thresholds": {
            "significance_level": level,
            "excess_psi": dict(zip(STATUSES[1:], PSI_LIMITS, strict=True)),
            "increase_of_share": dict(zip(STATUSES[1:], SHARE_LIMITS, strict=True)),
            "drifted_share": DRIFTED_SHARE,
        },
        "features": features,
        "codebooks": codebooks,
        "families": families,
    }


_Judged = tuple[dict[str, Any], dict[str, Change]]


def _feature(counts: DriftCounts, reference: ReferenceStatistics, f: int) -> _Judged:
    entry, rows = reference.features[f], int(counts.rows[0])
    bins = np.array(entry.values.counts)
    psi, expected, change = population_stability(counts.features[f, : len(bins)], bins, ordered=True)
    beyond, clipped = int(counts.features_beyond[f]), int(counts.clipped[f])
    measures = {
        "name": entry.name,
        "psi": psi,
        "psi_expected": expected,
        "beyond": beyond / rows,
        "beyond_in_training": entry.values.beyond / reference.rows,
        "clipped": clipped / rows,
        "clipped_in_training": entry.clipped / reference.rows,
    }
    return measures, {
        "distribution": change,
        "values beyond training's percentiles": share_increase(beyond, rows, entry.values.beyond, reference.rows),
        "clipped values": share_increase(clipped, rows, entry.clipped, reference.rows),
    }


def _codebook(counts: DriftCounts, reference: ReferenceStatistics, g: int) -> _Judged:
    entry, rows = reference.codebooks[g], int(counts.rows[0])
    used = np.array(entry.usage)
    usage = counts.usage[g, : len(used)]
    bins = np.array(entry.distance.counts)
    distances = counts.distances[g, : len(bins)]
    usage_psi, usage_expected, usage_change = population_stability(usage, used, ordered=False)
    psi, expected, change = distance_growth(distances, bins)
    beyond, unused = int(counts.distances_beyond[g]), int(usage[used == 0].sum())
    measures = {
        "name": entry.name,
        "usage_psi": usage_psi,
        "usage_psi_expected": usage_expected,
        "distance_psi": psi,
        "distance_psi_expected": expected,
        "distance_edges": entry.distance.edges,
        "distance_shares": (distances / rows).tolist(),
        "distance_shares_in_training": (bins / reference.distance_rows).tolist(),
        "beyond": beyond / rows,
        "beyond_in_training": entry.distance.beyond / reference.distance_rows,
        "codes_unused_in_training": np.flatnonzero((used == 0) & (usage > 0)).tolist(),
        "share_of_unused_codes": unused / rows,
    }
    return measures, {
        "use of codes": usage_change,
        "distances": change,
        "distances beyond training's percentile": share_increase(
            beyond, rows, entry.distance.beyond, reference.distance_rows
        ),
        "codes that training did not use": share_increase(unused, rows, 0, reference.rows),
    }


def _family(counts: DriftCounts, reference: ReferenceStatistics, i: int) -> _Judged:
    """Missing values; those of a row are not independent, so rows are counted, not values."""
    name, (missing_then, values_then) = list(reference.missing.items())[i]
    missing, values = counts.missing[i].tolist()
    share, share_then = missing / max(values, 1), missing_then / max(values_then, 1)
    rows = int(counts.rows[:2].sum())
    change = share_increase(round(share * rows), rows, round(share_then * reference.rows), reference.rows)
    measures = {"name": name, "missing": share, "missing_in_training": share_then}
    return measures, {"missing values": change}


def _with_status(judged: _Judged, level: float) -> dict[str, Any]:
    """The measures of an entry with its worst status and what has changed."""
    measures, changes = judged
    statuses = {name: change.status(level) for name, change in changes.items()}
    worst = max(statuses.values(), key=STATUSES.index)
    changed = [name for name, status in statuses.items() if status != STABLE]
    return {**measures, "p_value": min(c.p_value for c in changes.values()), "status": worst, "changed": changed}


def _verdict(*parts: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """`drifted` if a tenth of the features or of the codebooks, or a family, is; `watch` if any entry has changed."""
    reasons, verdict = [], STABLE
    for kind, entries in zip(("features", "codebooks", "families"), parts, strict=True):
        drifted = [entry for entry in entries if entry["status"] == DRIFTED]
        changed = [entry for entry in entries if entry["status"] != STABLE]
        if not changed:
            continue
        share = 0.0 if kind == "families" else DRIFTED_SHARE
        is_drifted = bool(drifted) and len(drifted) >= share * len(entries)
        verdict = DRIFTED if is_drifted or verdict == DRIFTED else WATCH
        what = sorted({name for entry in changed for name in entry["changed"]})
        watched = len(changed) - len(drifted)
        reasons.append(f"{len(drifted)} of {len(entries)} {kind} drifted, {watched} to watch: {', '.join(what)}")
    return verdict, reasons
