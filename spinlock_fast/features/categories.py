"""Categories of features: discovered by correlation clustering, or read from a file."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spinlock_fast.config.loading import read_text_file
from spinlock_fast.config.random_streams import Stream, generator
from spinlock_fast.config.schema import RunConfig, TrainingConfig
from spinlock_fast.distributed import SINGLE, Ranks
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.features.blocks import Blocks
from spinlock_fast.features.names import family_of
from spinlock_fast.features.statistics import correlation
from spinlock_fast.messages import one_line, shown

log = logging.getLogger(__name__)

Groups = dict[str, list[int]]

_CORRELATION_ROWS = 50_000
_ROUNDING = 1e-9  # smaller correlation distances are set to 0
MIN_ROWS = 10


def find_categories(x: Blocks, feature_names: Sequence[str], config: RunConfig) -> Groups:
    """Categories of features, as `training.category_assignment` says; see `discover_categories`."""
    training = config.training
    if training.mapping_file is not None:
        return assign_categories(training.mapping_file, feature_names)
    groups = discover_categories(x, feature_names, training, config.random_seed)
    requested = training.num_categories_auto
    if requested is not None and len(groups) != requested:
        log.warning(
            "%d categories instead of num_categories_auto %d: those under min_features_per_category %d were merged",
            len(groups),
            requested,
            training.min_features_per_category,
        )
    return groups


def discover_categories(x: Blocks, feature_names: Sequence[str], config: TrainingConfig, seed: int) -> Groups:
    """Clusters correlated features.

    Ward linkage with the distance 1 - |Pearson correlation|, cut into the number of clusters with the highest
    silhouette; cuts with a singleton cluster are skipped where others exist. Invariant to the scale of the features.

    Args:
        x: [N, F] cleaned features; at most 50,000 random rows are used.
        feature_names: F names of the form "family::name".
        config: num_categories_auto, max_clusters, min_features_per_category, isolated_families.
        seed: seed of the row sample.

    Returns:
        {"cluster_1": [feature, ...], ...} in dendrogram order, isolated families last.

    Raises:
        DataError: fewer than 10 rows.
    """
    N = x.shape[0]
    if N < MIN_ROWS:
        raise DataError(f"{N} training rows are too few to discover categories, which needs at least {MIN_ROWS}")
    if N > _CORRELATION_ROWS:
        rows = generator(seed, Stream.CATEGORIES).choice(N, _CORRELATION_ROWS, replace=False)
        x = x[np.sort(rows)]
    distance = 1.0 - np.abs(correlation(x))
    distance[distance < _ROUNDING] = 0.0
    families = np.array([family_of(name) for name in feature_names])
    isolated = [family for family in config.isolated_families if (families == family).any()]
    parts = [np.flatnonzero(~np.isin(families, isolated))] if len(isolated) < len(set(families)) else []
    parts += [np.flatnonzero(families == family) for family in isolated]
    clusters: list[NDArray[np.int64]] = []
    for part in parts:
        labels = _cluster_features(distance[np.ix_(part, part)], config)
        clusters += [part[labels == label] for label in range(labels.max() + 1)]
    return {f"cluster_{i}": members.tolist() for i, members in enumerate(clusters, start=1)}


def _cluster_features(distance: NDArray[np.float64], config: TrainingConfig) -> NDArray[np.int64]:
    """Cluster labels 0, 1, ... of features [F], with small clusters merged."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    F = distance.shape[0]
    smallest = config.min_features_per_category
    if 2 * smallest > F or F < 3:
        return np.zeros(F, dtype=np.int64)
    tree = linkage(squareform(distance, checks=False), method="ward")
    most = min(config.max_clusters, F - 1)
    if config.num_categories_auto is not None:
        labels = fcluster(tree, min(config.num_categories_auto, F), criterion="maxclust")
        return _merge_small(_consecutive(labels), distance, smallest)
    cuts = [_consecutive(fcluster(tree, k, criterion="maxclust")) for k in range(2, most + 1)]
    cuts = [cut for cut in cuts if cut.max() >= 1]
    if not cuts:  # all features are perfectly correlated
        return np.zeros(F, dtype=np.int64)
    without_singletons = [cut for cut in cuts if np.bincount(cut).min() > 1]
    best = max(without_singletons or cuts, key=lambda cut: silhouette(distance, cut))
    return _merge_small(best, distance, smallest)


