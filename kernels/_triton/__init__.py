"""Helpers that several Triton kernels share."""
