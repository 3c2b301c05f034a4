"""Writes the tables of docs/ablation.md from benchmarks/results/ablation_cpu.csv, a results.csv of `ablate`.

    python docs/make_ablation.py

The page is committed; tests/ablation/test_page.py compares the two.
"""

from __future__ import annotations

from pathlib import Path

from spinlock_fast.ablation.records import read_csv
from spinlock_fast.ablation.tables import markdown

PAGE = Path(__file__).with_name("ablation.md")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "ablation_cpu.csv"
_START, _END = "<!-- tables of make_ablation.py -->\n", "<!-- end of the tables -->\n"


def page() -> str:
    """The text of the page with current tables."""
    before, rest = PAGE.read_text(encoding="utf-8").split(_START)
    after = rest.split(_END)[1]
    return f"{before}{_START}\n{markdown(read_csv(RESULTS))}\n{_END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
