"""Checkpoint directories: what a run leaves on disk, how it is written, checked and read back."""
