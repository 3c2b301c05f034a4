"""Writes the tables of docs/transfer.md from benchmarks/results/transfer_*.csv, results of studies/transfer.py.

    python docs/make_transfer.py

The page is committed; tests/training/test_transfer.py compares the two.
"""

from __future__ import annotations

import csv
import math
import re
import statistics
from pathlib import Path

PAGE = Path(__file__).with_name("transfer.md")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
_BLOCK = re.compile(
    r"(<!-- tables of (\S+\.csv), by make_transfer.py -->\n).*?(<!-- end of the tables -->\n)", re.DOTALL
)
_NAMES = {
    "from scratch": "from scratch",
    "freeze none": "`--init-from`",
    "freeze codes": "`--init-from --freeze codes`",
    "freeze tokens": "`--init-from --freeze tokens`",
}
_ALONE = "checkpoint alone"

Rows = list[dict[str, str]]


def page() -> str:
    """The text of the page with current tables."""

    def block(match: re.Match[str]) -> str:
        with open(RESULTS / match[2], newline="", encoding="utf-8") as file:
            return f"{match[1]}\n{tables(list(csv.DictReader(file)))}\n{match[3]}"

    return _BLOCK.sub(block, PAGE.read_text(encoding="utf-8"))


def tables(rows: Rows) -> str:
    """Errors, and tokens of source rows, of every method by the number of rows."""
    counts = sorted({int(row["rows"]) for row in rows} - {0})
    seeds = len({row["seed"] for row in rows})
    texts = [f"Error on held-out rows of the target, mean ± standard deviation over {seeds} seeds.\n"]
    texts += _table(rows, counts, "error")
    texts.append("\nShare of the tokens of source rows that are those of the checkpoint.\n")
    texts += _table([row for row in rows if row["method"] != "from scratch"], counts, "equal_tokens_source")
    return "\n".join(texts) + "\n"


def _table(rows: Rows, counts: list[int], measure: str) -> list[str]:
    lines = [f"| | {' | '.join(f'{count:,} rows' for count in counts)} |", "| --- |" + " ---: |" * len(counts)]
    for method, name in _NAMES.items():
        if any(row["method"] == method for row in rows):
            cells = [_cell([row for row in rows if row["rows"] == str(count)], method, measure) for count in counts]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    alone = _cell(rows, _ALONE, measure)
    return [*lines, f"| the checkpoint, not trained further | {' | '.join([alone] * len(counts))} |"]


def _cell(rows: Rows, method: str, measure: str) -> str:
    values = [float(row[measure]) for row in rows if row["method"] == method]
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return "too few rows"
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {spread:.3f}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
