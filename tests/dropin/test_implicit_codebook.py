"""Implicit codebooks: outputs, losses and gradients against a formula in float64, also compiled."""

import pytest
import torch
from torch.nn import functional

import spinlock_fast as vq

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


def formula(layer, x):
    """Quantized x [N, D] and the commitment loss of every stage, with straight-through gradients."""
    residual, total, losses = x, torch.zeros_like(x), []
    for q, stage in enumerate(layer.layers):
        codes = stage.codebook[None] if q == 0 else layer.mlps[q - 1](stage.codebook, total[None])[0]  # [N or 1, K, D]
        nearest = (residual[:, None] - codes).square().sum(-1).argmin(-1)
        code = codes.expand(len(x), -1, -1)[torch.arange(len(x)), nearest]
        losses.append(functional.mse_loss(code, residual))
        total = total + residual + (code - residual).detach()
        residual = residual - code.detach()
    return total, torch.stack(losses)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_step_equals_formula_in_float64(compiled):
    torch.manual_seed(0)
    options = {"dim": 8, "codebook_size": 16, "num_quantizers": 3, "mlp_kwargs": {"depth": 1}}
    layer = vq.ResidualVQ(**options, implicit_neural_codebook=True, rotation_trick=False).double()
    parameters, x = list(layer.mlps.parameters()), torch.randn(40, 8, dtype=torch.float64, requires_grad=True)
    torch._dynamo.reset()
    run = torch.compile(layer, backend="aot_eager") if compiled else layer
    results = []
    for function in (lambda rows: formula(layer, rows), lambda rows: run(rows)[::2]):  # the call updates the codes
        quantized, loss = function(x)
        gradients = torch.autograd.grad(quantized.sin().sum() + loss.sum(), [x, *parameters])
        results.append((quantized, loss.squeeze(), *gradients))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)