def silhouette(distance: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Mean silhouette coefficient (Rousseeuw 1987) of labels 0, 1, ... for a distance matrix [F, F].

    A singleton has the coefficient 0.
    """
    member = np.eye(labels.max() + 1)[labels]  # [F, K]
    size = member.sum(0)
    sums = distance @ member
    own = labels[:, None] == np.arange(size.size)
    inside = sums[own] / np.maximum(size[labels] - 1, 1)
    outside = np.where(own, np.inf, sums / size).min(1)
    larger = np.maximum(inside, outside)
    score = np.where((size[labels] > 1) & (larger > 0), (outside - inside) / np.where(larger > 0, larger, 1.0), 0.0)
    return float(score.mean())


def _merge_small(labels: NDArray[np.int64], distance: NDArray[np.float64], smallest: int) -> NDArray[np.int64]:
    """Merges each cluster with fewer than `smallest` members, smallest first, into the nearest by mean distance."""
    while True:
        size = np.bincount(labels)
        if size.size < 2 or size.min() >= smallest:
            return labels
        small = int(size.argmin())
        member = np.eye(size.size)[labels]
        mean = (member[:, small] @ distance @ member) / (size[small] * size)
        mean[small] = np.inf
        labels = _consecutive(np.where(labels == small, mean.argmin(), labels))


def _consecutive(labels: NDArray[np.integer]) -> NDArray[np.int64]:
    result: NDArray[np.int64] = np.unique(labels, return_inverse=True)[1].astype(np.int64)
    return result


def read_mapping(path: str | Path) -> dict[str, list[str | int]]:
    """Reads a JSON file {category: [feature names or indices]}.

    Raises:
        ConfigError: the file cannot be read, or is not such JSON.
    """
    try:
        text = read_text_file(Path(path))
    except ConfigError as error:
        raise ConfigError(f"training.category_assignment: {error}") from None
    try:
        data = json.loads(text, object_pairs_hook=_distinct_keys)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"training.category_assignment: {path} is not JSON: {one_line(error)}") from None
    if not isinstance(data, dict) or not all(isinstance(members, list) for members in data.values()):
        raise ConfigError(f"training.category_assignment: {path}: expected {{category: [features]}}")
    return data


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise ValueError(f"{shown(key)} is given twice")
        mapping[key] = value
    return mapping


def assign_categories(path: str | Path, feature_names: Sequence[str]) -> Groups:
    """Categories of features from a mapping file, see `read_mapping`.

    Features dropped by cleaning are ignored, and so are categories without features.

    Raises:
        ConfigError: see `read_mapping`; a feature is in two categories; no feature is named.
    """
    data = read_mapping(path)
    position = {name: i for i, name in enumerate(feature_names)}
    category_of: dict[int, str] = {}
    groups: Groups = {}
    for category, members in data.items():
        for member in members:
            i = _feature_index(member, position, path)
            if i is None:
                continue
            if i in category_of:
                raise ConfigError(
                    f"training.category_assignment: {feature_names[i]!r} is in {category_of[i]} and in {category}"
                )
            category_of[i] = category
            groups.setdefault(category, []).append(i)
    if not groups:
        raise ConfigError(f"training.category_assignment: {path} names none of the features")
    listed = sum(len(members) for members in data.values())
    if listed > len(category_of):
        log.warning(
            "%s: %d of %d names match no feature (misspelt, or dropped by cleaning)",
            path,
            listed - len(category_of),
            listed,
        )
    return groups


def _feature_index(member: object, position: dict[str, int], path: str | Path) -> int | None:
    """Index of the feature named by a member of a mapping file; None for a feature dropped by cleaning."""
    if isinstance(member, str):
        return position.get(member)
    if isinstance(member, int) and not isinstance(member, bool) and 0 <= member < len(position):
        return member
    raise ConfigError(
        f"training.category_assignment: {path}: {member!r} is neither a feature's name "
        f"nor one of 0..{len(position) - 1}"
    )


def category_correlation(x: Blocks, groups: Groups, ranks: Ranks = SINGLE) -> NDArray[np.float64]:
    """[C, C] mean |Pearson correlation| between features of two categories; within one, over distinct pairs."""
    strength = np.abs(correlation(x, ranks=ranks))
    member = np.zeros((x.shape[1], len(groups)))
    for c, members in enumerate(groups.values()):
        member[members, c] = 1.0
    size = member.sum(0)
    total = member.T @ strength @ member
    pairs = np.outer(size, size)
    inside = np.arange(len(groups))
    total[inside, inside] -= size  # without the correlation of a feature with itself
    pairs[inside, inside] = np.maximum(size * (size - 1), 1)
    result: NDArray[np.float64] = total / pairs
    return result


def nearest_categories(x: Blocks, groups: Groups) -> Groups:
    """Assigns each feature in no category to the category with the largest mean |Pearson correlation|.

    Returns:
        {category: [feature, ...]} of the assigned features, ascending, in the order of `groups`, without empty lists.
    """
    assigned = np.zeros(x.shape[1], dtype=bool)
    assigned[[i for members in groups.values() for i in members]] = True
    if assigned.all():
        return {}
    strength = np.abs(correlation(x))[~assigned]  # [features in no category, F]
    nearest = np.stack([strength[:, members].mean(1) for members in groups.values()]).argmax(0)
    features = np.flatnonzero(~assigned)
    return {name: features[nearest == c].tolist() for c, name in enumerate(groups) if (nearest == c).any()}


def max_off_diagonal(matrix: NDArray[np.float64]) -> float:
    """Largest entry off the diagonal; 0 for a single category."""
    off = matrix[~np.eye(matrix.shape[0], dtype=bool)]
    return float(off.max()) if off.size else 0.0
