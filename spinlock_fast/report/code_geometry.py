"""Positions of codes and similarities of codebooks, in latent and in feature space."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from spinlock_fast.report.checkpoint_summary import CheckpointSummary
from spinlock_fast.report.data_statistics import DataStatistics

_SEED = 0
_PERPLEXITY = 30.0


def code_vectors(summary: CheckpointSummary) -> NDArray[np.float64]:
    """[codes, max D] code vectors normalised to length 1, zero-padded."""
    quantizer = summary.model.quantizer
    widest = max(codebook.dim for codebook in summary.codebooks)
    padded = []
    for g in range(len(summary.codebooks)):
        codes = quantizer.codebook(g).detach().cpu().double().numpy()
        length = np.linalg.norm(codes, axis=1, keepdims=True)
        codes = np.divide(codes, length, out=np.zeros_like(codes), where=length > 0)
        padded.append(np.pad(codes, ((0, 0), (0, widest - codes.shape[1]))))
    return np.concatenate(padded)


def tsne(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n, 2] t-SNE embedding (van der Maaten and Hinton 2008), deterministic."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(_PERPLEXITY, (len(points) - 1) / 3)
    with threadpool_limits(1):  # the summation order of several threads varies
        embedded: NDArray[np.float64] = TSNE(
            perplexity=perplexity, init="pca", learning_rate="auto", random_state=_SEED
        ).fit_transform(points)
    return embedded


class Projection(NamedTuple):
    """Points on their first two principal components."""

    points: NDArray[np.float64]  # [n, 2]
    shares: NDArray[np.float64]  # [2] of the variance
    loadings: NDArray[np.float64]  # [2, F]


def principal_components(points: NDArray[np.float64]) -> Projection:
    """The points [n, F] on their first two principal components."""
    centred = points - points.mean(0)
    left, size, axes = np.linalg.svd(centred, full_matrices=False)
    sign = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])  # the sign of a component is arbitrary
    total = float(np.square(size).sum())
    loadings = axes[:2] * sign[:2, None]
    return Projection((left * size * sign)[:, :2], np.square(size[:2]) / (total if total > 0 else 1.0), loadings)


def clip_outliers(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], int]:
    """Points clipped to a frame around the middle 96 % per axis, and the number of points that moved."""
    low, high = np.quantile(points, (0.02, 0.98), axis=0)
    margin = 0.3 * (high - low)
    inside: NDArray[np.float64] = np.clip(points, low - margin, high + margin)
    return inside, int((inside != points).any(1).sum())


def latent_similarity(summary: CheckpointSummary) -> NDArray[np.float64]:
    """[G, G] cosine similarity of the mean code vectors of codebooks, zero-padded."""
    quantizer = summary.model.quantizer
    widest = max(codebook.dim for codebook in summary.codebooks)
    means = np.zeros((len(summary.codebooks), widest))
    for g, codebook in enumerate(summary.codebooks):
        means[g, : codebook.dim] = quantizer.codebook(g).detach().cpu().double().mean(0).numpy()
    length = np.linalg.norm(means, axis=1, keepdims=True)
    unit = np.divide(means, length, out=np.zeros_like(means), where=length > 0)
    cosine: NDArray[np.float64] = np.clip(unit @ unit.T, -1.0, 1.0)
    return cosine


def feature_similarity(summary: CheckpointSummary, statistics: DataStatistics) -> NDArray[np.float64]:
    """[G, G] in [0, 1]: RV coefficient of the covariances of the conditional feature means given a token.

    Escoufier (1973): tr(S_g S_h) / (|S_g| |S_h|), computed without F x F matrices as
    tr(S_g S_h) = sum_kl p_k p_l (m_k . m_l)^2. NaN where a codebook has one code in use.
    """
    codebook_of = np.repeat(np.arange(len(summary.codebooks)), [codebook.codes for codebook in summary.codebooks])
    share = statistics.counts / statistics.rows
    means = np.where(statistics.used[:, None], statistics.centroids, 0.0)
    mean = share[codebook_of == 0] @ means[codebook_of == 0]
    deviation = np.sqrt(share)[:, None] * (means - mean)
    member = np.eye(len(summary.codebooks))[codebook_of]
    products: NDArray[np.float64] = member.T @ np.square(deviation @ deviation.T) @ member
    several = member.T @ statistics.used > 1  # a single code has no variance
    size = np.where(several, np.sqrt(np.diag(products)), 0.0)
    scale = np.outer(size, size)
    np.divide(products, scale, out=products, where=scale > 0)
    return np.where(scale > 0, np.clip(products, 0.0, 1.0), np.nan)
