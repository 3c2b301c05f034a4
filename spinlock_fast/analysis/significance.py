"""Confidence intervals, tail probabilities and false discovery rates of arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, ndtr, ndtri
from scipy.stats import false_discovery_control

Array = NDArray[np.float64]
Counts = NDArray[np.int64]

_NEGLIGIBLE = 1e-13  # relative size of a term at which a geometrically falling sum is truncated


def false_discovery_rate(p: Array) -> Array:
    """q values of Benjamini and Hochberg (1995) over all of p, of any shape; NaN marks a missing test and stays NaN.

    q_(i) = min over j >= i of m p_(j) / j: rejecting where q <= a bounds the expected share of false discoveries by a.
    """
    q = np.full(p.shape, np.nan)
    tested = np.isfinite(p)
    q[tested] = false_discovery_control(p[tested])
    return q


def wilson_interval(successes: Any, trials: Any, confidence: float = 0.95) -> tuple[Array, Array]:
    """Score interval of a proportion, Wilson (1927); (0, 1) without trials."""
    z = float(ndtri(0.5 + confidence / 2))
    x, n = np.asarray(successes, np.float64), np.asarray(trials, np.float64)
    share = np.divide(x, n, out=np.full(np.broadcast(x, n).shape, 0.5), where=n > 0)
    spread = z * np.sqrt(n * share * (1 - share) + z * z / 4)
    centre = n * share + z * z / 2
    low, high = (centre - spread) / (n + z * z), (centre + spread) / (n + z * z)
    # The bounds are 0 and 1 exactly, which the formula meets up to rounding only.
    return np.where(x == 0, 0.0, np.clip(low, 0, 1)), np.where(x == n, 1.0, np.clip(high, 0, 1))


def hypergeometric_p(n: Any, a: Any, b: Any, total: int) -> Array:
    """Two-sided p value of Fisher's exact test (1922): twice the smaller tail, at most 1.

    n of the a rows with one property are among the b rows with another, of `total` rows. All tails are summed together,
    outward from n, where terms decrease quickly; `scipy.stats.hypergeom` sums each tail separately.
    """
    n, a, b = (np.asarray(v, np.float64) for v in np.broadcast_arrays(n, a, b))
    shape = n.shape
    n, a, b = n.ravel(), a.ravel(), b.ravel()
    neither = total - a - b
    upper = n * total >= a * b
    log_probability = _log_choose(a, n) + _log_choose(total - a, b - n) - _log_choose(np.full(n.shape, float(total)), b)
    tail = np.ones(n.size)
    term = np.ones(n.size)
    at = n.copy()
    active = np.arange(n.size)
    while active.size:
        k, up = at[active], upper[active]
        rising = (a[active] - k) * (b[active] - k) / ((k + 1) * np.maximum(neither[active] + k + 1, 1))
        falling = k * (neither[active] + k) / ((a[active] - k + 1) * (b[active] - k + 1))
        term[active] *= np.where(up, rising, falling)
        at[active] += np.where(up, 1.0, -1.0)
        tail[active] += term[active]
        active = active[term[active] > _NEGLIGIBLE * tail[active]]
    return np.minimum(1.0, 2.0 * np.exp(log_probability) * tail).reshape(shape)


def normal_p(z: Array) -> Array:
    """Two-sided p value of a standard normal statistic z."""
    p: Array = 2.0 * ndtr(-np.abs(z))
    return p


def _log_choose(n: Array, k: Array) -> Array:
    result: Array = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    return result
