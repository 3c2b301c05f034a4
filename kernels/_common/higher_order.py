"""Higher derivatives, forward mode and torch.func, by the formulas in plain PyTorch.

The backward passes of fused operators are not differentiable. For a gradient that will be differentiated
(`create_graph=True`), the backward pass computes the gradient of the plain formula instead, which autograd can
differentiate again. Under a torch.func transform (grad, vjp, jacrev, ...) or forward mode, the operator itself is
replaced by the plain formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def in_transform() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is active."""
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )


def needs_graph(grads: Sequence[Tensor | None]) -> bool:
    """In a backward pass: whether its result will be differentiated, or `grads` is a batch of gradients."""
    return not torch.compiler.is_compiling() and (
        torch.is_grad_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads)
    )


def gradients(
    function: Callable[..., Any], inputs: Sequence[Tensor], grads: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of `function(*inputs)` that can be differentiated again.

    Args:
        function: the plain formula; returns a tensor or a tuple of tensors.
        inputs: arguments of the function.
        grads: gradient of each output, or None.
        needed: whether each input needs a gradient.

    Returns:
        The gradient of each input, None where it is not needed.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, since several inputs may be the same tensor.
        leaves = [
            x.view_as(x) if x.requires_grad else x.detach().requires_grad_(want)
            for x, want in zip(inputs, needed, strict=True)
        ]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [
            (out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None and out.requires_grad
        ]
        wanted = [leaf for leaf, want in zip(leaves, needed, strict=True) if want]
        if not pairs or not wanted:
            results: Sequence[Tensor | None] = [None] * len(wanted)
        else:
            results = torch.autograd.grad(
                [out for out, _ in pairs], wanted, [grad for _, grad in pairs], create_graph=create_graph,
                allow_unused=True,
            )  # fmt: skip
    remaining = iter(results)
    return [next(remaining) if want else None for want in needed]
