import pytest
import torch
from torch import nn

from spinlock_fast.models.layers import (
    GroupedLayerNorm,
    GroupedLinear,
    RaggedInputLinear,
    RaggedLayerNorm,
    RaggedOutputLinear,
)

SIZES = [4, 1, 7, 3]
WIDTH = 5
BATCH = 6


def randomize(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.double()


def split_rows(parameter: torch.Tensor) -> list[torch.Tensor]:
    return list(parameter.split(SIZES))


def linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    """A torch layer with weight [out, in] and bias [out]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    layer.bias.data.copy_(bias)
    return layer


def norm(weight: torch.Tensor, bias: torch.Tensor) -> nn.LayerNorm:
    layer = nn.LayerNorm(weight.shape[0], dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    layer.bias.data.copy_(bias)
    return layer


def ragged_input():
    ours = randomize(RaggedInputLinear(SIZES, WIDTH))
    loop = [linear(w.t(), b) for w, b in zip(split_rows(ours.weight), ours.bias, strict=True)]

    def weights(grads):
        return torch.cat([w.t() for w, _ in grads]), torch.stack([b for _, b in grads])

    return ours, loop, lambda x: x.split(SIZES, 1), lambda parts: torch.stack(parts), weights, (BATCH, sum(SIZES))


def ragged_output():
    ours = randomize(RaggedOutputLinear(WIDTH, SIZES))
    loop = [linear(w, b) for w, b in zip(split_rows(ours.weight), split_rows(ours.bias), strict=True)]

    def weights(grads):
        return torch.cat([w for w, _ in grads]), torch.cat([b for _, b in grads])

    return ours, loop, lambda x: x.unbind(0), lambda parts: torch.cat(parts, 1), weights, (len(SIZES), BATCH, WIDTH)


def grouped():
    ours = randomize(GroupedLinear(4, WIDTH, 3))
    loop = [linear(w.t(), b) for w, b in zip(ours.weight, ours.bias, strict=True)]

    def weights(grads):
        return torch.stack([w.t() for w, _ in grads]), torch.stack([b for _, b in grads])

    return ours, loop, lambda x: x.unbind(0), lambda parts: torch.stack(parts), weights, (4, BATCH, WIDTH)


def grouped_norm():
    ours = randomize(GroupedLayerNorm(4, WIDTH))
    loop = [norm(w, b) for w, b in zip(ours.weight, ours.bias, strict=True)]

    def weights(grads):
        return torch.stack([w for w, _ in grads]), torch.stack([b for _, b in grads])

    return ours, loop, lambda x: x.unbind(0), lambda parts: torch.stack(parts), weights, (4, BATCH, WIDTH)


def ragged_norm():
    ours = randomize(RaggedLayerNorm(SIZES))
    loop = [norm(w, b) for w, b in zip(split_rows(ours.weight), split_rows(ours.bias), strict=True)]

    def weights(grads):
        return torch.cat([w for w, _ in grads]), torch.cat([b for _, b in grads])

    return ours, loop, lambda x: x.split(SIZES, 1), lambda parts: torch.cat(parts, 1), weights, (BATCH, sum(SIZES))


@pytest.mark.parametrize("case", [ragged_input, ragged_output, grouped, grouped_norm, ragged_norm])
def test_values_and_gradients_equal_a_loop_of_torch_layers(case):
    ours, loop, split, join, weights, shape = case()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out = ours(x)
    expected = join([layer(part) for layer, part in zip(loop, split(y), strict=True)])
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, y.grad)
    for parameter, gradient in zip(
        ours.parameters(), weights([(layer.weight.grad, layer.bias.grad) for layer in loop]), strict=True
    ):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("case", [ragged_input, ragged_output, grouped, grouped_norm, ragged_norm])
def test_empty_batch(case):
    ours, _, _, _, _, shape = case()
    empty = tuple(0 if size == BATCH else size for size in shape)
    assert ours(torch.zeros(empty, dtype=torch.float64)).numel() == 0


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [
        (lambda: RaggedInputLinear([400, 4], 200), [400, 4]),
        (lambda: RaggedOutputLinear(64, [200, 100]), [64, 64]),
        (lambda: GroupedLinear(2, 100, 200), [100, 100]),
    ],
)
def test_initial_weights_follow_torch_linear(layer, fan_in):
    module = layer()
    if isinstance(module, RaggedInputLinear):
        parts = list(zip(module.weight.split([400, 4]), module.bias, strict=True))
    elif isinstance(module, RaggedOutputLinear):
        parts = list(zip(module.weight.split([200, 100]), module.bias.split([200, 100]), strict=True))
    else:
        parts = list(zip(module.weight, module.bias, strict=True))
    for (weight, bias), n in zip(parts, fan_in, strict=True):
        bound = n**-0.5
        for values in (weight, bias):
            assert values.abs().max() <= bound
            assert values.abs().max() > 0.9 * bound
            assert values.mean().abs() < 0.2 * bound


@pytest.mark.parametrize("layer", [GroupedLayerNorm(2, 3), RaggedLayerNorm([3, 2])])
def test_layer_norm_is_initialised_to_identity(layer):
    assert (layer.weight == 1).all()
    assert not layer.bias.any()


def test_equal_values_normalise_to_the_bias():
    layer = RaggedLayerNorm([1, 3])
    layer.bias.data.copy_(torch.arange(4.0))
    x = torch.full((2, 4), 7.0, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert torch.equal(out, torch.arange(4.0).expand(2, 4))
    assert x.grad.isfinite().all()


def test_variance_is_accurate_with_a_large_offset():
    layer = RaggedLayerNorm([8])
    x = torch.randn(4, 8)
    ours = layer(x + 1000.0).double()
    exact = nn.functional.layer_norm((x + 1000.0).double(), [8])
    eager = nn.functional.layer_norm(x + 1000.0, [8]).double()
    assert (ours - exact).abs().max() <= 2.0 * (eager - exact).abs().max() + 1e-6


def test_state_dict_has_no_index_tensors():
    for layer in (RaggedInputLinear(SIZES, 2), RaggedOutputLinear(2, SIZES), RaggedLayerNorm(SIZES)):
        assert set(layer.state_dict()) == {"weight", "bias"}
