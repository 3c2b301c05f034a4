"""Data sets: simulation, reading, expansion and the statistics of their tokens."""
