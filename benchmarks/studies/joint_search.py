"""What the joint search of tokens gains, and what it costs the categories.

    python -m benchmarks.studies.joint_search FRAME.npz ... [--config configs/100k.yaml] [--output study.jsonl]

FRAME holds features x [N, F], val_rows and a JSON text `meta` (group_indices, levels, feature_names), as in
`original_frames` of `quality.py`. A model is trained on the other rows (seed: number at the end of the file's name)
and its tokens of the validation rows are compared: nearest codes, and searches of `SEARCHES` (sweeps, weight).

`own_error` is the error of a category's features from its own tokens alone: ridge regression on the one-hot tokens of
its codebooks, fitted to the training rows with tokens of the same search. `partial_error` is that of the model's
partial decoders, which were trained on nearest codes.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.studies.variants import COMMON
from spinlock_fast import CategoricalHierarchicalVQVAE, Trainer
from spinlock_fast.kernels.ema_update import code_usage
from spinlock_fast.models.decoder_refit import least_squares

SEARCHES = [(0, 0.0), (1, 0.0), (2, 0.0), (3, 0.0), (2, 0.3), (2, 1.0), (2, 3.0)]
_PENALTY = 1e-2  # of the ridge regression, relative to the variance of its inputs


def trained_model(path: Path, config: str) -> tuple[CategoricalHierarchicalVQVAE, Tensor, Tensor]:
    """The model after the last epoch, all rows, and the mask of the validation rows."""
    with np.load(path) as file:
        x, val_rows, meta = file["x"], file["val_rows"], json.loads(str(file["meta"]))
    seed = int(re.findall(r"\d+", path.stem)[-1])
    trainer = Trainer.from_config(config, {**COMMON, "random_seed": seed, "device": "cpu"})
    result = trainer.fit(x, meta["group_indices"], meta["levels"], meta["feature_names"], val_rows)
    result.model.load_state_dict(result.final_state["model_state_dict"])
    scored = torch.zeros(len(x), dtype=torch.bool)
    scored[torch.from_numpy(val_rows)] = True
    return result.model.eval(), torch.from_numpy(x), scored


@torch.no_grad()
def measure(
    model: CategoricalHierarchicalVQVAE, x: Tensor, scored: Tensor, sweeps: int, search_weight: float = 0.0
) -> dict[str, Any]:
    """Metrics of the scored rows; 0 sweeps are the nearest codes."""
    tokens = model.get_tokens(x, "joint", sweeps, search_weight) if sweeps else model.get_tokens(x)
    squared = (model.decode_from_tokens(tokens) - x).square()[scored].mean(0)
    layout = model.quantizer.layout
    codes = tokens + layout.indices(x.device).code_offsets
    utilization, perplexity = code_usage(torch.bincount(codes[scored].flatten(), minlength=layout.total_codes), layout)
    partial = model.partial_reconstructions(model.quantizer.lookup(tokens[scored]))  # [G, B, F]
    categories = {}
    for name, members in model.config.group_indices.items():
        books = model.category_slice(name)
        one_hot = torch.zeros(len(x), layout.total_codes).scatter_(1, codes[:, books], 1.0)
        one_hot = one_hot[:, one_hot[~scored].any(0)]
        weights, intercept = least_squares(one_hot[~scored], x[~scored][:, members], _PENALTY)
        own = one_hot[scored] @ weights + intercept - x[scored][:, members]
        categories[name] = {
            "features": len(members),
            "error": float(squared[members].mean()),
            "own_error": float(own.square().mean()),
            "partial_error": float((partial[books][..., members] - x[scored][:, members]).square().mean()),
            "utilization": float(utilization[books].mean()),
            "perplexity": float(perplexity[books].mean()),
        }
    weights = torch.tensor([float(c["features"]) for c in categories.values()])
    means = {
        name: float((torch.tensor([c[name] for c in categories.values()]) * weights).sum() / weights.sum())
        for name in ("own_error", "partial_error")
    }
    sizes = torch.tensor(layout.num_codes)
    return {
        "sweeps": sweeps,
        "search_weight": search_weight,
        "error": float(squared.mean()),
        **means,
        "utilization": float(utilization.mean()),
        "perplexity_over_k": float((perplexity / sizes).mean()),
        "changed": float((tokens != model.get_tokens(x))[scored].double().mean()),
        "categories": categories,
    }


def main() -> None:
    """The command."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("frames", type=Path, nargs="+", metavar="FRAME.npz")
    options.add_argument("--config", default="configs/100k.yaml")
    options.add_argument("--output", type=Path)
    chosen = options.parse_args()
    for path in chosen.frames:
        model, x, scored = trained_model(path, chosen.config)
        for sweeps, weight in SEARCHES:
            row = {"frame": path.stem, **measure(model, x, scored, sweeps, weight)}
            print(
                " ".join(
                    f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items() if k != "categories"
                )
            )
            if chosen.output:
                with chosen.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
