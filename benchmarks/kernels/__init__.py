"""Quantizer kernels and layers."""
