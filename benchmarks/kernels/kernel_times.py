"""Times each kernel of the quantizer, after checking its codes.

    python -m benchmarks.kernels.kernel_times --output kernels.json

At the seed shape (512 rows, 33 codebooks, 484 codes) calls are timed inside a CUDA graph, at large shapes one by one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common.quantizer_layers import LARGE, SHAPES, check_nearest, random_inputs
from benchmarks.common.timing import peak_memory, time_calls, time_graph, write
from spinlock_fast.kernels._common.backend import resolve_backend
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.ema_update import ema_update
from spinlock_fast.kernels.vq_assign import vq_assign


def timed_calls(
    z: torch.Tensor, codebook: torch.Tensor, layout: CodebookLayout, backend: str
) -> dict[str, Callable[[], Any]]:
    """The calls to time, by name."""
    cluster_size = torch.ones(layout.total_codes, device=z.device)
    codes, code_sum, usage = codebook.clone(), codebook.clone(), torch.zeros_like(cluster_size)
    first = vq_assign(z, codebook, layout, centred=False, backend=backend)
    leaf = z.clone().requires_grad_()
    upstream = torch.randn_like(z)

    def assign(**options: Any) -> Any:
        return vq_assign(z, codes, layout, centred=False, backend=backend, **options)

    def update(assignment: Any) -> None:
        counts, sums = assignment.count_parts, assignment.sum_parts
        ema_update(codes, cluster_size, code_sum, counts, sums, layout, 0.99, usage=usage, backend=backend)

    def forward_backward(gradient: Any) -> None:
        result = vq_assign(leaf, codes, layout, centred=False, backend=backend, gradient=gradient)
        torch.autograd.backward([result.quantized, result.error_parts], [upstream, torch.ones_like(result.error_parts)])

    return {
        "assign": assign,
        "assign, centred": lambda: vq_assign(z, codes, layout, backend=backend),
        "assign, codes only": lambda: assign(with_sums=False),
        "update": lambda: update(first),
        "assign + update": lambda: update(assign()),
        "assign, forward + backward": lambda: forward_backward("straight_through"),
        "assign, forward + backward by rotation": lambda: forward_backward("rotation"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernel = resolve_backend("auto", torch.zeros(1, device=device))
    rows: list[dict[str, Any]] = []
    for name in ("seed", *(LARGE if device.type == "cuda" else ())):
        layout = CodebookLayout.of(*SHAPES[name][1:])
        z, codes = random_inputs(*SHAPES[name], device)
        codebook = torch.cat([code.flatten() for code in codes])
        for backend in dict.fromkeys([kernel, "reference"]):
            if backend == "reference" and name == "tall":
                continue  # takes minutes
            check_nearest(z, codebook, layout, backend)
            for part, run in timed_calls(z, codebook, layout, backend).items():
                in_graph = device.type == "cuda" and name == "seed"
                times = time_graph(run) if in_graph else time_calls(run, device)
                memory = {"peak_bytes": peak_memory(run)} if device.type == "cuda" else {}
                rows.append({"shape": name, "backend": backend, "part": part, "in_graph": in_graph, **times, **memory})
                print(f"{name:6} {backend:10} {part:40} {times['p50_us']:12.2f} us", flush=True)
                write(arguments.output, rows)


if __name__ == "__main__":
    main()
