"""Predicts tokens from the parameters and the initial field of a simulation, without the simulation."""
