"""Triton's interpreter in tests: accesses outside of a kernel's tensors are errors, and launches take less time."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from triton import language
from triton.runtime import interpreter

_ADDRESS_TABLES = ("adam_kernel",)  # kernels that read addresses from a tensor


def prepare() -> None:
    """Replaces functions of the interpreter; to be called once, before a kernel is launched."""
    _patch_once_per_launch()
    _check_addresses()


def _patch_once_per_launch() -> None:
    """The interpreter replaces the functions of its language in each call of a device function, such as `tl.sum`.

    Device functions find them replaced by the launch already; doing it again takes up to a third of a test's time.
    """
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: dict[tuple[bool, bool], Any] = {}

    def patch_once(function: Any) -> Any:
        modules = [value for value in function.__globals__.values() if isinstance(value, ModuleType)]
        key = language in modules, language.core in modules
        if key not in patched:
            patched[key] = patch(function)
        return patched[key]

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_afresh


def _check_addresses() -> None:
    """Loads, stores and atomic operations raise an error for an address outside of all tensors of the launch."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    copy_arguments = executor._init_args_hst
    storages: list[tuple[int, int]] = []  # first address, and one past the last

    def noted_arguments(self: Any, args: Any, kwargs: Any) -> Any:
        on_host, named = copy_arguments(self, args, kwargs)
        storages.clear()
        if self.fn.__name__ not in _ADDRESS_TABLES:
            tensors = [value for value in (*on_host, *named.values()) if hasattr(value, "untyped_storage")]
            blocks = {(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in (t.untyped_storage() for t in tensors)}
            storages.extend(sorted(blocks))
        return on_host, named

    def check(pointers: Any, mask: Any) -> None:
        addresses: NDArray[np.uint64] = np.asarray(pointers.data)
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, addresses.shape)]
        if not storages or not addresses.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        first, last = int(addresses.min()), int(addresses.max()) + size
        if any(low <= first and last <= high for low, high in storages):
            return
        ends = addresses + np.uint64(size)
        inside = [(addresses >= np.uint64(low)) & (ends <= np.uint64(high)) for low, high in storages]
        outside = int((~np.any(inside, axis=0)).sum())
        assert not outside, f"{outside} of {addresses.size} addresses are outside of the kernel's tensors"

    def checked(name: str, pointer_at: int, mask_at: int | None) -> None:
        original = getattr(builder, name)

        def operation(self: Any, *args: Any) -> Any:
            check(args[pointer_at], None if mask_at is None else args[mask_at])
            return original(self, *args)

        setattr(builder, name, operation)

    executor._init_args_hst = noted_arguments
    checked("create_masked_load", 0, 1)
    checked("create_masked_store", 0, 2)
    checked("create_atomic_rmw", 1, 3)
    checked("create_atomic_cas", 0, None)
