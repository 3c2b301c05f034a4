"""Dashboards of a checkpoint: engineering, topological, semantic; comparison of several. Needs the extra `report`."""

from spinlock_fast.report.comparison_write import write_comparison
from spinlock_fast.report.figures import engineering, semantic, topological
from spinlock_fast.report.write import KINDS, write_report

__all__ = ["KINDS", "engineering", "semantic", "topological", "write_comparison", "write_report"]
