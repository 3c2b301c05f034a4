"""Standardised mean of each feature over the operators of each code, with confidence intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.stats import t as student_t

from spinlock_fast.analysis.codes import code_auc, fill_missing
from spinlock_fast.analysis.observations import Observations
from spinlock_fast.analysis.significance import Array, false_discovery_rate

_COLUMNS_AT_ONCE = 32


@dataclass(frozen=True)
class CodeEffects:
    """Features of the codes in use.

    Args:
        codes: [U] indices of the codes in use among all codes.
        names: [F] features.
        kinds: [F] "model" or "measured", as in `features_table`.
        effect: [U, F] mean of the feature over the operators of the code, in standard deviations over all operators
            from the mean over all operators; NaN for a constant feature.
        half_width: [U, F] of the 95 % confidence interval of the effect; NaN for a code with one operator.
        auc: [U, F], see `code_auc`.
        q: [U, F] q value of the AUC over all codes and features, as in `features_table`.
    """

    codes: NDArray[np.int64]
    names: list[str]
    kinds: list[str]
    effect: Array
    half_width: Array
    auc: Array
    q: Array


def code_effects(observed: Observations, members: csr_matrix) -> CodeEffects:
    """Effects of all features of `features_table`; `members` is the result of `one_hot`."""
    used = np.flatnonzero(np.diff(members.indptr))
    measured, measured_names = fill_missing(observed.measured, observed.measured_names)
    x = np.concatenate([observed.features, measured], axis=1)
    auc, p = code_auc(members, x)
    effect, half_width = standardised_means(members[used], x)
    kinds = ["model"] * len(observed.feature_names) + ["measured"] * len(measured_names)
    names = [*observed.feature_names, *measured_names]
    return CodeEffects(used, names, kinds, effect, half_width, auc[used], false_discovery_rate(p[used]))


def standardised_means(members: csr_matrix, x: NDArray[np.floating], confidence: float = 0.95) -> tuple[Array, Array]:
    """[C, F] effect and half-width of its interval, for a membership matrix [C, N] without empty rows and x [N, F].

    With m and s the mean and the standard deviation of a feature over all operators, and m_c and s_c (n - 1 in the
    denominator) over the n operators of a code: effect = (m_c - m) / s, half-width = t_(n-1) s_c / (s sqrt(n)), where t
    is the quantile of Student's distribution. m and s count as known.
    """
    n = np.diff(members.indptr).astype(np.float64)[:, None]
    quantile = student_t.ppf(0.5 + confidence / 2, np.maximum(n - 1, 1))
    effect, half_width = np.empty((len(n), x.shape[1])), np.empty((len(n), x.shape[1]))
    for start in range(0, x.shape[1], _COLUMNS_AT_ONCE):
        block = slice(start, start + _COLUMNS_AT_ONCE)
        values = x[:, block].astype(np.float64)
        varies = values.max(0) > values.min(0)
        z = (values - values.mean(0)) / np.where(varies, values.std(0), np.nan)
        effect[:, block] = (members @ z) / n
        square = np.maximum(members @ np.square(z) - n * np.square(effect[:, block]), 0.0)
        half_width[:, block] = quantile * np.sqrt(square / np.maximum(n - 1, 1) / n)
    return effect, np.where(n > 1, half_width, np.nan)
