"""Kernel launches that `python -m spinlock_fast.kernels.report` compiles without a GPU: a module per operation.

Each has a function `launches(capability)`: its kernels at the shapes and tile sizes of a training step.
"""
