"""Fused operations on groups of codebooks of different sizes, one folder each.

- `<op>/reference.py`: the formula in plain PyTorch.
- `<op>/op.py`: the public function with argument checks, the operator and its gradient, choice of implementation.
- `<op>/cpu.py`: calls of the native CPU kernels.
- `<op>/triton_*.py`: Triton kernels, imported where they run.
"""
