"""The registry of all features in column order: name, unit, formula, source."""

from __future__ import annotations

from typing import NamedTuple


class Feature(NamedTuple):
    """One column. Units: u of the field, px grid spacing, step one update, 1 dimensionless."""

    name: str
    unit: str
    formula: str
    source: str


_FISHER = "Fisher 1929 (moments)"
_QUANTILE = "Hyndman and Fan 1996 (order statistics)"
_ROF = "Rudin, Osher and Fatemi 1992 (total variation)"
_PARSEVAL = "Parseval's theorem"
_CENTROID = "Peeters 2004 (spectral shape)"
_SHANNON = "Shannon 1948"
_OCTAVES = ("1-2", "2-4", "4-8", "8-16", "16 and above")
PAIRS = ((0, 1), (0, 2), (1, 2))
LAGS = (1, 2, 3)
SCALES = (1, 4, 8)

SPATIAL = (
    Feature("mean", "u", "<u> over the grid", _FISHER),
    Feature("variance", "u^2", "m2 = <(u - <u>)^2>", _FISHER),
    Feature("std", "u", "sqrt(m2)", _FISHER),
    Feature("skewness", "1", "m3 / m2^1.5", _FISHER),
    Feature("kurtosis", "1", "m4 / m2^2 - 3", _FISHER),
    Feature("min", "u", "least value", _QUANTILE),
    Feature("max", "u", "greatest value", _QUANTILE),
    Feature("percentile_5", "u", "5 % of the points of even rows and columns lie below", _QUANTILE),
    Feature("percentile_25", "u", "25 % of the points of even rows and columns lie below", _QUANTILE),
    Feature("median", "u", "50 % of the points of even rows and columns lie below", _QUANTILE),
    Feature("percentile_75", "u", "75 % of the points of even rows and columns lie below", _QUANTILE),
    Feature("percentile_95", "u", "95 % of the points of even rows and columns lie below", _QUANTILE),
    Feature("mean_abs", "u", "<|u|>", "L1 norm"),
    Feature("gradient_mean", "u/px", "<|g|>, g the forward differences on the torus", _ROF),
    Feature("gradient_std", "u/px", "sqrt(<|g|^2> - <|g|>^2)", _ROF),
    Feature("gradient_anisotropy", "1", "(<gx^2> - <gy^2>) / <|g|^2>", "Bigun and Granlund 1987 (structure tensor)"),
    Feature("laplacian_rms", "u/px^2", "sqrt(<(five-point Laplacian of u)^2>)", "Marr and Hildreth 1980"),
    Feature("neighbor_correlation", "1", "correlation of u with its right and lower neighbours", "Moran 1950"),
    Feature("interface_density", "1", "share of neighbouring pairs on two sides of <u>", "Kac 1943, Rice 1944"),
)

SPECTRAL = (
    *(
        Feature(f"band_{i}_power", "u^2", f"sum of |F|^2 over wavenumbers {k} cycles per side", _PARSEVAL)
        for i, k in enumerate(_OCTAVES)
    ),
    *(
        Feature(f"band_{i}_share", "1", f"band_{i}_power over the power of all wavenumbers but 0", _PARSEVAL)
        for i in range(len(_OCTAVES))
    ),
    *(
        Feature(
            f"band_{i}_anisotropy",
            "1",
            f"mean of cos(2 angle of k) in band {i}, weighted by |F|^2",
            "Bigun and Granlund 1987",
        )
        for i in range(len(_OCTAVES))
    ),
    Feature("dominant_frequency_x", "1/side", "|kx| of the strongest mode", "Cooley and Tukey 1965"),
    Feature("dominant_frequency_y", "1/side", "|ky| of the strongest mode", "Cooley and Tukey 1965"),
    Feature("dominant_frequency", "1/side", "|k| of the strongest mode", "Cooley and Tukey 1965"),
    Feature("peak_share", "1", "power of the strongest mode and its conjugate over all power", _PARSEVAL),
    Feature("centroid", "1/side", "mean of |k| weighted by |F|^2", _CENTROID),
    Feature("centroid_x", "1/side", "mean of |kx| weighted by |F|^2", _CENTROID),
    Feature("centroid_y", "1/side", "mean of |ky| weighted by |F|^2", _CENTROID),
    Feature("bandwidth", "1/side", "standard deviation of |k| weighted by |F|^2", _CENTROID),
    Feature("flatness", "1", "geometric over arithmetic mean of |F|^2", "Gray and Markel 1974"),
    Feature("entropy", "1", "-sum p ln p / ln(number of modes), p = |F|^2 / sum", _SHANNON),
    Feature("rolloff", "1/side", "wavenumber shell within which 85 % of the power lies", _CENTROID),
    Feature("slope", "1", "slope of ln(power density) over ln k across the octaves", "Kolmogorov 1941"),
)

