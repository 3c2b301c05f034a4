"""Which corrections may be asked for, and the one warning of an argument outside the fused path."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

# What the original does that looks unintended. Each is repeated unless its correction is asked for.
CORRECTIONS = {
    "beam_update": "with beam search every stage learns; else the first alone",
    "kmeans_scale": "a cluster that k-means leaves empty keeps its code; else it falls to the origin",
    "masked_commitment": "cosine codes under a mask are compared with unit latents; else with latents as they came",
    "orthogonal_loss": "a code of length 0 counts as not orthonormal; else as better than orthonormal",
    "reset_scale": "a replaced code starts with the mean count of its codebook; else it dies again at once",
}


def checked_corrections(names: Iterable[str] | str) -> frozenset[str]:
    """The names as a set; "all" stands for all of them.

    Raises:
        ValueError: a name that is none.
    """
    chosen = frozenset(CORRECTIONS if names == "all" else [names] if isinstance(names, str) else names)
    unknown = chosen - CORRECTIONS.keys()
    if unknown:
        raise ValueError(f"corrections must be among {', '.join(CORRECTIONS)}, got {', '.join(sorted(unknown))}")
    return chosen


def check_mask(mask: Tensor | None, rows: Tensor) -> None:
    """Raises ValueError where a mask is not [b, n] bool for rows [b, n, d]."""
    if mask is not None and (mask.shape != rows.shape[:2] or mask.dtype != torch.bool):
        raise ValueError(f"mask must be {list(rows.shape[:2])} bool, got {list(mask.shape)} {mask.dtype}")


def refuse_contradictions(**given: Any) -> None:
    """Raises for arguments that exclude each other, where the original asserts that they do not.

    Raises:
        ValueError: one line that names the arguments.
        NotImplementedError: `sync_affine_param`.
    """

    def on(name: str) -> bool:
        return bool(given.get(name, False))

    if on("sync_affine_param"):
        raise NotImplementedError("sync_affine_param: statistics of several processes are not supported")
    gradients = [name for name in ("straight_through", "rotation_trick", "directional_reparam") if on(name)]
    if len(gradients) > 1:
        hint = " (rotation_trick=False turns off what is on by default)" if "rotation_trick" in gradients else ""
        raise ValueError(f"{' and '.join(gradients)} exclude each other{hint}")
    for first, second in _EXCLUSIVE:
        if on(first) and on(second):
            raise ValueError(f"{first.replace('has_bridge', 'vq_bridge')} does not go with {second}")
    if on("directional_reparam") and given["threshold_ema_dead_code"] == 0:
        raise ValueError("directional_reparam needs threshold_ema_dead_code above 0")
    for name in ("has_bridge", "sync_update_v"):
        if on(name) and not on("learnable_codebook"):
            raise ValueError(f"{name.replace('has_bridge', 'vq_bridge')} needs learnable_codebook")
    if not 0 <= given.get("sync_update_v", 0) <= 1:
        raise ValueError(f"sync_update_v must lie between 0 and 1, got {given['sync_update_v']}")
    for name, message in _OF_A_CALL.items():
        if on(name):
            raise ValueError(message)


_EXCLUSIVE = (
    ("use_cosine_sim", "learnable_codebook"),
    ("straight_through", "learnable_codebook"),
    ("ema_update", "learnable_codebook"),
    ("has_bridge", "ema_update"),
    ("affine_param", "use_cosine_sim"),
)
_OF_A_CALL = {
    "mask_and_lens": "give mask or lens, not both",
    "topk_of_heads": "topk needs heads=1",
    "topk_below_1": "topk must be at least 1",
    "topk_with_cross_entropy": "topk does not go with commitment_use_cross_entropy_loss in training",
    "topk_with_optimizer": "topk does not go with in_place_codebook_optimizer in training",
    "active_codes_per_head": "orthogonal_reg_active_codes_only does not go with separate_codebook_per_head",
}


@cache
def warn_reference(argument: str, cost: str = "keeps distances of all rows to all codes in memory") -> None:
    """One warning per process and argument."""
    warnings.warn(f"{argument} is not fused: the reference path serves it, which {cost}", UserWarning, stacklevel=4)
