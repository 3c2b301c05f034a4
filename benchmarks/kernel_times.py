"""Times of each kernel of the quantizer, checked first: `python benchmarks/kernel_times.py --output kernels.json`.

At the seed shape (512 rows, 33 codebooks, 484 codes) calls run inside a CUDA graph; at large shapes each by itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from timing import peak_memory, time_calls, time_graph, write

from spinlock_fast.kernels._common.backend import resolve_backend
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.ema_update import ema_update
from spinlock_fast.kernels.vq_assign import vq_assign
from spinlock_fast.quantize import resolve_levels

SEED_FEATURES = (4, 16, 15, 13, 32, 28, 20, 10, 11, 14, 9)


def seed_layout() -> CodebookLayout:
    """The 33 codebooks of the 100K run."""
    levels = resolve_levels({f"c{i}": n for i, n in enumerate(SEED_FEATURES)}, [], "0.5:1:1.5")
    books = [book for level in levels.values() for book in level]
    return CodebookLayout.of([book.num_tokens for book in books], [book.latent_dim for book in books])


def check(z: torch.Tensor, codebook: torch.Tensor, layout: CodebookLayout, backend: str) -> None:
    """The codes of some rows are the nearest by float64; nothing is timed that is wrong."""
    found = vq_assign(z, codebook, layout, backend=backend)
    assert float(found.counts.sum()) == z.shape[0] * layout.groups
    for g in range(layout.groups):
        rows = z[:512, layout.column_slice(g)].double()
        codes = codebook[layout.entry_slice(g)].view(layout.num_codes[g], -1).double()
        distance = torch.cdist(rows, codes).square()
        chosen = distance.gather(1, found.codes[:512, g : g + 1])[:, 0]
        size = rows.square().sum(1) + codes.square().sum(1).max()
        bound = 4 * layout.dims[g] ** 0.5 * torch.finfo(torch.float32).eps * size
        assert bool((chosen - distance.min(1).values <= bound).all()), f"codebook {g}"


def parts(
    z: torch.Tensor, codebook: torch.Tensor, layout: CodebookLayout, backend: str
) -> dict[str, Callable[[], Any]]:
    """What is timed."""
    n = torch.ones(layout.total_codes, device=z.device)
    e, s, usage = codebook.clone(), codebook.clone(), torch.zeros_like(n)
    found = vq_assign(z, codebook, layout, centred=False, backend=backend)
    leaf = z.clone().requires_grad_()
    upstream = torch.randn_like(z)

    def update() -> None:
        ema_update(e, n, s, found.count_parts, found.sum_parts, layout, 0.99, usage=usage, backend=backend)

    def assign(**options: Any) -> Any:
        return vq_assign(z, e, layout, centred=False, backend=backend, **options)

    def train() -> None:
        now = assign()
        ema_update(e, n, s, now.count_parts, now.sum_parts, layout, 0.99, usage=usage, backend=backend)

    def forward_backward(gradient: Any) -> None:
        now = vq_assign(leaf, e, layout, centred=False, backend=backend, gradient=gradient)
        torch.autograd.backward([now.quantized, now.error_parts], [upstream, torch.ones_like(now.error_parts)])

    return {
        "assign": assign,
        "assign, centred": lambda: vq_assign(z, e, layout, backend=backend),
        "assign, codes only": lambda: assign(with_sums=False),
        "update": update,
        "assign + update": train,
        "assign, forward + backward": lambda: forward_backward("straight_through"),
        "assign, forward + backward by rotation": lambda: forward_backward("rotation"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernel = resolve_backend("auto", torch.zeros(1, device=device))
    rows: list[dict[str, Any]] = []
    large = {"wide": (65536, [1024], [256]), "tall": (1 << 20, [8192], [64])} if device.type == "cuda" else {}
    shapes = {"seed": (512, list(seed_layout().num_codes), list(seed_layout().dims)), **large}
    for name, (N, num_codes, dims) in shapes.items():
        layout = CodebookLayout.of(num_codes, dims)
        generator = torch.Generator(device).manual_seed(0)
        z = torch.randn(N, layout.total_dims, device=device, generator=generator)
        codebook = torch.randn(layout.total_entries, device=device, generator=generator)
        for backend in dict.fromkeys([kernel, "reference"]):
            if backend == "reference" and name == "tall":
                continue  # minutes
            check(z, codebook, layout, backend)
            for part, run in parts(z, codebook, layout, backend).items():
                in_graph = device.type == "cuda" and name == "seed"
                timed = time_graph(run) if in_graph else time_calls(run, device)
                memory = {"peak_bytes": peak_memory(run)} if device.type == "cuda" else {}
                rows.append({"shape": name, "backend": backend, "part": part, "in_graph": in_graph, **timed, **memory})
                line = f"{name:6} {backend:10} {part:40} {timed['p50_us']:12.2f} us"
                print(line, flush=True)  # noqa: T201
                write(options.output, rows)


if __name__ == "__main__":
    main()
