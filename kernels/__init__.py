"""Fused operations on groups of ragged codebooks, one folder each.

`<op>/reference.py` holds the mathematics in plain PyTorch, `<op>/op.py` what callers import.
"""
