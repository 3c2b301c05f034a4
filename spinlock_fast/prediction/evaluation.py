"""Measures a predictor against the majority, nearest neighbours, and a direct regression of the features."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from spinlock_fast.errors import DataError
from spinlock_fast.prediction.inputs import Batch, Targets, signature
from spinlock_fast.prediction.predictor import Predictor

_METHODS = ("predicted", "majority", "nearest")
_NEIGHBOURS = 16
_BINS = 10  # of the calibration table


@torch.no_grad()
def evaluate(predictor: Predictor, batches: Iterable[Batch], targets: Targets) -> dict[str, Any]:
    """Metrics on some rows.

    Args:
        batches: the rows.
        targets: of all rows.

    Returns:
        accuracy and log_loss (nats) by method, as means over codebooks and for each codebook: of the predictor
        ("predicted"), of the most frequent code of the training rows ("majority"), and of the 16 training rows nearest
        in the inputs ("nearest"). The log-loss of a level is conditional on the true tokens of the levels before it,
        so the sum over codebooks is the log-loss of the row. calibration: a row for each tenth of confidence.
        features_error: mean squared error of features, in the units of `Tokenizer.features`, decoded from tokens by
        each method, from the true tokens ("true_tokens"), by direct regression from the same inputs ("regression") and
        of the mean ("mean").

    Raises:
        DataError: there is no row.
    """
    prior = [(counts + 1.0) / (counts + 1.0).sum() for counts in predictor.counts]
    parts: dict[str, list[Tensor]] = {}
    for batch in batches:
        selected = predictor.standardizer(batch, predictor.device)
        tokens, features = targets.tokens[batch.index], targets.features[batch.index]
        for name, values in _measure(predictor, selected, tokens, features, prior).items():
            parts.setdefault(name, []).append(values.double())
    if not parts:
        raise DataError("no row to measure on")
    found = {name: torch.cat(values) for name, values in parts.items()}

    def by_method(kind: str, column: int | slice = slice(None)) -> dict[str, float]:
        return {method: float(found[f"{kind}/{method}"][:, column].mean()) for method in _METHODS}

    names = predictor.tokenizer.model.codebook_names
    return {
        "accuracy": by_method("accuracy"),
        "log_loss": by_method("log_loss"),
        "codebooks": [
            {
                "name": name,
                "codes": predictor.network.num_codes[g],
                "accuracy": by_method("accuracy", g),
                "log_loss": by_method("log_loss", g),
            }
            for g, name in enumerate(names)
        ],
        **_calibration(found["confidence"].flatten(), found["accuracy/predicted"].flatten()),
        "features_error": {
            name.partition("/")[2]: float(values.mean()) for name, values in found.items() if name.startswith("error/")
        },
        "samples": len(found["confidence"]),
    }


def _measure(
    predictor: Predictor, inputs: tuple[Tensor, Tensor | None], true: Tensor, features: Tensor, prior: list[Tensor]
) -> dict[str, Tensor]:
    """Values for each row [B] or each token [B, G]: accuracy, log_loss and error by method, and confidence."""
    greedy_logits, greedy = predictor.network(*inputs)
    given, _ = predictor.network(*inputs, true.to(greedy.device))
    nearest = _nearest(predictor, signature(*inputs), prior)
    methods = {
        "predicted": (greedy.cpu(), [logits.softmax(1).cpu() for logits in given]),
        "majority": (torch.stack([p.argmax() for p in prior]).expand(len(true), -1), [p[None] for p in prior]),
        "nearest": (torch.stack([p.argmax(1) for p in nearest], 1), nearest),
    }
    found = {"confidence": torch.stack([logits.softmax(1).amax(1) for logits in greedy_logits], 1).cpu()}
    for name, (tokens, probabilities) in methods.items():
        found[f"accuracy/{name}"] = (tokens == true).float()
        found[f"log_loss/{name}"] = _log_losses(probabilities, true)
        found[f"error/{name}"] = _decoded_error(predictor, tokens, features)
    found["error/true_tokens"] = _decoded_error(predictor, true, features)
    found["error/regression"] = (predictor.regression(*inputs).cpu() - features).square().mean(1)
    found["error/mean"] = features.square().mean(1)
    return found


def _nearest(predictor: Predictor, signatures: Tensor, prior: list[Tensor]) -> list[Tensor]:
    """[G] of [B, K_g] probabilities: the tokens of the nearest training rows, and the prior as one more row."""
    known = predictor.neighbours
    count = min(_NEIGHBOURS, len(known.tokens))
    rows = torch.cdist(signatures, known.signatures).topk(count, largest=False).indices
    found = []
    for g, p in enumerate(prior):
        votes = torch.zeros(len(rows), len(p)).scatter_add_(1, known.tokens[rows, g], torch.ones(rows.shape))
        found.append((votes + p) / (count + 1.0))
    return found


def _log_losses(probabilities: list[Tensor], true: Tensor) -> Tensor:
    """[B, G] -log of the probability of the true tokens [B, G]."""
    each = [p.expand(len(true), -1).gather(1, true[:, g : g + 1]) for g, p in enumerate(probabilities)]
    return -torch.cat(each, 1).clamp(min=1e-30).log()


def _decoded_error(predictor: Predictor, tokens: Tensor, features: Tensor) -> Tensor:
    """[B] mean squared error of the features that tokens decode to."""
    decoded = predictor.tokenizer.model.decode_from_tokens(tokens.to(predictor.device)).cpu()
    return (decoded - features).square().mean(1)


def _calibration(confidence: Tensor, correct: Tensor) -> dict[str, Any]:
    """Counts, mean confidence and accuracy by tenth of confidence, and their mean absolute difference."""
    tenth = (confidence * _BINS).long().clamp(max=_BINS - 1)
    table = []
    for i in range(_BINS):
        inside = tenth == i
        if count := int(inside.sum()):
            mean, accuracy = float(confidence[inside].mean()), float(correct[inside].mean())
            table.append({"from": i / _BINS, "count": count, "confidence": mean, "accuracy": accuracy})
    error = sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in table) / len(confidence)
    return {"calibration": table, "calibration_error": error}
