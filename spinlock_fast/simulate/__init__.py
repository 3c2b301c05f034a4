"""Simulated operators: from a seed to the HDF5 file that the main job trains on."""
