"""What the joint search of tokens gains, and what it costs the categories.

    python -m benchmarks.studies.joint_search FRAME.npz ... --output study.jsonl [--config configs/100k.yaml]
        [--seeds 42 0 1] [--select]

FRAME holds features x [N, F], val_rows and a JSON text `meta` (group_indices, levels, feature_names), as in
`original_frames` of `quality.py`. A model is trained on the other rows and its tokens of the validation rows are
compared: nearest codes, and searches of `SEARCHES`. `--select` removes the validation rows and scores a tenth of the
others, drawn by the seed: settings are chosen there.

Searches that have a line in the output are skipped. A line without `mode` and `config` (the name of the configuration
file) is one of `report` and `100k`.

`own_error` is the error of a category's features from its own tokens alone: ridge regression on the one-hot tokens of
its codebooks, fitted to the training rows with tokens of the same search. `partial_error` is that of the model's
partial decoders, which were trained on nearest codes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.commands import ROOT
from benchmarks.studies.quality import fit_last, load_frame
from benchmarks.studies.sweep import Row, perform, study_parser
from benchmarks.studies.variants import COMMON
from spinlock_fast import CategoricalHierarchicalVQVAE, Trainer
from spinlock_fast.config.loading import load_config
from spinlock_fast.kernels.ema_update import code_usage
from spinlock_fast.models.decoder_refit import least_squares
from spinlock_fast.models.metrics import evaluate
from spinlock_fast.training.token_decoder_fit import fit_token_decoder

# Sweeps (0: nearest codes), weight, perturbations.
SEARCHES = [(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0), (2, 0, 8), (2, 0, 32), (2, 0.3, 0), (2, 1, 0), (2, 3, 0)]
BRIEF = [(0, 0, 0), (2, 0, 0), (2, 0, 8)]
SHOWN = ("error", "train_error", "own_error", "partial_error", "utilization", "changed")
_SELECT_SHARE = 0.1
_PENALTY = 1e-2  # of the ridge regression, relative to the variance of its inputs


class Run(NamedTuple):
    """One search, a line of the output."""

    frame: str
    seed: int
    sweeps: int
    search_weight: float
    perturbations: int
    mode: str = "report"
    config: str = "100k"


class Trained(NamedTuple):
    """A model after the last epoch, the rows of the mode [N, F], the mask of the scored rows, and `topo_post`."""

    model: CategoricalHierarchicalVQVAE
    x: Tensor
    scored: Tensor
    topo_post: float


def train(run: Run, chosen: argparse.Namespace) -> Trained:
    """Trains a model; with `training.joint_search_epochs`, its token decoder is fitted after that, to the same rows."""
    x, val_rows, meta = load_frame(chosen.frames[run.frame])
    if run.mode == "select":
        x = np.delete(x, val_rows, axis=0)
        drawn = np.random.default_rng([42, 7, run.seed]).permutation(len(x))
        val_rows = np.sort(drawn[: round(_SELECT_SHARE * len(x))])
    settings = {**COMMON, "random_seed": run.seed, "device": "cpu", "training.joint_search_epochs": 0}
    trainer = Trainer.from_config(str(chosen.config), settings)
    model = fit_last(trainer, x, meta, val_rows).model
    scored, rows = torch.zeros(len(x), dtype=torch.bool), torch.from_numpy(x)
    scored[torch.from_numpy(val_rows)] = True
    epochs = load_config(chosen.config).training.joint_search_epochs
    if epochs:
        training = trainer.config.training.model_copy(update={"joint_search_epochs": epochs})
        fit_token_decoder(model, rows[~scored], rows[scored], training, run.seed)
    topo_post = evaluate(model, rows[scored], load_config(chosen.config).training)["topo_post"]
    return Trained(model.eval(), rows, scored, topo_post)


@torch.no_grad()
def measure(run: Run, trained: Trained, chosen: argparse.Namespace) -> Row:
    """Metrics of the scored rows."""
    model, x, scored, topo_post = trained
    searched = ("joint", run.sweeps, run.search_weight, run.perturbations)
    tokens = model.get_tokens(x, *searched) if run.sweeps else model.get_tokens(x)
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
        "topo_post": topo_post,
        "error": float(squared.mean()),
        "train_error": float(errors[~scored].mean()),
        **means,
        "utilization": float(utilization.mean()),
        "perplexity_over_k": float((perplexity / sizes).mean()),
        "changed": float((tokens != model.get_tokens(x))[scored].double().mean()),
        "categories": categories,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = study_parser(__doc__)
    parser.add_argument("frames", type=Path, nargs="+", metavar="FRAME.npz")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "100k.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--select", action="store_true", help="score a tenth of the training rows instead")
    parser.add_argument("--brief", action="store_true", help="nearest codes, and 2 sweeps with 0 and 8 perturbations")
    chosen = parser.parse_args(argv)
    chosen.frames = {path.stem: path for path in chosen.frames}
    facts = ("select" if chosen.select else "report", chosen.config.stem)
    models = product(chosen.seeds, chosen.frames)
    runs = [
        Run(frame, seed, *search, *facts)
        for (seed, frame), search in product(models, BRIEF if chosen.brief else SEARCHES)
    ]
    return perform(chosen, runs, measure, SHOWN, prepare=train, alike=lambda run: run[:2])


if __name__ == "__main__":
    sys.exit(main())
