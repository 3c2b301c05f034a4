"""Timing, reference implementations and subprocesses that the benchmarks share."""
