"""Checks on the original project's simulated operators; SPINLOCK_FAST_REAL_DATA names their folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spinlock_fast.compat.original import convert
from spinlock_fast.tokenizer import Tokenizer
from spinlock_fast.training.trainer import Trainer

FOLDER = os.environ.get("SPINLOCK_FAST_REAL_DATA", "")
ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not FOLDER, reason="SPINLOCK_FAST_REAL_DATA does not name the folder of the real data")


def frame(seed: int) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    with np.load(Path(FOLDER) / "original_frames" / f"seed{seed}.npz", allow_pickle=False) as arrays:
        found = dict(arrays)
    return found, json.loads(str(found["meta"]))


def test_an_original_checkpoint_converts_to_the_same_tokens() -> None:
    known, _ = frame(42)
    data = str(Path(FOLDER) / "operators_real.h5")
    converted = convert(Path(FOLDER) / "original_checkpoint", data)
    x, tokens = torch.from_numpy(known["x"]), torch.from_numpy(known["tokens"].astype(np.int64))
    model = converted.model
    with torch.no_grad():
        ours = model.get_tokens(x)
        latents = model.encode(x).double()
        codes = model.quantizer.lookup(torch.cat([ours, tokens])).double()
        # Squared distances of both choices; a token may differ where float32 does not tell them apart: |e|^2 - 2 z.e
        # is rounded like |z|^2 + |e|^2, which may be tens of thousands of times the distance.
        book = model.quantizer.layout.indices(torch.device("cpu")).codebook_of_column
        square = (torch.cat([latents, latents]) - codes).square()
        by_book = torch.zeros(2 * len(x), model.num_codebooks, dtype=torch.float64)
        ours_d, theirs_d = by_book.index_add(1, book, square).chunk(2)
        size = by_book.index_add(1, book, torch.cat([latents, latents]).square() + codes.square()).chunk(2)[1]
        differs = ours != tokens
        assert ((theirs_d - ours_d).abs() <= torch.finfo(torch.float32).eps * size)[differs].all()
        np.testing.assert_allclose(model.decode_from_tokens(tokens).numpy(), known["recon"], atol=1e-4)
    tokenizer = Tokenizer.from_payload(_payload(converted))
    x_ours = np.concatenate([block for _, block in tokenizer.features_file(data)])
    np.testing.assert_allclose(x_ours, known["x"], atol=1e-4)


def _payload(converted: Any) -> dict[str, Any]:
    from spinlock_fast.checkpoints.directory import model_payload

    return model_payload(converted.model, converted.model.state_dict(), converted.epoch, converted.parts)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [42, 43, 44])
def test_tokens_beat_the_originals_in_its_own_frame(seed: int) -> None:
    known, meta = frame(seed)
    overrides = {
        "device": "cpu",
        "random_seed": seed,
        "training.batch_size": 128,
        "training.topo_samples": 128,
        "training.early_stopping_patience": 1000,
    }
    trainer = Trainer.from_config(ROOT / "configs" / "100k.yaml", overrides)
    result = trainer.fit(known["x"], meta["group_indices"], meta["levels"], meta["feature_names"], known["val_rows"])
    m = result.metrics
    tokens = known["tokens"][known["val_rows"]]
    sizes = [book["num_tokens"] for name in meta["group_indices"] for book in meta["levels"][name]]
    original_use = np.mean([len(np.unique(tokens[:, g])) / k for g, k in enumerate(sizes)])
    original_perplexity = np.mean([_perplexity(tokens[:, g]) / k for g, k in enumerate(sizes)])
    assert [c["name"] for c in m["categories"]] == list(meta["group_indices"])
    assert m["reconstruction_error"] < min(meta["original"]["error_best_epoch"], meta["original"]["error_final"])
    assert 1 >= m["utilization"] > max(original_use, meta["original"]["utilization_final"])
    assert m["perplexity_over_k"] > original_perplexity


def _perplexity(tokens: np.ndarray[Any, Any]) -> float:
    share = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return float(np.exp(-(share * np.log(share)).sum()))