CROSS_CHANNEL = (
    Feature("eigenvalue_1", "u^2", "greatest eigenvalue of the 3 x 3 covariance of channels", "Pearson 1901 (PCA)"),
    Feature("eigenvalue_2", "u^2", "second eigenvalue", "Pearson 1901 (PCA)"),
    Feature("eigenvalue_3", "u^2", "least eigenvalue", "Pearson 1901 (PCA)"),
    Feature("trace", "u^2", "sum of the eigenvalues", "Pearson 1901 (PCA)"),
    Feature("log_condition", "1", "ln(eigenvalue_1 / eigenvalue_3), at most 23", "Turing 1948"),
    Feature("participation_ratio", "1", "trace^2 / sum of squared eigenvalues", "Bell and Dean 1970"),
    *(Feature(f"correlation_{i}{j}", "1", f"correlation of channels {i} and {j}", "Pearson 1895") for i, j in PAIRS),
    Feature("correlation_abs_mean", "1", "mean of the three |correlations|", "Pearson 1895"),
    Feature("correlation_max", "1", "greatest of the three correlations", "Pearson 1895"),
    Feature("correlation_min", "1", "least of the three correlations", "Pearson 1895"),
    Feature("mutual_information_mean", "nat", "mean of -ln(1 - r^2) / 2 over pairs", "Gel'fand and Yaglom 1957"),
    Feature("mutual_information_max", "nat", "greatest of -ln(1 - r^2) / 2", "Gel'fand and Yaglom 1957"),
    Feature(
        "coherence_low", "1", "magnitude-squared coherence below 8 cycles, mean over pairs and octaves", "Carter 1987"
    ),
    Feature("coherence_high", "1", "the same from 8 cycles up", "Carter 1987"),
    Feature("gradient_alignment", "1", "mean over pairs of <g_i . g_j> / sqrt(<|g_i|^2> <|g_j|^2>)", _ROF),
)

# TEMPORAL: per step, averaged over channels (except cross_channel) and realizations.
TEMPORAL = {"spatial": SPATIAL, "spectral": SPECTRAL, "cross_channel": CROSS_CHANNEL}

_BOX = "Box and Jenkins 1970"
_TIME = (
    Feature("early_growth_rate", "1/step", "slope of ln E over the first quarter, E = <u^2>", _BOX),
    Feature("late_growth_rate", "1/step", "slope of ln E over the second half", _BOX),
    Feature("energy_trend", "1", "correlation of E with time", "Pearson 1895"),
    Feature("energy_final_ratio", "1", "ln of E in the last sixteenth over E in the first step", _BOX),
    Feature("energy_variability", "1", "standard deviation over mean of E in the second half", _BOX),
    Feature(
        "settling_time", "1", "share of T after which E stays within 10 % of its final mean", "Dorf and Bishop 2011"
    ),
    Feature("peak_time", "1", "time of the greatest E over T", "Dorf and Bishop 2011"),
    Feature("activity", "u/step", "mean over time of a_t = sqrt(<(u_t - u_(t-1))^2>)", "discrete derivative"),
    Feature("activity_relative", "1/step", "mean of a_t / sqrt(E_t)", "discrete derivative"),
    Feature("activity_trend", "1", "correlation of a_t with time", "Pearson 1895"),
    Feature("roughness", "1", "mean squared second over first difference in time, at 64 probes", "von Neumann 1941"),
    Feature("autocorrelation_1", "1", "autocorrelation at 1 step of probes, second half", _BOX),
    Feature("autocorrelation_8", "1", "autocorrelation at 8 steps", _BOX),
    Feature("autocorrelation_32", "1", "autocorrelation at 32 steps", _BOX),
    Feature("correlation_time", "step", "lag at which the autocorrelation first falls below 1/e, at most T/4", _BOX),
    Feature("dominant_frequency", "1/step", "strongest frequency of probes in the second half", "Schuster 1898"),
    Feature("dominant_share", "1", "its share of the power", "Schuster 1898"),
    Feature("frequency_centroid", "1/step", "mean frequency weighted by power", _CENTROID),
    Feature("frequency_entropy", "1", "-sum p ln p / ln(number of frequencies)", _SHANNON),
    Feature("temporal_share", "1", "variance over time at a probe over the whole variance, second half", "Fisher 1925"),
    Feature("zero_crossing_rate", "1/step", "crossings of the probe's mean, second half", "Rice 1944"),
    Feature("burstiness", "1", "kurtosis of the changes of E", _FISHER),
)
_CAUSALITY = (
    *(
        Feature(f"lag_asymmetry_{stat}_{lag}", "1", f"{stat} over pairs of |r_ij({lag}) - r_ji({lag})| of probes", _BOX)
        for lag in LAGS
        for stat in ("mean", "max")
    ),
    Feature(
        "granger_1", "nat", "mean over directed pairs of ln(residual variance without / with the other)", "Granger 1969"
    ),
    Feature("granger_2", "nat", "the same with two lags", "Geweke 1982"),
    Feature("granger_max", "nat", "greatest over directed pairs, one lag", "Granger 1969"),
    Feature("irreversibility", "1", "skewness of changes in time of probes", "Ramsey and Rothman 1996"),
    Feature(
        "flow_speed",
        "px/step",
        "mean over time of the speed of the best translation u_(t-1) -> u_t",
        "Lucas and Kanade 1981",
    ),
    Feature("flow_persistence", "1", "|mean velocity| / mean speed", "Berg 1983"),
)
_INVARIANTS = tuple(
    Feature(
        f"{norm}_{kind}_scale_{scale}", unit, formula.format(norm=norm, scale=scale), "Wilson 1971 (coarse graining)"
    )
    for scale in SCALES
    for norm in ("l1", "l2", "tv")
    for kind, unit, formula in (
        ("drift", "1/step", "mean |change of ln I| a step, I the {norm} norm of block means of {scale} px"),
        ("monotonicity", "1", "net change of ln I over the sum of |changes|"),
    )
)

