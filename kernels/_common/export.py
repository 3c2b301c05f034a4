"""Tracing of exported graphs, which contain PyTorch's own operations only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch.utils._python_dispatch import _disable_current_modes


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
