"""Tracing by torch.export, whose graphs contain PyTorch's own operations only, and by torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

P = ParamSpec("P")
R = TypeVar("R")


def exporting() -> bool:
    """True inside `torch.export` and `torch.onnx.export(dynamo=True)`.

    Runtimes of exported graphs lack the operators of this package, so inference is traced as PyTorch operations.
    Training keeps the operators, which define gradients.
    """
    # Not `is_exporting()`, which torch.compile of torch 2.11 takes to be True.
    return torch.compiler._is_exporting_flag


@contextmanager
def _without_modes() -> Iterator[None]:
    with torch.inference_mode(False), _disable_current_modes():
        yield


def real_tensors() -> AbstractContextManager[object]:
    """Context in which to create tensors that are cached: no fake tensors of a trace and no inference tensors."""
    return torch.inference_mode(False) if torch.compiler.is_dynamo_compiling() else _without_modes()


def constant_in_traces(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: torch.compile calls the function while it traces, and takes its result for a constant.

    For tables of sizes: traced, they would be computed by the compiled code, with shapes that depend on data. Arguments
    are numbers, tuples and devices.
    """
    # As `torch.compiler.assume_constant_result` does, which imports torch's compiler: more than a second.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