_SENSITIVITY = (
    *(
        Feature(f"lipschitz_{eps}", "1", f"|Phi(u + e) - Phi(u)| / |e|, |e| = {eps} |u|", "Lipschitz quotient")
        for eps in ("1e-4", "1e-3", "1e-2")
    ),
    *(
        Feature(
            f"gain_{scale}", "1", f"|Phi({scale} u)| / |{scale} u|", "describing function (Krylov and Bogoliubov 1943)"
        )
        for scale in ("0.50", "0.75", "1.25", "1.50")
    ),
    Feature("linearity", "1", "R^2 of s Phi(u) as prediction of Phi(s u) over the four s", "Wright 1921"),
    Feature("saturation", "1", "gain_1.50 / gain_0.50", "describing function"),
    Feature("compression", "1", "standard deviation of Phi(u) over that of u", "describing function"),
)

# Cross-channel features whose mean over time enters SUMMARY.
CROSS_IN_SUMMARY = (
    "eigenvalue_1",
    "eigenvalue_2",
    "eigenvalue_3",
    "log_condition",
    "participation_ratio",
    "correlation_01",
    "correlation_02",
    "correlation_12",
    "correlation_abs_mean",
    "mutual_information_max",
    "coherence_low",
    "coherence_high",
)
PER_TRAJECTORY = {
    "spatial": SPATIAL,
    "spectral": SPECTRAL,
    "temporal": _TIME,
    "cross_channel": tuple(f for f in CROSS_CHANNEL if f.name in CROSS_IN_SUMMARY),
    "causality": _CAUSALITY,
    "invariant_drift": _INVARIANTS,
    "operator_sensitivity": _SENSITIVITY,
}
STATISTICS = ("mean", "std", "cv")


def names(groups: dict[str, tuple[Feature, ...]]) -> list[str]:
    """Column names: group_feature."""
    return [f"{group}_{feature.name}" for group, features in groups.items() for feature in features]


def temporal_names() -> list[str]:
    """The 63 columns of TEMPORAL."""
    return names(TEMPORAL)


def trajectory_names() -> list[str]:
    """The 120 columns of SUMMARY per trajectory."""
    return names(PER_TRAJECTORY)


def aggregated_names() -> list[str]:
    """The 360 columns of SUMMARY over realizations."""
    return [f"{name}_{statistic}" for statistic in STATISTICS for name in trajectory_names()]


def registry() -> dict[str, dict[str, dict[str, dict[str, object]]]]:
    """Family -> group -> feature -> {column, unit, formula, source}: the `feature_registry` attribute of a file."""
    families = {"temporal": TEMPORAL, "summary": PER_TRAJECTORY}
    return {family: _columns(groups) for family, groups in families.items()}


def _columns(groups: dict[str, tuple[Feature, ...]]) -> dict[str, dict[str, dict[str, object]]]:
    column, out = 0, {}
    for group, features in groups.items():
        out[group] = {
            feature.name: {"column": column + i, **dict(zip(Feature._fields[1:], feature[1:], strict=True))}
            for i, feature in enumerate(features)
        }
        column += len(features)
    return out
