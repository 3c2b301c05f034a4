"""Comparison with the quantizers of vector-quantize-pytorch on the same weights and batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import spinlock_fast


def pair(name: str, seed: int = 3, **arguments: Any) -> tuple[nn.Module, nn.Module]:
    """The reference layer and ours with the same state dict."""
    import vector_quantize_pytorch

    torch.manual_seed(seed)
    theirs = getattr(vector_quantize_pytorch, name)(**arguments)
    ours = getattr(spinlock_fast, name)(**arguments)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def batches(shape: tuple[int, ...], steps: int) -> Iterator[Tensor]:
    for step in range(steps):
        yield torch.randn(*shape, generator=torch.Generator().manual_seed(step))


def step(module: nn.Module, x: Tensor, differentiable: bool = True, **call: Any) -> tuple[Any, list[Tensor]]:
    """Outputs of `forward` and gradients of the input and the parameters, followed by a small parameter step."""
    leaf = x.clone().requires_grad_(differentiable)
    torch.manual_seed(7)
    returned = module(leaf, **call)
    weight = torch.randn(returned[0].shape, generator=torch.Generator().manual_seed(99)).to(returned[0].dtype)
    total = (returned[0] * weight).sum() + returned[1 if len(returned) == 2 else 2].sum()
    if total.requires_grad:
        total.backward()
    parameters = [p for _, p in sorted(module.named_parameters()) if p.grad is not None]
    gradients = [p.grad.clone() for p in [leaf, *parameters] if p.grad is not None]
    with torch.no_grad():
        for parameter in parameters:
            parameter -= 0.1 * parameter.grad
            parameter.grad = None
    return returned, gradients


def assert_alike(theirs: Any, ours: Any, where: str, tolerance: float = 1e-3) -> None:
    """Equal shapes, types and integers; floats within a tolerance relative to the largest."""
    if not isinstance(theirs, Tensor):
        for i, (one, other) in enumerate(zip(theirs, ours, strict=True)):
            assert_alike(one, other, f"{where}[{i}]", tolerance)
        return
    assert theirs.shape == ours.shape, where
    assert theirs.dtype == ours.dtype, where
    if not theirs.is_floating_point():
        assert torch.equal(theirs, ours), where
        return
    assert torch.equal(theirs.isnan(), ours.isnan()), where
    theirs, ours = theirs.double().nan_to_num(), ours.double().nan_to_num()
    bound = tolerance * (1e-2 + theirs.abs().max()) if theirs.numel() else 0.0
    assert (theirs - ours).abs().max() <= bound if theirs.numel() else True, (where, float((theirs - ours).abs().max()))


def assert_same_training(
    name: str,
    arguments: dict[str, Any],
    shape: tuple[int, ...] = (2, 12, 8),
    steps: int = 10,
    differentiable: bool = True,
    call: Callable[[int], dict[str, Any]] = lambda step: {},
) -> None:
    """Outputs, gradients and states of `steps` steps agree, outputs in eval mode agree, and weights load back."""
    theirs, ours = pair(name, **arguments)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for i, x in enumerate(batches(shape, steps)):
        expected, expected_grads = step(theirs.train(), x, differentiable, **call(i))
        returned, grads = step(ours.train(), x, differentiable, **call(i))
        assert_alike(expected, returned, f"step {i}, returned")
        assert_alike(expected_grads, grads, f"step {i}, gradients")
        assert_alike(list(theirs.state_dict().values()), list(ours.state_dict().values()), f"step {i}, state")
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(*shape)
    assert_alike(theirs.eval()(x, **call(0)), ours.eval()(x, **call(0)), "eval")
