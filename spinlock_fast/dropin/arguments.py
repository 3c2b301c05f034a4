"""Checks of constructor and `forward` arguments, the `corrections`, and the warning of unfused arguments."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Behaviour of vector-quantize-pytorch that looks unintended. Each is reproduced unless its correction is requested.
CORRECTIONS = {
    "beam_update": "beam search updates the codebooks of all stages, not only of the first",
    "kmeans_scale": "k-means keeps the code of an empty cluster, instead of setting it to 0",
    "masked_commitment": "with use_cosine_sim and a mask, the commitment loss uses unit latents, not raw ones",
    "orthogonal_loss": "a code of length 0 increases the orthogonal loss, instead of decreasing it",
    "reset_scale": "a replaced dead code starts with the mean count of its codebook, not with the threshold",
}


def check_corrections(names: Iterable[str] | str) -> frozenset[str]:
    """The names as a set; "all" selects all corrections.

    Raises:
        ValueError: an unknown name.
    """
    selected = frozenset(CORRECTIONS if names == "all" else [names] if isinstance(names, str) else names)
    unknown = selected - CORRECTIONS.keys()
    if unknown:
        raise ValueError(f"corrections must be among {', '.join(CORRECTIONS)}, got {', '.join(sorted(unknown))}")
    return selected


def check_mask(mask: Tensor | None, rows: Tensor) -> None:
    """Raises ValueError unless the mask is None or [b, n] bool, for rows [b, n, d]."""
    if mask is not None and (mask.shape != rows.shape[:2] or mask.dtype != torch.bool):
        raise ValueError(f"mask must be {list(rows.shape[:2])} bool, got {list(mask.shape)} {mask.dtype}")


def check_compatible(**arguments: Any) -> None:
    """Checks arguments that exclude each other, for which vector-quantize-pytorch has assertions.

    Raises:
        ValueError: one line that names the arguments.
    """

    def is_set(name: str) -> bool:
        return bool(arguments.get(name, False))

    estimators = [name for name in ("straight_through", "rotation_trick", "directional_reparam") if is_set(name)]
    if len(estimators) > 1:
        hint = " (rotation_trick=False turns off what is on by default)" if "rotation_trick" in estimators else ""
        raise ValueError(f"{' and '.join(estimators)} exclude each other{hint}")
    for first, second in _EXCLUSIVE:
        if is_set(first) and is_set(second):
            raise ValueError(f"{first} does not go with {second}")
    if is_set("directional_reparam") and arguments["threshold_ema_dead_code"] == 0:
        raise ValueError("directional_reparam needs threshold_ema_dead_code above 0")
    for name in ("vq_bridge", "sync_update_v"):
        if is_set(name) and not is_set("learnable_codebook"):
            raise ValueError(f"{name} needs learnable_codebook")
    if not 0 <= arguments.get("sync_update_v", 0) <= 1:
        raise ValueError(f"sync_update_v must lie between 0 and 1, got {arguments['sync_update_v']}")


_EXCLUSIVE = (
    ("use_cosine_sim", "learnable_codebook"),
    ("straight_through", "learnable_codebook"),
    ("ema_update", "learnable_codebook"),
    ("vq_bridge", "ema_update"),
    ("affine_param", "use_cosine_sim"),
)


@cache
def warn_unfused(argument: str, cost: str = "keeps distances of all rows to all codes in memory") -> None:
    """Warns once per process and argument."""
    warnings.warn(f"{argument} is not fused: it runs on the reference path, which {cost}", UserWarning, stacklevel=4)
