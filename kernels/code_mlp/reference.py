"""The network in plain PyTorch, differentiated by autograd.

A row's input e is its code vectors side by side, so the first layer is a sum over codebooks of products of one code:

    e W1 + b1  =  b1 + sum_g e_g(k) W1_g,    y = relu(e W1 + b1) W2 + b2.

The table of e_g(k) W1_g has a row per code. With dh the gradient of e W1 + b1, that of W1_g is the sum over the codes k
of e_g(k)^T times the sum of dh over the rows of code k; the gradient of the row's code vectors is dh W1^T.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(quantized: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """[B, E] outputs of code vectors quantized [B, sum D] with w1 [sum D, H], b1 [H], w2 [H, E] and b2 [E]."""
    return torch.relu(quantized @ w1 + b1) @ w2 + b2
