"""Double backward and torch.func through quantizers."""

import copy

import pytest
import torch

import spinlock_fast as vq

pytestmark = pytest.mark.filterwarnings("ignore:.* is not fused:UserWarning")

QUANTIZERS = {
    "vector": lambda: vq.VectorQuantize(dim=4, codebook_size=6, rotation_trick=False),
    "heads": lambda: vq.VectorQuantize(dim=4, codebook_size=6, heads=2, separate_codebook_per_head=True),
    "cosine": lambda: vq.VectorQuantize(dim=4, codebook_size=6, use_cosine_sim=True, rotation_trick=True),
    "residual": lambda: vq.ResidualVQ(dim=4, codebook_size=6, num_quantizers=2),
    "no commitment": lambda: vq.VectorQuantize(dim=4, codebook_size=6, commitment_weight=0.0),
    "affine": lambda: vq.VectorQuantize(dim=4, codebook_size=6, affine_param=True),
}
NAMES = pytest.mark.parametrize("name", QUANTIZERS)


def penalised(layer, x, dtype=torch.float32):
    """The gradient d loss / dx and the gradient of |d loss / dx|^2 by x."""
    x = x.to(dtype).requires_grad_()
    found, _, loss, *_ = layer(x)
    (grad,) = torch.autograd.grad(found.square().sum() + loss.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    return grad.detach(), second


@NAMES
def test_gradient_penalty(name):
    layer = QUANTIZERS[name]()
    x = torch.randn(2, 3, 4)
    grad, second = penalised(copy.deepcopy(layer), x)
    leaf = x.clone().requires_grad_()
    found, _, loss, *_ = copy.deepcopy(layer)(leaf)
    (expected,) = torch.autograd.grad(found.square().sum() + loss.sum(), leaf)
    torch.testing.assert_close(grad, expected)
    # d |g|^2 / dx = 2 H g, the change of g along g: codes are constant in a small neighbourhood.
    assert torch.isfinite(second).all()
    assert second.abs().max() > 0


def test_gradient_penalty_of_straight_through():
    """quantized = x + sg(q - x), loss = w |x - q|^2 / n: the gradient is 2 q + 2 w (x - q) / n."""
    layer = vq.VectorQuantize(dim=4, codebook_size=6, rotation_trick=False, commitment_weight=0.5)
    x = torch.randn(2, 3, 4)
    quantized = copy.deepcopy(layer)(x)[0]
    grad, second = penalised(layer, x)
    share = 2.0 * 0.5 / x.numel()
    torch.testing.assert_close(grad, 2.0 * quantized + share * (x - quantized))
    torch.testing.assert_close(second, 2.0 * (2.0 + share) * grad)


@NAMES
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # forward mode, of torch
def test_torch_func(name):
    layer = QUANTIZERS[name]()
    x = torch.randn(2, 3, 4)

    def value(rows):
        # A copy per call: `affine_param` updates its statistics in every call.
        found, _, loss, *_ = copy.deepcopy(layer)(rows, freeze_codebook=True)
        return found.square().sum() + loss.sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(value(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(value)(x), expected)
    torch.testing.assert_close(torch.func.vjp(value, x)[1](torch.ones(()))[0], expected)


def test_gradient_penalty_through_the_grouped_quantizer_and_model():
    quantizer = vq.GroupedVectorQuantizer([5, 3], [3, 2], codebook_init="uniform")
    z = torch.randn(7, 5, requires_grad=True)
    quantized, _, loss = quantizer(z)
    (grad,) = torch.autograd.grad(quantized.square().sum() + loss, z, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), z)
    assert second.abs().max() > 0


@pytest.mark.parametrize("training", [True, False])
def test_torch_func_does_not_change_affine_statistics(training):
    layer = QUANTIZERS["affine"]()
    layer(torch.randn(2, 3, 4))
    layer.train(training)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    torch.func.grad(lambda rows: layer(rows, freeze_codebook=True)[0].sum())(torch.randn(2, 3, 4))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
