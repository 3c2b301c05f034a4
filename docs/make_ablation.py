"""Writes the tables of docs/ablation.md from benchmarks/results/ablation_*.csv, results.csv files of `ablate`.

    python docs/make_ablation.py

The page is committed; tests/ablation/test_page.py compares the two.
"""

from __future__ import annotations

import re
from pathlib import Path

from spinlock_fast.ablation.records import read_csv
from spinlock_fast.ablation.tables import markdown

PAGE = Path(__file__).with_name("ablation.md")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
_BLOCK = re.compile(
    r"(<!-- tables of (\S+\.csv), by make_ablation.py -->\n).*?(<!-- end of the tables -->\n)", re.DOTALL
)


def page() -> str:
    """The text of the page with current tables."""

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{markdown(read_csv(RESULTS / match[2]))}\n{match[3]}"

    return _BLOCK.sub(block, PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
