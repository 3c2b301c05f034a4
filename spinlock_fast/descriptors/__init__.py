"""Features of trajectories: per step (TEMPORAL), per trajectory and over realizations (SUMMARY)."""
