"""Argument checks of all operators (shapes, types, one device), and the current CUDA device of kernel launches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from spinlock_fast.kernels._common.dropout import BatchSlice
from spinlock_fast.kernels._common.layout import CodebookLayout

Function = TypeVar("Function", bound=Callable[..., Any])


class Kind(NamedTuple):
    """Data types that an argument may have, and their name in messages."""

    name: str
    dtypes: frozenset[torch.dtype]


_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}) | {
    torch.uint16,
    torch.uint32,
    torch.uint64,
}
FLOAT = Kind("floating point", _FLOATS)
SAME = Kind("of one type", _FLOATS)  # all such arguments have one type, unless autocast converts them
INDEX = Kind("int64", frozenset({torch.int64}))
INTEGER = Kind("an integer type", _INTEGERS)
REAL = Kind("a number type", _FLOATS | _INTEGERS)
BOOL = Kind("bool", frozenset({torch.bool}))

# A size is a number, or a name that has the same value in all arguments of one call.
Size = int | str
Argument = tuple[str, Tensor | None, tuple[Size, ...], Kind]


def check(operator: str, *arguments: Argument) -> None:
    """Checks the arguments of an operator.

    Args:
        operator: name of the operator, for messages.
        arguments: name, tensor (None is accepted), expected shape and allowed types of each argument.

    Raises:
        TypeError: an argument is not a tensor, or has a type that is not allowed.
        ValueError: an argument has another shape or memory layout, or arguments lie on different devices.
    """
    device = dtype = None
    sizes: dict[str, int] = {}
    for argument in arguments:
        _, tensor, shape, kind = argument
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            _refuse(operator, argument, arguments)
        if tensor.dtype not in kind.dtypes or len(tensor.shape) != len(shape):
            _refuse(operator, argument, arguments)
        for size, expected in zip(tensor.shape, shape, strict=True):
            if isinstance(expected, str):
                if sizes.setdefault(expected, size) != size:
                    _refuse(operator, argument, arguments)
            elif size != expected:
                _refuse(operator, argument, arguments)
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            _refuse_devices(operator, arguments)
        if kind is SAME:
            if dtype is None:
                dtype = tensor.dtype
            elif tensor.dtype != dtype and not torch.is_autocast_enabled(device.type):
                _refuse_types(operator, arguments)


def _refuse(operator: str, argument: Argument, arguments: Sequence[Argument]) -> None:
    """Raises the error of one argument."""
    name, tensor, shape, kind = argument
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{operator}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{operator}: {name} must be a dense tensor, got {tensor.layout}")
    sizes: dict[str, int] = {}  # fixed by earlier arguments
    for _, earlier, names, _ in arguments[: next(i for i, other in enumerate(arguments) if other is argument)]:
        if earlier is not None:
            sizes.update({name: n for name, n in zip(names, earlier.shape, strict=True) if isinstance(name, str)})
    expected = f"[{', '.join(str(sizes.get(size, size) if isinstance(size, str) else size) for size in shape)}]"
    if tensor.dtype not in kind.dtypes:
        raise TypeError(f"{operator}: {name} must be {expected} {kind.name}, got {list(tensor.shape)} {tensor.dtype}")
    raise ValueError(f"{operator}: {name} must be {expected}, got {list(tensor.shape)}")


def _tensors(arguments: Iterable[Argument]) -> list[tuple[str, Tensor, Kind]]:
    return [(name, tensor, kind) for name, tensor, _, kind in arguments if isinstance(tensor, Tensor)]


def _refuse_devices(operator: str, arguments: Iterable[Argument]) -> None:
    (first, a, _), *rest = _tensors(arguments)
    name, b = next((name, tensor) for name, tensor, _ in rest if tensor.device != a.device)
    places = f"{first} on {a.device} and {name} on {b.device}"
    raise ValueError(f"{operator}: all tensors must be on one device, got {places}")


def _refuse_types(operator: str, arguments: Iterable[Argument]) -> None:
    (first, a), *rest = [(name, tensor) for name, tensor, kind in _tensors(arguments) if kind is SAME]
    name, b = next((name, tensor) for name, tensor in rest if tensor.dtype != a.dtype)
    raise TypeError(f"{operator}: {name} must be of the type of {first}, {a.dtype}, got {b.dtype}")


def check_dense(name: str, x: Tensor) -> None:
    """Raises TypeError unless x is a tensor, ValueError unless it is dense. For use before its shape is read."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got {x.layout}")


def check_codes(operator: str, codes: Tensor, layout: CodebookLayout) -> None:
    """Raises IndexError if codes [N, G] lie outside their codebooks; -1 is allowed and means no code.

    Values are checked on the CPU only, since reading them elsewhere is a host synchronisation.
    """
    if type(codes) is not Tensor or not codes.is_cpu or torch.compiler.is_compiling() or is_traced():
        return
    wrong = (codes < -1) | (codes >= layout.indices(codes.device).num_codes)
    if bool(wrong.any()):
        row, g = (int(i) for i in wrong.nonzero()[0])
        raise IndexError(
            f"{operator}: code {int(codes[row, g])} of row {row} is outside codebook {g}, "
            f"which has {layout.num_codes[g]} codes"
        )


def check_rate(operator: str, dropout: float) -> None:
    """Raises ValueError unless `dropout` is a probability."""
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"{operator}: dropout must lie in [0, 1], got {dropout}")


def check_batch(operator: str, rows: int, batch: BatchSlice | None) -> None:
    """Raises ValueError unless `rows` rows are a slice of the batch."""
    if batch is not None and not 0 <= batch.first <= batch.total - rows:
        raise ValueError(
            f"{operator}: {rows} rows from row {batch.first} on are not a slice of a batch of {batch.total} rows"
        )


def is_traced() -> bool:
    """Whether a dispatch mode or a torch.func transform is active, so that values cannot be read."""
    return torch._C._len_torch_dispatch_stack() != 0 or torch._C._functorch.peek_interpreter_stack() is not None


def rows_of(matrix: Tensor) -> Tensor:
    """The matrix, copied unless its columns have stride 1; rows may have any stride."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def device_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a CUDA device the current one; a null context if it is already, or for a CPU.

    Triton launches kernels on the current device, whatever device their tensors are on.
    """
    return nullcontext() if _is_current(device) else torch.cuda.device(device)


def _is_current(device: torch.device) -> bool:
    return device.type != "cuda" or device.index is None or device.index == torch.cuda.current_device()


def launches(function: Function) -> Function:
    """Decorator: the function launches kernels on the device of its first tensor argument."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        for argument in args:
            if isinstance(argument, Tensor):
                if _is_current(argument.device):
                    break
                with device_guard(argument.device):
                    return function(*args, **kwargs)
        return function(*args, **kwargs)

    return guarded  # type: ignore[return-value]
