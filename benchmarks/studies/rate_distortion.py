"""Rate-distortion curve: error against bits for models of different sizes and for quantizers without a network.

    python -m benchmarks.studies.rate_distortion DATA --output rate.jsonl [--plot rate.png] [--variant combined]

Trains on a frame of `quality.py` in mode `select`, with 2 to 5 levels and 1, 2 and 4 times the codes. A sample takes
log2 K bits per codebook. The reference quantizers are fitted to the same training rows and scored on the same rows:

    product   product quantization with a learned rotation (Ge et al. 2013), by faiss
    residual  residual quantization of whole rows with beam search, by faiss
    category  residual quantization within each category, without beam search, with the codebook sizes of the model;
              decoded by a ridge regression from all categories
    scalar    principal components rounded to uniform steps, bits by reverse water-filling: finite scalar quantization
              (Mentzer et al. 2023) with a linear encoder

Finished runs have a line in the output and are skipped. The reference quantizers and `--plot` need the extra `study`
(faiss, matplotlib).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.studies.quality import Array, Run, _start_worker, append, load_split, rows_of, train
from benchmarks.studies.variants import VARIANTS
from spinlock_fast.config.schema import LevelConfig
from spinlock_fast.models.decoder_refit import least_squares
from spinlock_fast.models.initialization import component_bits
from spinlock_fast.quantize import resolve_levels

LEVELS = (2, 3, 4, 5)
FACTORS = (1, 2, 4)
RATIOS = ("0.5", "1", "1.5", "2", "2.5")
CODE_BITS = 4  # per codebook of the references: 16 codes, about as many as in the model
BITS = (40, 60, 80, 120, 160, 240, 320)

CodebookSizes = dict[str, list[LevelConfig]]  # by category


def codebook_sizes(groups: dict[str, list[int]], levels: int, factor: int) -> CodebookSizes:
    """Codebook sizes of the default configuration, with `factor` times the codes."""
    default = resolve_levels({name: len(members) for name, members in groups.items()}, [], ":".join(RATIOS[:levels]))
    return {
        name: [LevelConfig(num_tokens=factor * size.num_tokens, latent_dim=size.latent_dim) for size in sizes]
        for name, sizes in default.items()
    }


def bits_of(sizes: CodebookSizes) -> float:
    """Bits per sample."""
    return sum(math.log2(size.num_tokens) for category in sizes.values() for size in category)


def _trained(job: tuple[Run, Path, str, int | None, int, int]) -> dict[str, Any]:
    run, data, device, epochs, levels, factor = job
    sizes = codebook_sizes(load_split(data, run.frame).meta["group_indices"], levels, factor)
    row = train(run, data, device, epochs, {name: [s.model_dump() for s in own] for name, own in sizes.items()})
    return {"kind": "model", "levels": levels, "factor": factor, "bits": bits_of(sizes), **row}


def product(x: Array, scored: Array, bits: int) -> Array:
    import faiss

    parts = max(1, bits // CODE_BITS)
    width = x.shape[1] // parts * parts
    quantizer = faiss.ProductQuantizer(width, parts, CODE_BITS)
    quantizer.cp.min_points_per_centroid = 1  # no warning per codebook
    rotation = faiss.OPQMatrix(x.shape[1], parts, width)
    rotation.pq = quantizer  # else the rotation is optimised for 256 codes
    rotation.train(x)
    quantizer.train(rotation.apply(x))
    decoded: Array = rotation.reverse_transform(quantizer.decode(quantizer.compute_codes(rotation.apply(scored))))
    return decoded


def residual(x: Array, scored: Array, bits: int) -> Array:
    import faiss

    quantizer = faiss.ResidualQuantizer(x.shape[1], max(1, bits // CODE_BITS), CODE_BITS)
    quantizer.train(x)
    decoded: Array = quantizer.decode(quantizer.compute_codes(scored))
    return decoded


def scalar(x: Array, scored: Array, bits: int) -> Array:
    variance, directions = np.linalg.eigh(np.cov(x.T, bias=True))
    allocated = component_bits(torch.from_numpy(variance.clip(min=0.0)), float(bits)).round().numpy()
    basis, steps = directions[:, allocated > 0], 2.0 ** allocated[allocated > 0]
    low, high = np.quantile(x @ basis, [0.005, 0.995], axis=0)
    width = (high - low) / steps
    cells = np.floor((scored @ basis - low) / width).clip(0, steps - 1)
    decoded: Array = (low + (cells + 0.5) * width) @ basis.T
    return decoded


REFERENCES = {"product": product, "residual": residual, "scalar": scalar}


def by_category(x: Array, trained: Array, groups: dict[str, list[int]], sizes: CodebookSizes) -> Array:
    """Reconstructed rows [N, F] after residual k-means in each category, fitted to the rows `trained`."""
    from sklearn.cluster import KMeans

    quantized = []
    for name, members in groups.items():
        residual = x[:, members].copy()
        for size in sizes[name]:
            codes = KMeans(size.num_tokens, n_init=4, random_state=0).fit(residual[trained])
            residual = residual - codes.cluster_centers_[codes.predict(residual)]
        quantized.append(x[:, members] - residual)
    inputs = torch.from_numpy(np.concatenate(quantized, 1)).double()
    weights, constant = least_squares(inputs[trained], torch.from_numpy(x[trained]).double(), 0.01)
    decoded: Array = (inputs @ weights + constant).numpy()
    return decoded


def references(data: Path, seed: int) -> Iterator[dict[str, Any]]:
    """Errors of the reference quantizers."""
    frame = load_split(data, seed)
    rows, scored = rows_of(frame, "select")
    x = np.ascontiguousarray(frame.x[rows], dtype=np.float32)
    trained = np.setdiff1d(np.arange(len(x)), scored)
    mean = x[trained].mean(0)
    for bits in BITS:
        for kind, quantize in REFERENCES.items():
            decoded = quantize(x[trained] - mean, x[scored] - mean, bits)
            error = float(np.square(decoded - (x[scored] - mean)).mean())
            yield {"kind": kind, "frame": seed, "bits": bits, "error": error}
    groups = frame.meta["group_indices"]
    for factor in FACTORS:
        sizes = codebook_sizes(groups, 3, factor)
        decoded = by_category(x, trained, groups, sizes)[scored]
        error = float(np.square(decoded - x[scored]).mean())
        yield {"kind": "category", "frame": seed, "bits": bits_of(sizes), "error": error}


def lines_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()] if output.exists() else []


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plots error against bits on logarithmic axes: a line per number of levels and per reference."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    figure, axes = plt.subplots(figsize=(7.5, 4.8), dpi=120, layout="constrained")
    for levels in LEVELS:
        points = [row for row in rows if row["kind"] == "model" and row["levels"] == levels]
        bits = sorted({row["bits"] for row in points})
        means = [np.mean([row["error"] for row in points if row["bits"] == b]) for b in bits]
        axes.plot(
            bits, means, marker="o", color=plt.get_cmap("viridis")(0.25 * (levels - 2)), label=f"model, {levels} levels"
        )
    whole = {kind: (style, f"{kind}, whole rows") for kind, style in zip(REFERENCES, (":", "--", "-."), strict=True)}
    for kind, (style, label) in {**whole, "category": ("-", "residual, by category")}.items():
        points = sorted((row["bits"], row["error"]) for row in rows if row["kind"] == kind)
        axes.plot(*zip(*points, strict=True), style, color="0.35", label=label)
    axes.set(xscale="log", yscale="log", xlabel="bits a sample", ylabel="held-out mean squared error")
    for axis, ticks in (
        (axes.xaxis, (40, 60, 80, 120, 160, 240, 320)),
        (axes.yaxis, (0.01, 0.02, 0.03, 0.05, 0.1, 0.2)),
    ):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_locator(NullLocator())
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="directory of the data, as for quality.py")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines file, continued if it exists")
    parser.add_argument("--plot", type=Path, help="image file to write")
    parser.add_argument("--variant", default="combined", choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--frame", type=int, default=42)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epochs", type=int, help="overrides the epochs of the settings, for a trial")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes")
    arguments = parser.parse_args(argv)
    present = lines_of(arguments.output)
    if not any(row["kind"] == "category" for row in present):
        for row in references(arguments.data, arguments.frame):
            append(arguments.output, row)
    done = {(row["levels"], row["factor"], row["seed"]) for row in present if row["kind"] == "model"}
    jobs = [
        (
            Run("select", arguments.variant, arguments.frame, seed),
            arguments.data,
            arguments.device,
            arguments.epochs,
            levels,
            factor,
        )
        for seed in arguments.seeds
        for factor in FACTORS
        for levels in LEVELS
        if (levels, factor, seed) not in done
    ]
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, _start_worker) as pool:
        for row in pool.imap_unordered(_trained, jobs):
            append(arguments.output, row)
            print("{levels} levels, {factor} x codes, {bits:.0f} bits: error {error:.4f}".format(**row), flush=True)
    if arguments.plot:
        plot(lines_of(arguments.output), arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
