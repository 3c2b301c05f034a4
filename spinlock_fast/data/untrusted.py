"""Parts of a model file that was written by anyone: each is checked before it is used."""

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

_LONGEST = 300  # characters of what torch says


def written_by(payload: Mapping[str, Any]) -> str:
    """Who wrote a checkpoint, for the end of an error message."""
    writer = payload.get("written_by")
    version = shown(writer, 40) if isinstance(writer, str) else "an earlier or unknown version"
    return f" (written by {version}, read by spinlock-fast {__version__})"


@contextmanager
def reading(payload: Mapping[str, Any], part: str) -> Iterator[None]:
    """Whatever a part of a payload does to the code that reads it becomes a DataError with its name and the writer."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{part}: {error}{written_by(payload)}") from None
    except KeyError as error:
        key = error.args[0] if error.args else ""
        raise DataError(f"{part}: {shown(key)} is missing or unknown{written_by(payload)}") from None
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError, ArithmeticError) as error:
        if is_out_of_memory(error):
            raise
        raise DataError(f"{part}: {one_line(error, _LONGEST)}{written_by(payload)}") from None


def array(value: Any, name: str, kinds: str, shape: Sequence[int | None]) -> NDArray[Any]:
    """A tensor as an array.

    Args:
        value: what the payload holds.
        name: of the entry, for messages.
        kinds: allowed `dtype.kind`s of numpy, such as "f".
        shape: expected sizes; None where any will do.

    Raises:
        DataError: no tensor, or one of another type or shape.
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.dtype == torch.bfloat16:
        raise DataError(f"{name} must be a tensor, got {shown(value)}")
    found = value.detach().cpu().numpy()
    same = len(found.shape) == len(shape) and all(n in (None, m) for n, m in zip(shape, found.shape, strict=True))
    if found.dtype.kind not in kinds or not same:
        sizes = ", ".join("N" if n is None else str(n) for n in shape)
        raise DataError(f"{name} must be [{sizes}] of kind {kinds!r}, got {found.dtype} {list(found.shape)}")
    return found


def texts(value: Any, name: str, count: int) -> list[str]:
    """A list of so many texts; raises DataError."""
    if not isinstance(value, (list, tuple)) or len(value) != count or not all(isinstance(v, str) for v in value):
        raise DataError(f"{name} must be {count} texts, got {shown(value)}")
    return list(value)


def shape_difference(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """The first difference between the shapes of two state dicts; empty where there is none."""
    for name, shape in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != shape:
            return f"{name} is {list(found[name])}, expected {list(shape)}"
    return next((f"{shown(name)} is unknown" for name in found if name not in expected), "")


def shapes(state: Any) -> dict[str, tuple[int, ...]]:
    """Sizes of the tensors of a state dict; raises DataError where it is none."""
    if not isinstance(state, Mapping):
        raise DataError(f"must be a mapping of tensors, got {shown(state)}")
    wrong = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if wrong is not None:
        raise DataError(f"{shown(wrong)} must be a tensor, got {shown(state[wrong])}")
    return {name: tuple(value.shape) for name, value in state.items()}


def finite(values: NDArray[Any], name: str) -> NDArray[Any]:
    """The values; raises DataError where one is not finite."""
    if not np.isfinite(values).all():
        raise DataError(f"{name} must be finite")
    return values
