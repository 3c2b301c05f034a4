"""Simulation of stochastic neural operators and their features, from a seed to an HDF5 file."""
