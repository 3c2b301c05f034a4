"""Whether a graph is exported, in which operators are written out in PyTorch's own operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch.utils._python_dispatch import _disable_current_modes


def exporting() -> bool:
    """True inside `torch.export`, also for `torch.onnx.export(dynamo=True)`: what runs the graph lacks our operators.

    Operators are written out in evaluation alone: training needs the gradients that they define.
    """
    return torch.compiler.is_exporting()


@contextmanager
def _outside_of_modes() -> Iterator[None]:
    with torch.inference_mode(False), _disable_current_modes():
        yield


def real_tensors() -> AbstractContextManager[object]:
    """For tensors that are kept: not fake ones of an export, nor such that cannot take part in training later."""
    return torch.inference_mode(False) if torch.compiler.is_dynamo_compiling() else _outside_of_modes()
