"""The loss that quantizers return: in-place changes, gradients of constant inputs and of its weight."""

import pytest
import torch

from spinlock_fast import ResidualVQ, VectorQuantize


@pytest.mark.parametrize("cls", [VectorQuantize, ResidualVQ])
@pytest.mark.parametrize("options", [{}, {"learnable_codebook": True, "ema_update": False}, {"decay": 0.5}], ids=str)
def test_loss_of_constant_input_can_be_changed_in_place(cls, options):
    """`loss.backward()` works without a gradient, and `loss += other` as with vector-quantize-pytorch."""
    layer = cls(dim=8, codebook_size=16, **options, **({"num_quantizers": 2} if cls is ResidualVQ else {}))
    loss = layer(torch.randn(2, 5, 8))[2]
    loss += 1.0
    loss.sum().backward()


@pytest.mark.parametrize("cls", [VectorQuantize, ResidualVQ])
def test_loss_without_gradients_requires_none(cls):
    layer = cls(dim=8, codebook_size=16, **({"num_quantizers": 2} if cls is ResidualVQ else {}))
    with torch.no_grad():
        loss = layer(torch.randn(2, 5, 8))[2]
    assert loss.numpy().sum() > 0


def test_commitment_weight_may_be_a_parameter():
    layer = VectorQuantize(dim=8, codebook_size=16)
    layer.commitment_weight = torch.nn.Parameter(torch.tensor(2.0))
    loss = layer(torch.randn(2, 5, 8))[2]
    loss.backward()
    torch.testing.assert_close(layer.commitment_weight.grad, loss.detach() / 2)
