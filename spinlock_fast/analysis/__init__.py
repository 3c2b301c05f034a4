"""What tokens mean: statistics of codes and codebooks against features, parameters and conditions.

Every statistic, its formula and its source: docs/tokens.md.
"""

from __future__ import annotations

from spinlock_fast.analysis.run import Analysis, AnalysisConfig, analyze, analyze_observations
from spinlock_fast.analysis.tables import Table, write_tables

__all__ = ["Analysis", "AnalysisConfig", "Table", "analyze", "analyze_observations", "write_tables"]
