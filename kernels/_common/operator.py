"""Registration of operators: one typed function becomes an operator of `torch.library` and an autograd function.

`torch.compile`, `torch.export`, dispatch modes, tensor subclasses and profiles use the operator of `torch.library`. It
costs more host time per call than a small kernel takes, so eager mode calls a `torch.autograd.Function` around the same
implementation, or, if no gradient is needed, the implementation itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")

_PLAIN = (Tensor, nn.Parameter)


def operator(
    name: str,
    *,
    fake: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    backward: Callable[..., tuple[Tensor | None, ...]] | None = None,
    mutates: Sequence[str] = (),
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator that registers a function as `torch.ops.spinlock_fast.<name>`.

    The schema is inferred from the annotations, see `torch.library.infer_schema`. The function is called with
    positional arguments, and its results must not share memory with an argument.

    Args:
        name: name of the operator.
        fake: returns empty results of the right shapes and types, from the same arguments.
        setup_context: called as `setup_context(ctx, inputs, output)` after the forward pass.
        backward: called as `backward(ctx, *grads)`; returns the gradients of the first arguments. The remaining ones
            have no gradient. None: the operator is not differentiable.
        mutates: names of the arguments that are modified in place.
    """

    def register(implementation: Callable[P, R]) -> Callable[P, R]:
        qualified = f"spinlock_fast::{name}"
        schema = torch.library.infer_schema(implementation, mutates_args=mutates)
        schema = schema.replace("SymInt", "int")  # sizes of codebooks are constants in traced graphs
        # Not `torch.library.custom_op`: its first call imports torch's compiler, which takes more than a second.
        torch.library.define(qualified, schema)
        torch.library.impl(qualified, "default")(implementation)
        torch.library.register_fake(qualified, fake)
        overload = getattr(torch.ops.spinlock_fast, name).default
        function = None
        if backward is not None:
            padded = _padded(backward, len(overload._schema.arguments))
            torch.library.register_autograd(qualified, padded, setup_context=setup_context)
            function = _autograd_function(name, implementation, setup_context, padded)

        def call(*arguments: Any) -> Any:
            if torch.compiler.is_compiling() or not is_plain_call(arguments):
                return overload(*arguments)
            if function is not None and torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
                return function.apply(*arguments)
            return implementation(*arguments)  # type: ignore[call-arg]

        return cast(Callable[P, R], call)

    return register


class _Context:
    """Stands in for the context that autograd passes to a `torch.autograd.Function`."""

    needs_input_grad: tuple[bool, ...] = ()
    saved_tensors: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


@torch.no_grad()
def recomputed_gradients(
    function: type[torch.autograd.Function], arguments: Sequence[Any], grads: Sequence[Tensor], needed: Sequence[int]
) -> list[Tensor]:
    """Gradients of the arguments at the positions `needed`, after another forward pass.

    For operators of compiled code, whose results are the same for all implementations: what the implementations save
    for their backward passes differs.
    """
    ctx = _Context()
    ctx.needs_input_grad = tuple(i in needed for i in range(len(arguments)))
    function.forward(ctx, *arguments)
    gradients = function.backward(ctx, *grads)
    return [gradients[i] for i in needed]


def _padded(backward: Callable[..., tuple[Tensor | None, ...]], arguments: int) -> Callable[..., Any]:
    def padded(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = backward(ctx, *grads)
        return gradients + (None,) * (arguments - len(gradients))

    return padded


def _autograd_function(
    name: str,
    implementation: Callable[..., Any],
    setup_context: Callable[..., None] | None,
    backward: Callable[..., Any],
) -> type[torch.autograd.Function]:
    # `setup_context` as a method of the class would make every call bind its arguments by `inspect.signature`.
    def forward(ctx: Any, *arguments: Any) -> Any:
        output = implementation(*arguments)
        if setup_context is not None:
            setup_context(ctx, arguments, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods)


def is_plain_call(arguments: Sequence[Any]) -> bool:
    """Whether this is a call in eager mode, on tensors whose memory kernels can read directly."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._is_tracing()
        and not torch._C._autograd._profiler_enabled()
        and all(_is_plain(x) for x in arguments if isinstance(x, Tensor))
    )


def _is_plain(x: Tensor) -> bool:
    return type(x) in _PLAIN and not (x.is_meta or x.is_neg() or x._is_zerotensor())
