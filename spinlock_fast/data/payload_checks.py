"""Validation of checkpoint payloads from untrusted files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast import __version__
from spinlock_fast.errors import DataError, is_out_of_memory
from spinlock_fast.messages import one_line, shown

_MAX_MESSAGE = 300  # characters of an error message of torch


def writer_note(payload: Mapping[str, Any]) -> str:
    """Which version wrote a checkpoint, as the end of an error message."""
    writer = payload.get("written_by")
    version = shown(writer, 40) if isinstance(writer, str) else "an earlier or unknown version"
    return f" (written by {version}, read by spinlock-fast {__version__})"


@contextmanager
def payload_errors(payload: Mapping[str, Any], part: str) -> Iterator[None]:
    """Converts errors while reading a part of a payload to a DataError that names the part and the writer."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{part}: {error}{writer_note(payload)}") from None
    except KeyError as error:
        key = error.args[0] if error.args else ""
        raise DataError(f"{part}: {shown(key)} is missing or unknown{writer_note(payload)}") from None
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError, ArithmeticError) as error:
        if is_out_of_memory(error):
            raise
        raise DataError(f"{part}: {one_line(error, _MAX_MESSAGE)}{writer_note(payload)}") from None


def checked_array(value: Any, name: str, kinds: str, shape: Sequence[int | None]) -> NDArray[Any]:
    """Converts a tensor of a payload to an array.

    Args:
        value: entry of the payload.
        name: name of the entry for error messages.
        kinds: allowed NumPy `dtype.kind`s, such as "f".
        shape: expected sizes; None for any size.

    Raises:
        DataError: value is not a tensor, or has another type or shape.
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.dtype == torch.bfloat16:
        raise DataError(f"{name} must be a tensor, got {shown(value)}")
    array = value.detach().cpu().numpy()
    shape_matches = len(array.shape) == len(shape) and all(
        n in (None, m) for n, m in zip(shape, array.shape, strict=True)
    )
    if array.dtype.kind not in kinds or not shape_matches:
        sizes = ", ".join("N" if n is None else str(n) for n in shape)
        raise DataError(f"{name} must be [{sizes}] of kind {kinds!r}, got {array.dtype} {list(array.shape)}")
    return array


def checked_strings(value: Any, name: str, count: int) -> list[str]:
    """Checks a list of `count` strings; raises DataError."""
    if not isinstance(value, (list, tuple)) or len(value) != count or not all(isinstance(v, str) for v in value):
        raise DataError(f"{name} must be {count} strings, got {shown(value)}")
    return list(value)


def shape_difference(actual: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """Describes the first difference between the shapes of two state dicts; empty if they are equal."""
    for name, shape in expected.items():
        if name not in actual:
            return f"{name} is missing"
        if actual[name] != shape:
            return f"{name} is {list(actual[name])}, expected {list(shape)}"
    return next((f"{shown(name)} is unknown" for name in actual if name not in expected), "")


def tensor_shapes(state: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a state dict; raises DataError if it is not a mapping of tensors."""
    if not isinstance(state, Mapping):
        raise DataError(f"must be a mapping of tensors, got {shown(state)}")
    name = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if name is not None:
        raise DataError(f"{shown(name)} must be a tensor, got {shown(state[name])}")
    return {name: tuple(value.shape) for name, value in state.items()}


def checked_finite(values: NDArray[Any], name: str) -> NDArray[Any]:
    """Returns the values; raises DataError if one is not finite."""
    if not np.isfinite(values).all():
        raise DataError(f"{name} must be finite")
    return values
