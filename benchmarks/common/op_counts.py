"""Counts operations and kernel launches of a step, without a GPU and without changing the path that the step takes.

Dispatch modes and the profiler make quantizers call the operators of `torch.library`. The observer of execution traces
does not.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from torch.profiler import ExecutionTraceObserver

# Operations that read or write no memory of the device.
_METADATA = {
    f"aten::{name}"
    for name in [
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "view",
        "as_strided",
        "expand",
        "expand_as",
        "reshape",
        "detach",
        "select",
        "slice",
        "unsqueeze",
        "squeeze",
        "transpose",
        "t",
        "permute",
        "alias",
        "to",
        "_to_copy",
        "contiguous",
        "unbind",
        "split",
        "split_with_sizes",
        "view_as",
        "_unsafe_view",
        "narrow",
        "unflatten",
        "flatten",
        "movedim",
        "resolve_neg",
        "resolve_conj",
        "lift_fresh",
        "result_type",
        "_reshape_alias",
        "set_",
        "resize_",
        "requires_grad_",
        "chunk",
        "numpy_T",
        "mT",
        "broadcast_tensors",
        "promote_types",
        "record_stream",
    ]
}


@contextmanager
def traced(nodes: list[dict[str, Any]]) -> Iterator[ExecutionTraceObserver]:
    """Appends the nodes of the execution trace of the block."""
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(directory) / "trace.json"
        observer = ExecutionTraceObserver()
        observer.register_callback(str(path))
        observer.start()
        try:
            yield observer
        finally:
            observer.stop()
            observer.unregister_callback()
        nodes.extend(json.loads(path.read_text())["nodes"])


def _aten(nodes: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {node["id"]: node for node in nodes if node["name"].startswith("aten::")}


def count_ops(step: Callable[[], object]) -> Counter[str]:
    """The aten operations that a step calls, without those that they call themselves."""
    nodes: list[dict[str, Any]] = []
    with traced(nodes):
        step()
    aten = _aten(nodes)
    return Counter(node["name"] for node in aten.values() if node["ctrl_deps"] not in aten)


def count_launches(step: Callable[[], object]) -> Counter[str]:
    """Triton kernels, and aten operations that launch at least one kernel on a GPU, in a step on the CPU.

    Run it with TRITON_INTERPRET=1 and SPINLOCK_FAST_BACKEND=triton, so that the step takes the path of a GPU. Views and
    metadata are free; a Triton kernel, and an aten operation that calls no other operation, counts as one launch.
    Sorting, random permutations and cumulative sums launch several kernels on a GPU, and count as one here.
    """
    from triton.runtime import interpreter

    nodes: list[dict[str, Any]] = []
    launches: Counter[str] = Counter()
    execute = interpreter.GridExecutor.__call__
    with traced(nodes) as observer:

        def record(self: Any, *args: Any, **kwargs: Any) -> Any:
            launches[f"triton::{self.fn.__name__}"] += 1
            observer.stop()  # the interpreter uses aten operations too
            result = execute(self, *args, **kwargs)
            observer.start()
            return result

        with mock.patch.object(interpreter.GridExecutor, "__call__", record):
            step()
    aten = _aten(nodes)
    computing = {number for number, node in aten.items() if node["name"] not in _METADATA}
    composite: set[int] = set()  # these launch nothing besides what they call
    for number in computing:
        parent = aten[number]["ctrl_deps"]
        while parent in aten:
            composite.add(parent)
            parent = aten[parent]["ctrl_deps"]
    launches.update(aten[number]["name"] for number in computing - composite)
    return launches
