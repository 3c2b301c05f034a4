"""What the joint search of tokens gains, and what it costs the categories.

    python -m benchmarks.studies.joint_search FRAME.npz ... [--config configs/100k.yaml] [--output study.jsonl]
        [--seeds 42 0 1] [--select]

FRAME holds features x [N, F], val_rows and a JSON text `meta` (group_indices, levels, feature_names), as in
`original_frames` of `quality.py`. A model is trained on the other rows and its tokens of the validation rows are
compared: nearest codes, and searches of `SEARCHES`. `--select` removes the validation rows and scores a tenth of the
others, drawn by the seed: settings are chosen there.

`own_error` is the error of a category's features from its own tokens alone: ridge regression on the one-hot tokens of
its codebooks, fitted to the training rows with tokens of the same search. `partial_error` is that of the model's
partial decoders, which were trained on nearest codes.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.studies.variants import COMMON
from spinlock_fast import CategoricalHierarchicalVQVAE, Trainer
from spinlock_fast.config.loading import load_config
from spinlock_fast.kernels.ema_update import code_usage
from spinlock_fast.models.decoder_refit import least_squares
from spinlock_fast.models.metrics import evaluate
from spinlock_fast.training.token_decoder_fit import fit_token_decoder

# Sweeps (0: nearest codes), weight, perturbations.
SEARCHES = [(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0), (2, 0, 8), (2, 0, 32), (2, 0.3, 0), (2, 1, 0), (2, 3, 0)]
_SELECT_SHARE = 0.1
_PENALTY = 1e-2  # of the ridge regression, relative to the variance of its inputs


def trained_model(
    path: Path, config: str, seed: int, select: bool = False
) -> tuple[CategoricalHierarchicalVQVAE, Tensor, Tensor]:
    """The model after the last epoch, the rows of the mode, and the mask of the scored rows.

    With `training.joint_search_epochs`, its token decoder is fitted after that, to the same rows.
    """
    with np.load(path) as file:
        x, val_rows, meta = file["x"], file["val_rows"], json.loads(str(file["meta"]))
    if select:
        x = np.delete(x, val_rows, axis=0)
        drawn = np.random.default_rng([42, 7, seed]).permutation(len(x))
        val_rows = np.sort(drawn[: round(_SELECT_SHARE * len(x))])
    settings = {**COMMON, "random_seed": seed, "device": "cpu", "training.joint_search_epochs": 0}
    trainer = Trainer.from_config(config, settings)
    result = trainer.fit(x, meta["group_indices"], meta["levels"], meta["feature_names"], val_rows)
    result.model.load_state_dict(result.final_state["model_state_dict"])
    scored, rows = torch.zeros(len(x), dtype=torch.bool), torch.from_numpy(x)
    scored[torch.from_numpy(val_rows)] = True
    epochs = load_config(config).training.joint_search_epochs
    if epochs:
        training = trainer.config.training.model_copy(update={"joint_search_epochs": epochs})
        fit_token_decoder(result.model, rows[~scored], rows[scored], training, seed)
    return result.model.eval(), rows, scored


@torch.no_grad()
def measure(
    model: CategoricalHierarchicalVQVAE,
    x: Tensor,
    scored: Tensor,
    sweeps: int,
    search_weight: float = 0.0,
    perturbations: int = 0,
) -> dict[str, Any]:
    """Metrics of the scored rows; 0 sweeps are the nearest codes."""
    searched = ("joint", sweeps, search_weight, perturbations)
    tokens = model.get_tokens(x, *searched) if sweeps else model.get_tokens(x)
    errors = (model.decode_from_tokens(tokens) - x).square()
    squared = errors[scored].mean(0)
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
        "perturbations": perturbations,
        "error": float(squared.mean()),
        "train_error": float(errors[~scored].mean()),
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
    options.add_argument("--seeds", type=int, nargs="+", default=[42])
    options.add_argument("--select", action="store_true", help="score a tenth of the training rows instead")
    options.add_argument("--brief", action="store_true", help="nearest codes, and 2 sweeps with 0 and 8 perturbations")
    chosen = options.parse_args()
    searches = [(0, 0, 0), (2, 0, 0), (2, 0, 8)] if chosen.brief else SEARCHES
    training = load_config(chosen.config).training
    for seed, path in itertools.product(chosen.seeds, chosen.frames):
        model, x, scored = trained_model(path, chosen.config, seed, chosen.select)
        topo_post = evaluate(model, x[scored], training)["topo_post"]
        for sweeps, weight, perturbations in searches:
            row = {"frame": path.stem, "seed": seed, "topo_post": topo_post}
            row |= measure(model, x, scored, sweeps, weight, perturbations)
            shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items() if k != "categories"}
            print(" ".join(f"{k}={v}" for k, v in shown.items()), flush=True)
            if chosen.output:
                with chosen.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
