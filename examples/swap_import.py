"""An autoencoder with ResidualVQ, written for vector-quantize-pytorch; one import line selects the library.

python examples/swap_import.py                                        # spinlock_fast
python examples/swap_import.py --library vector_quantize_pytorch      # the original
python examples/swap_import.py --library both                         # both, compared
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LIBRARIES = ("vector_quantize_pytorch", "spinlock_fast")


@dataclass(frozen=True)
class Settings:
    steps: int = 50
    batch: int = 32
    length: int = 64  # windows per sequence
    window: int = 32  # samples per window
    dim: int = 64
    codes: int = 512
    quantizers: int = 8


class Autoencoder(nn.Module):
    """Reconstructs windows of signals [b, n, window] through ResidualVQ."""

    def __init__(self, settings: Settings, library: str) -> None:
        super().__init__()
        vq = import_module(library)  # instead of: import vector_quantize_pytorch as vq, or import spinlock_fast as vq
        self.encoder = nn.Sequential(nn.Linear(settings.window, 128), nn.GELU(), nn.Linear(128, settings.dim))
        self.vq = vq.ResidualVQ(
            dim=settings.dim,
            num_quantizers=settings.quantizers,
            codebook_size=settings.codes,
            decay=0.95,
            commitment_weight=0.25,
        )
        self.decoder = nn.Sequential(nn.Linear(settings.dim, 128), nn.GELU(), nn.Linear(128, settings.window))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        quantized, _, losses = self.vq(self.encoder(x))
        return self.decoder(quantized), losses.sum()


def signals(settings: Settings, generator: torch.Generator) -> Tensor:
    """[b, n, window]: sums of three sines with random frequency, amplitude and phase."""
    frequency, amplitude, phase = torch.rand(3, settings.batch, 3, 1, generator=generator)
    time_axis = torch.arange(settings.length * settings.window) / settings.window
    waves: Tensor = amplitude * torch.sin(2.0 * torch.pi * (2.0 * frequency * time_axis + phase))
    return waves.sum(1).view(settings.batch, settings.length, settings.window)


def run(library: str, settings: Settings, seed: int = 0) -> tuple[list[float], float]:
    """The loss of each step, and the median milliseconds per step."""
    torch.manual_seed(seed)
    model = Autoencoder(settings, library)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    losses, times = [], []
    for _ in range(settings.steps):
        x = signals(settings, generator)
        start = time.perf_counter()
        reconstruction, commitment = model(x)
        loss = F.mse_loss(reconstruction, x) + commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        times.append(1e3 * (time.perf_counter() - start))
    return losses, statistics.median(times)


def main(arguments: list[str] | None = None) -> dict[str, tuple[list[float], float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=[*LIBRARIES, "both"], default="spinlock_fast")
    for name, value in vars(Settings()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = vars(parser.parse_args(arguments))
    library = options.pop("library")
    settings = Settings(**options)
    results = {name: run(name, settings) for name in (LIBRARIES if library == "both" else [library])}
    for name, (losses, milliseconds) in results.items():
        steps = sorted({0, len(losses) // 2, len(losses) - 1})
        trace = ", ".join(f"{losses[step]:.4f} (step {step + 1})" for step in steps)
        print(f"{name:24s} {milliseconds:8.1f} ms a step   loss {trace}")
    if library == "both":
        (theirs, their_time), (ours, our_time) = (results[name] for name in LIBRARIES)
        print(f"{their_time / our_time:.1f} times as fast; final losses differ by {abs(theirs[-1] - ours[-1]):.1e}")
    return results


if __name__ == "__main__":
    main()
