"""Benchmarks, run from the root of the repository: `python -m benchmarks.<room>.<name>`; see README.md."""
