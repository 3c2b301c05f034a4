"""Checkpoint directories: writing, integrity checks and reading."""
