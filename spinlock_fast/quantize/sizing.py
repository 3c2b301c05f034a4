"""Codebook sizes: codes and dimensions of each level of each category."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from spinlock_fast.config.schema import LevelConfig, Levels, parse_ratios

_COMMITMENT_BITS = 0.05  # commitment weight x bits per feature
_AUTO_COMMITMENT = (0.1, 0.25)  # range of the commitment weight
_ROWS_OF_A_CODE = 5.0  # fewest training rows of a code that is not dead
_AUTO_THRESHOLD = (0.2, 0.5)  # range of the threshold for dead codes


def size_codebooks(num_features: int, ratios: Sequence[float], uniform: bool = False) -> list[LevelConfig]:
    """Codebook sizes of one category, coarse to fine.

    With n features and base = int(7 log2 n): level 0 has max(4 (base // 4), 15) codes, level l
    max(6, int(base / 2^l)); level l has max(4, 4 ceil(n r_l / 4)) dimensions.

    Args:
        num_features: n, at least 1.
        ratios: r_l, latent dimensions per feature of each level.
        uniform: every level gets as many codes as level 0.

    Raises:
        ValueError: n below 1.
    """
    if num_features < 1:
        raise ValueError(f"a category needs at least 1 feature, got {num_features}")
    base = int(7 * math.log2(num_features))
    coarse = max(4 * (base // 4), 15)
    sizes = []
    for level, ratio in enumerate(ratios):
        codes = coarse if uniform or level == 0 else max(6, int(base / 2**level))
        dim = max(4, 4 * math.ceil(num_features * ratio / 4))
        sizes.append(LevelConfig(num_tokens=codes, latent_dim=dim))
    return sizes


def commitment_weight(cost: float | Literal["auto"], levels: Sequence[LevelConfig], features: int) -> float:
    """The weight of the commitment loss: `cost`, or by the bits per feature of all codebooks if it is "auto".

    With few bits the quantization error is large: gradients that pass the quantizer unchanged are far off, and
    distances between codes are far from those between latents unless the latents are drawn closer to the codes. With
    many bits a large weight costs accuracy. See docs/quality.md.

    Args:
        cost: `model.commitment_cost`.
        levels: all codebooks.
        features: their number.
    """
    if cost != "auto":
        return cost
    bits = sum(math.log2(level.num_tokens) for level in levels)
    low, high = _AUTO_COMMITMENT
    return min(max(_COMMITMENT_BITS * features / max(bits, 1.0), low), high)


def dead_code_threshold(threshold: float | Literal["auto"], num_codes: Sequence[int], rows: int) -> float:
    """The share of the mean usage below which a code is dead; "auto": by the rows of a code.

    A code of few training rows does not serve other rows, see docs/quality.md.

    Args:
        threshold: `training.dead_code_threshold`.
        num_codes: sizes of the codebooks.
        rows: training rows.
    """
    if threshold != "auto":
        return threshold
    low, high = _AUTO_THRESHOLD
    return min(max(_ROWS_OF_A_CODE * max(num_codes) / rows, low), high)


def resolve_levels(
    group_sizes: Mapping[str, int], levels: Levels | None, compression_ratios: str, uniform: bool = False
) -> dict[str, list[LevelConfig]]:
    """Codebook sizes of every category, in the order of `group_sizes`.

    Args:
        group_sizes: number of features of each category.
        levels: None or [] to derive sizes from the features, a list for all categories, or a mapping with one list per
            category.
        compression_ratios: text such as "0.5:1:1.5".
        uniform: see `size_codebooks`.

    Raises:
        ValueError: `levels` names other categories than `group_sizes`, or gives one no codebook.
    """
    if not levels:
        ratios = parse_ratios(compression_ratios)
        return {name: size_codebooks(n, ratios, uniform) for name, n in group_sizes.items()}
    if isinstance(levels, list):
        return {name: list(levels) for name in group_sizes}
    if set(levels) != set(group_sizes):
        name = sorted(set(levels) ^ set(group_sizes))[0]
        raise ValueError(f"levels and categories differ: {name!r} is in only one of them")
    empty = [name for name in group_sizes if not levels[name]]
    if empty:
        raise ValueError(f"levels.{empty[0]}: at least one codebook is needed")
    return {name: list(levels[name]) for name in group_sizes}
