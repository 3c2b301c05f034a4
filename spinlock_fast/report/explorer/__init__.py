"""One offline HTML page that shows what the tokens of a checkpoint mean: docs/dashboards.md."""

from __future__ import annotations

from spinlock_fast.report.explorer.write import write_explorer

__all__ = ["write_explorer"]
