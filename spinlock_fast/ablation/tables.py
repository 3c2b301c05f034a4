"""The tables of an ablation: means of each variant, and differences to the base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spinlock_fast.ablation.plan import BASE
from spinlock_fast.ablation.records import MEASURES, Record
from spinlock_fast.ablation.statistics import PairedDifference, Summary, paired_difference, summarize


def compared(measures: Iterable[str]) -> list[str]:
    """The measures whose differences are shown: seconds depend on what else the machine does."""
    return [name for name in measures if name != "seconds"]


COMPARED = compared(MEASURES)


@dataclass(frozen=True)
class Row:
    """A variant in the table."""

    variant: str
    seeds: list[int]
    features: float | None  # mean number over seeds; None if it was not recorded
    summaries: dict[str, Summary]
    differences: dict[str, PairedDifference]  # to the base; empty for the base itself, or without common seeds


def table_of(records: Sequence[Record], measures: Iterable[str] = MEASURES, base: str = BASE) -> list[Row]:
    """One row per variant, in order of their first records.

    Args:
        records: at least one.
        measures: names of measures that every record has.
        base: the variant that the others are compared with.
    """
    variants = dict.fromkeys(record.variant for record in records)
    reference = {record.seed: record for record in records if record.variant == base}
    rows = []
    for variant in variants:
        own = {record.seed: record for record in records if record.variant == variant}
        summaries, differences = {}, {}
        for name in measures:
            summary = summarize([record.measures[name] for record in own.values()])
            assert summary is not None  # every variant has a record
            summaries[name] = summary
            difference = paired_difference(_by_seed(own, name), _by_seed(reference, name))
            if difference is not None and variant != base and name in compared(measures):
                differences[name] = difference
        counts = [record.counts["features"] for record in own.values() if "features" in record.counts]
        rows.append(Row(variant, sorted(own), float(np.mean(counts)) if counts else None, summaries, differences))
    return rows


def _by_seed(records: dict[int, Record], name: str) -> dict[int, float]:
    return {seed: record.measures[name] for seed, record in records.items()}


def summary_cell(name: str, summary: Summary) -> str:
    """Mean and standard deviation of a measure as text."""
    digits = 1 if name == "seconds" else 3
    spread = "" if summary.spread is None else f" ± {summary.spread:.{digits}f}"
    return f"{summary.mean:.{digits}f}{spread}"


def difference_cell(difference: PairedDifference | None) -> str:
    """Mean difference and interval as text."""
    if difference is None:
        return "-"
    if difference.low is None or difference.high is None:
        return f"{difference.mean:+.3f}"
    return f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"


def markdown(
    records: Sequence[Record],
    measures: Mapping[str, str] = MEASURES,
    base: str = BASE,
    scored: str = "the validation rows",
) -> str:
    """The two tables as Markdown: means, and differences to the base.

    Args:
        records: at least one.
        measures: names and headings of measures that every record has.
        base: the variant that the others are compared with.
        scored: what the measures are of.
    """
    rows = table_of(records, measures, base)
    dates = sorted({record.date for record in records})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    where = ", ".join(filter(None, [*dict.fromkeys(record.device for record in records), when]))
    counted = [row.features for row in rows if row.features is not None]
    means = [
        [f"`{row.variant}`", str(len(row.seeds)), *([f"{row.features:.0f}"] if row.features is not None else [])]
        + [summary_cell(name, row.summaries[name]) for name in measures]
        for row in rows
    ]
    parts = [
        f"Mean ± standard deviation over seeds, on {scored}{f' ({where})' * bool(where)}.\n",
        _markdown_table(["variant", "seeds", *(["features"] if counted else []), *measures.values()], means),
    ]
    if len(set(counted)) > 1:
        parts.append("Variants with another number of features are measured on other features than the base.\n")
    names = compared(measures)
    changes = [
        [f"`{row.variant}`", str(max(difference.pairs for difference in row.differences.values()))]
        + [_emphasized(row.differences.get(name)) for name in names]
        for row in rows
        if row.differences
    ]
    if changes:
        parts += [
            "Mean paired difference to the base, with its 95 % interval (Student's t over pairs of equal seeds); "
            "bold: the interval excludes 0.\n",
            _markdown_table(["variant", "pairs", *(measures[name] for name in names)], changes),
        ]
    return "\n".join(parts)


def _emphasized(difference: PairedDifference | None) -> str:
    text = difference_cell(difference)
    return f"**{text}**" if difference is not None and difference.excludes_zero else text


def _markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)
