"""Derivatives beyond the first, forward mode and torch.func: by the formulas in plain PyTorch.

Gradients written by hand are numbers, not formulas: nothing differentiates them. Where a derivative of them is asked
for (`create_graph=True`), the backward pass forms the gradient of the plain formula instead, which autograd can
differentiate again. Where a transform of torch.func (grad, vjp, jacrev, ...) or forward mode watches the call, the
operator is the plain formula from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def in_transform() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation watches."""
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )


def needs_graph(grads: Sequence[Tensor | None]) -> bool:
    """In a backward pass: whether the gradient will be differentiated, or is formed for a batch of gradients."""
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
        function: the plain formula; returns a tensor or a tuple of them.
        inputs: what it is differentiated by.
        grads: of each of its outputs.
        needed: whether the gradient of each input is asked for.

    Returns:
        The gradient of each input, None where it is not needed.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: one tensor may be several of the inputs.
        leaves = [
            x.view_as(x) if x.requires_grad else x.detach().requires_grad_(want)
            for x, want in zip(inputs, needed, strict=True)
        ]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [
            (out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None and out.requires_grad
        ]
        asked = [leaf for leaf, want in zip(leaves, needed, strict=True) if want]
        if not pairs or not asked:
            found: Sequence[Tensor | None] = [None] * len(asked)
        else:
            found = torch.autograd.grad(
                [out for out, _ in pairs], asked, [grad for _, grad in pairs], create_graph=create_graph,
                allow_unused=True,
            )  # fmt: skip
    rest = iter(found)
    return [next(rest) if want else None for want in needed]
