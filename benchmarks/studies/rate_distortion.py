"""Rate-distortion curve: error against bits for models of different sizes, and for other quantizers of the same matrix.

    python -m benchmarks.studies.rate_distortion MATRIX.npz --output rate.jsonl [--test] [--plot rate.png]

MATRIX holds cleaned, normalised features x [N, F] and `train_rows`, `validation_rows`, `test_rows` as
`feature_matrix.py` writes them, or `val_rows` and a JSON text `meta` as in `original_frames` of `quality.py`; the
val_rows are the test rows then, and a tenth of the others are for validation.

All quantizers are fitted to the training rows. Their options (bits of a codebook; levels of a scalar) are chosen by the
error of the validation rows. With `--test` the chosen one is also scored on the test rows; without, these are not read.

    nearest, joint  the model with the settings of `--config` and both searches of tokens; log2 K bits per codebook
    perturbed       the same with the joint search and 8 perturbations
    one_category    the same with one category of all features, joint search: what the categories cost
    others          see `reference_quantizers.py`

Fits that have a line in the output are skipped, so that an interrupted study can be continued. The quantizers of faiss
and `--plot` need the extra `study`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.common.commands import ROOT
from benchmarks.common.timing import commit
from benchmarks.studies.reference_quantizers import REFERENCES, Array, Coder, Training
from benchmarks.studies.sweep import Row, lines_of, perform, study_parser
from spinlock_fast import CategoricalHierarchicalVQVAE, Trainer
from spinlock_fast.config.loading import load_config
from spinlock_fast.config.schema import LevelConfig
from spinlock_fast.models.code_search import Search
from spinlock_fast.quantize import resolve_levels

BITS = (40, 60, 80, 120, 160, 240, 320)
MODELS = {"model": ("nearest", "joint", "perturbed"), "one_category": ("one_category",)}
MODEL_OPTIONS = (5, 7)  # bits of a codebook, at most
_RATIOS = ("0.5", "1", "1.5")  # latent dimensions per feature; 1 from the fourth level on
_MOST_DIMS = 64
_PERTURBATIONS = 8

_MODEL, _RESIDUAL, _HOLLOW = {"color": "#1f6fb4"}, {"color": "#c4571a"}, {"ls": "--", "mfc": "white"}
# Label and style of each curve.
CURVES: dict[str, tuple[str, dict[str, Any]]] = {
    "perturbed": ("model, joint search, 8 perturbations", {**_MODEL, "marker": "s", "ms": 4, "ls": "-."}),
    "joint": ("model, joint search", {**_MODEL, "marker": "o", "lw": 2.2}),
    "nearest": ("model, nearest codes", {**_MODEL, "marker": "o", **_HOLLOW}),
    "one_category": ("model, one category, joint search", {"color": "#6aa84f", "marker": "s", "ms": 4}),
    "residual": ("residual (beam 32)", {**_RESIDUAL, "marker": "^", "lw": 2.2}),
    "neural_residual": ("neural residual", {**_RESIDUAL, "marker": "v", **_HOLLOW}),
    "local_search": ("local search (LSQ++)", {"color": "#8e5ea2", "marker": "D", "ms": 4}),
    "rotated_product": ("optimised product", {"color": "0.25", "ls": "-"}),
    "product": ("product", {"color": "0.25", "ls": ":"}),
    "finite_scalars": ("finite scalars (FSQ)", {"color": "0.55", "ls": "-."}),
}


class Matrix(NamedTuple):
    """Features [N, F], categories (discovered if None), and the rows of the three splits."""

    name: str
    x: Array
    groups: dict[str, list[int]] | None
    train: Array
    validation: Array
    test: Array


@cache
def load_matrix(path: Path) -> Matrix:
    with np.load(path) as file:
        x = np.ascontiguousarray(file["x"], dtype=np.float32)
        meta = json.loads(str(file["meta"])) if "meta" in file else {}
        if "test_rows" in file:
            train, validation, test = (file[f"{name}_rows"] for name in ("train", "validation", "test"))
        else:
            test = file["val_rows"]
            others = np.random.default_rng(0).permutation(np.setdiff1d(np.arange(len(x)), test))
            validation, train = np.split(others, [len(others) // 10])
    return Matrix(path.stem, x, meta.get("group_indices"), np.sort(train), np.sort(validation), np.sort(test))


def codebook_sizes(groups: dict[str, list[int]], bits: float, code_bits: int) -> dict[str, list[LevelConfig]]:
    """Codebooks of about `bits` bits together: as few levels as `code_bits` allows, sizes in the default proportions.

    The logarithms of the default sizes of `resolve_levels` are scaled by a common factor.
    """
    levels = max(1, math.ceil(bits / len(groups) / code_bits))
    ratios = ":".join([*_RATIOS, *["1"] * levels][:levels])
    uniform = levels > len(_RATIOS)  # the default halves the codes from level to level, down to 6
    default = resolve_levels({name: len(members) for name, members in groups.items()}, [], ratios, uniform)
    scale = bits / sum(math.log2(size.num_tokens) for sizes in default.values() for size in sizes)
    return {
        name: [
            LevelConfig(num_tokens=max(2, round(size.num_tokens**scale)), latent_dim=min(size.latent_dim, _MOST_DIMS))
            for size in sizes
        ]
        for name, sizes in default.items()
    }


def equal_codebooks(groups: dict[str, list[int]], bits: float, code_bits: int) -> dict[str, list[LevelConfig]]:
    """About `bits` / `code_bits` codebooks of equal sizes, at least one per category.

    Each further codebook goes to the category with the most features per codebook.
    """
    levels = dict.fromkeys(groups, 1)
    for _ in range(round(bits / code_bits) - len(groups)):
        levels[max(groups, key=lambda name: len(groups[name]) / (levels[name] + 1))] += 1
    size = max(2, round(2 ** (bits / sum(levels.values()))))
    ratios = [float(ratio) for ratio in _RATIOS]
    return {
        name: [
            LevelConfig(
                num_tokens=size, latent_dim=_multiple_of_four(ratios[level] if level < 3 else 1.0, len(members))
            )
            for level in range(levels[name])
        ]
        for name, members in groups.items()
    }


def _multiple_of_four(ratio: float, features: int) -> int:
    return min(_MOST_DIMS, max(4, round(ratio * features / 4) * 4))


def bits_of(sizes: dict[str, list[LevelConfig]]) -> float:
    """Bits per row."""
    return sum(math.log2(size.num_tokens) for category in sizes.values() for size in category)


def mean_squared_error(x: Array, decoded: Array) -> float:
    return float(np.square(decoded - x, dtype=np.float64).mean())


def fit_model(
    matrix: Matrix, groups: dict[str, list[int]], sizes: dict[str, list[LevelConfig]], chosen: argparse.Namespace
) -> CategoricalHierarchicalVQVAE:
    """The model of the best validation."""
    rows = np.concatenate([matrix.train, matrix.validation])
    settings = {
        "random_seed": chosen.seed,
        "device": chosen.device,
        "training.batch_size": chosen.batch_size,
        "training.topo_samples": chosen.batch_size,
        "training.num_epochs": chosen.epochs,
        "training.warmup_epochs": min(10, chosen.epochs // 2),
        "training.val_every_n_epochs": max(1, chosen.epochs // 10),
    }
    trainer = Trainer.from_config(str(chosen.config), settings)
    levels = {name: [size.model_dump() for size in own] for name, own in sizes.items()}
    validation = np.arange(len(matrix.train), len(rows))
    return trainer.fit(matrix.x[rows], groups, levels, None, validation, normalize=False).model


def model_coder(model: CategoricalHierarchicalVQVAE, search: Search, perturbations: int = 0) -> Coder:
    device = model.feature_order.device

    def code(rows: Array) -> Array:
        with torch.no_grad():
            blocks = torch.from_numpy(rows).to(device).split(4096)
            tokens = (model.get_tokens(block, search, perturbations=perturbations) for block in blocks)
            return np.concatenate([model.decode_from_tokens(part).cpu().numpy() for part in tokens])

    return code


def fitted(matrix: Matrix, kind: str, bits: int, chosen: argparse.Namespace) -> Iterator[tuple[str, int, float, Coder]]:
    """Quantizers of a kind at a bit rate: name, option, bits in fact, and the function that codes rows."""
    if kind in REFERENCES:
        fit, options, _ = REFERENCES[kind]
        x = matrix.x[matrix.train]
        mean = x.mean(0)
        training = Training(chosen.epochs, chosen.batch_size, chosen.train_beam, chosen.seed)
        for option in options:
            coder = fit(x - mean, bits, option, training)
            used = bits // option * option if kind in ("product", "rotated_product", "local_search") else bits
            yield kind, option, used, lambda rows, coder=coder: coder(rows - mean) + mean
        return
    groups = matrix.groups
    if kind == "one_category":
        groups = {"all": list(range(matrix.x.shape[1]))}
    assert groups is not None
    for option in chosen.model_options:
        sizes = (equal_codebooks if chosen.equal_codebooks else codebook_sizes)(groups, bits, option)
        model = fit_model(matrix, groups, sizes, chosen)
        for name in MODELS[kind]:
            search: Search = "nearest" if name == "nearest" else "joint"
            coder = model_coder(model, search, _PERTURBATIONS if name == "perturbed" else 0)
            yield name, option, bits_of(sizes), coder


class Run(NamedTuple):
    """The fits of a kind at a bit rate; a kind of several lines has the name of the last one."""

    kind: str
    bits: int
    seed: int


def measure(run: Run, chosen: argparse.Namespace) -> list[Row]:
    """A line per name of the kind: errors of the option with the lowest error of the validation rows."""
    kind = next((kind for kind, names in MODELS.items() if run.kind in names), run.kind)
    matrix = load_matrix(chosen.matrix)
    best: dict[str, tuple[Row, Coder]] = {}
    validation = matrix.x[matrix.validation]
    started = time.process_time()
    for name, option, used, coder in fitted(matrix, kind, run.bits, chosen):
        error = mean_squared_error(validation, coder(validation))
        row = {"kind": name, "bits_used": used, "option": option, "validation_error": error}
        if name not in best or error < best[name][0]["validation_error"]:
            best[name] = row, coder
    seconds = time.process_time() - started
    for row, coder in best.values():
        train = matrix.x[matrix.train]
        row |= {"matrix": matrix.name, "rows": len(train), "seconds": seconds, "commit": commit()}
        row["train_error"] = mean_squared_error(train, coder(train))
        if chosen.test:
            test = matrix.x[matrix.test]
            row["test_error"] = mean_squared_error(test, coder(test))
    return [row for row, _ in best.values()]


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Error against bits on logarithmic axes, a line per kind: test rows if all were scored, else validation rows."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    split = "test" if all("test_error" in row for row in rows) else "validation"
    figure, axes = plt.subplots(figsize=(7.5, 4.8), dpi=120, layout="constrained")
    for kind, (label, style) in CURVES.items():
        own = [row for row in rows if row["kind"] == kind]
        points = [
            (np.mean([r["bits_used"] for r in own if r["bits"] == bits]),
             np.mean([r[f"{split}_error"] for r in own if r["bits"] == bits]))
            for bits in sorted({row["bits"] for row in own})
        ]  # fmt: skip
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xscale="log", yscale="log", xlabel="bits per row", ylabel=f"mean squared error, {split} rows")
    for axis, ticks in ((axes.xaxis, BITS), (axes.yaxis, (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5))):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_locator(NullLocator())
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    kinds = [*MODELS, *REFERENCES]
    parser = study_parser(__doc__)
    parser.add_argument("matrix", type=Path, metavar="MATRIX.npz")
    parser.add_argument("--test", action="store_true", help="also score the test rows")
    parser.add_argument("--plot", type=Path, help="image file to write")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "100k.yaml", help="settings of the model")
    parser.add_argument("--bits", type=int, nargs="+", default=list(BITS))
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--model-options", type=int, nargs="+", default=list(MODEL_OPTIONS), metavar="CODE_BITS")
    parser.add_argument(
        "--equal-codebooks", action="store_true", help="of the model, instead of sizes in the default proportions"
    )
    parser.add_argument("--epochs", type=int, default=200, help="of the model and the neural quantizers")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--train-beam", type=int, default=32, help="beam width of the training of `residual`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args(argv)
    if load_matrix(chosen.matrix).groups is None and "model" in chosen.kinds:
        parser.error(f"{chosen.matrix} has no group_indices: write it with benchmarks.studies.feature_matrix")
    load_config(chosen.config)
    runs = [
        Run(MODELS.get(kind, (kind,))[-1], bits, chosen.seed)
        for bits in chosen.bits
        for kind in chosen.kinds
        if kind not in REFERENCES or bits <= REFERENCES[kind].most_bits
    ]
    status = perform(chosen, runs, measure, ["kind", "option", "validation_error"])
    if chosen.plot:
        plot(lines_of(chosen.output), chosen.plot)
    return status


if __name__ == "__main__":
    sys.exit(main())
