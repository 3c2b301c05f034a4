"""The interface of a scikit-learn transformer for `Tokenizer`; scikit-learn need not be installed."""

from __future__ import annotations

import difflib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import spinlock_fast
from spinlock_fast.config.loading import setting_key
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.estimators.rows import as_rows, column_names, is_one_array
from spinlock_fast.messages import shown

if TYPE_CHECKING:
    from typing import Self

PARAMETERS = ("config", "settings", "verbose", "observer")
MATRIX = "x"  # the family of a single array


class Estimator(ABC):
    """Settings, `fit`, `transform` and `inverse_transform`.

    Args:
        config: YAML file, `RunConfig`, or sections as a mapping; None: the defaults, families by their shape.
        settings: values by name: "num_epochs", "training.num_epochs" and "training__num_epochs" are the same.
        verbose: show progress and messages on stderr.
        observer: receives the record of every epoch, see `Observer`.
        more: further settings, such as num_epochs=50.
    """

    n_features_in_: int
    feature_names_in_: NDArray[Any]

    def __init__(
        self,
        config: str | Path | RunConfig | Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        *,
        verbose: bool = False,
        observer: Any = None,
        **more: Any,
    ) -> None:
        self.config = config
        wrong = settings is not None and not isinstance(settings, Mapping)  # an error of `fit`
        self.settings = settings if wrong or not more else {**(settings or {}), **more}
        self.verbose = verbose
        self.observer = observer

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of the constructor; with `deep` also every setting by its name."""
        params = {name: getattr(self, name) for name in PARAMETERS}
        return {**self.settings, **params} if deep and isinstance(self.settings, Mapping) else params

    def set_params(self, **params: Any) -> Self:
        """Replaces arguments of the constructor, or single settings; raises ConfigError for an unknown name."""
        settings = {name: value for name, value in params.items() if name not in PARAMETERS}
        _check_settings(settings)
        for name in PARAMETERS:
            if name in params:
                setattr(self, name, params[name])
        if settings:
            changed = {setting_key(name) for name in settings}
            given = self.settings if isinstance(self.settings, Mapping) else {}
            self.settings = {name: given[name] for name in given if setting_key(name) not in changed} | settings
        return self

    def fit(self, data: Any, y: Any = None, *, config: Any = None, **settings: Any) -> Self:
        """Trains the tokenizer.

        Args:
            data: {family: array [N, D] or [N, T, D]}; one such array, data frame or list of rows; or an HDF5 file, a
                glob or a list of files. Missing values (NaN) are replaced with the median of the training rows.
            y: ignored, for pipelines.
            config: used instead of the constructor's.
            settings: in addition to the constructor's.

        Returns:
            The tokenizer itself.

        Raises:
            ConfigError: a setting is wrong.
            DataError: the data cannot be used, for instance too few rows.
            TrainingError: a loss is not finite.
        """
        if isinstance(y, (str, Path, RunConfig, Mapping)):
            raise ConfigError("the second argument of fit is y, which is ignored; write config=...")
        matrix = as_rows(data) if is_one_array(data) else None
        if matrix is not None and len(matrix) < 2:
            raise DataError(f"X has {len(matrix)} sample: training and validation need at least 2")
        given = self.settings or {}
        if not isinstance(given, Mapping):
            raise ConfigError(f"settings: expected a mapping from name to value, got {type(given).__name__}")
        _check_settings({**given, **settings})
        combined = {setting_key(name): value for name, value in [*given.items(), *settings.items()]}
        spinlock_fast.fit_tokenizer(
            self,  # type: ignore[arg-type]  # a Tokenizer
            data if matrix is None else {MATRIX: data},
            self.config if config is None else config,
            combined,
            matrix=matrix is not None,
        )
        for name in ("n_features_in_", "feature_names_in_"):
            vars(self).pop(name, None)
        if matrix is not None and matrix.ndim == 2:
            self.n_features_in_ = matrix.shape[1]
            if (names := column_names(data)) is not None:
                self.feature_names_in_ = names
        return self

    def fit_transform(self, data: Any, y: Any = None, **settings: Any) -> Any:
        """`fit`, then the tokens [N, G] of the same data."""
        return self.fit(data, y, **settings).transform(data)

    def transform(self, data: Any) -> Any:
        """Tokens [N, G] int64; takes what `fit` takes."""
        self._check_fitted()
        tokens = self.encode(self._checked_rows(data) if is_one_array(data) else data)
        kind = getattr(self, "_sklearn_output_config", {}).get("transform", "default")
        if kind == "default":
            return tokens
        frames, columns = importlib.import_module(kind), self.get_feature_names_out().tolist()
        if kind == "polars":
            return frames.DataFrame(np.asarray(tokens), schema=columns)
        return frames.DataFrame(np.asarray(tokens), columns=columns, index=getattr(data, "index", None))

    def set_output(self, *, transform: str | None = None) -> Self:
        """The type of what `transform` returns: "default", "pandas" or "polars"; None keeps it. Raises ConfigError."""
        if transform not in (None, "default", "pandas", "polars"):
            raise ConfigError(f"transform: expected default, pandas or polars, got {shown(transform)}")
        if transform is not None:
            self._sklearn_output_config = {"transform": transform}  # `sklearn.base.clone` copies this name
        return self

    def inverse_transform(self, tokens: Any) -> Any:
        """Tokens [N, G] -> rows [N, F]: see `decode`; after `fit` of one matrix, all of its columns.

        Columns that cleaning dropped get their median of the training rows, which is exact for a constant column.
        """
        self._check_fitted()
        return self._with_dropped_columns(self.decode(tokens))

    def score(self, data: Any, y: Any = None) -> float:
        """1 - mean squared error of the reconstruction, in units of the variance of the training rows."""
        x = self.features(self._checked_rows(data) if is_one_array(data) else data)
        decoded = self.normalize(self.decode(np.asarray(self.transform(data))))
        return 1.0 - float(np.square(np.asarray(decoded) - x).mean())

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[Any]:
        """Names of the columns of `transform`: those of the codebooks."""
        self._check_fitted()
        return np.array(self._codebook_names(), dtype=object)

    def __sklearn_is_fitted__(self) -> bool:
        return "model" in self.__dict__

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, Tags, TargetTags, TransformerTags

        return Tags(
            estimator_type="transformer",
            target_tags=TargetTags(required=False),
            transformer_tags=TransformerTags(preserves_dtype=[]),
            input_tags=InputTags(allow_nan=True),
        )

    def __repr__(self) -> str:
        default = {"config": None, "settings": None, "verbose": False, "observer": None}
        given = {name: value for name, value in self.get_params(deep=False).items() if value != default[name]}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def _check_fitted(self) -> None:
        if not self.__sklearn_is_fitted__():
            raise not_fitted(type(self).__name__)

    def _checked_rows(self, data: Any) -> Any:
        """One array, with the number and the names of the columns that `fit` was given; raises DataError."""
        rows = as_rows(data)
        expected: int | None = getattr(self, "n_features_in_", None)
        if expected is None:
            self._check_columns(column_names(data))
            return rows
        if rows.ndim != 2 or rows.shape[1] != expected:
            raise DataError(
                f"X has {rows.shape[-1]} features, but {type(self).__name__} is expecting {expected} features as input"
            )
        names, fitted = column_names(data), getattr(self, "feature_names_in_", None)
        if names is not None and fitted is not None and not np.array_equal(names, fitted):
            wrong = next(f"{a!r} instead of {b!r}" for a, b in zip(names, fitted, strict=True) if a != b)
            raise DataError(f"the columns differ from those of fit, in name or order: {wrong}")
        return rows

    @abstractmethod
    def encode(self, raw: Any) -> Any: ...

    @abstractmethod
    def decode(self, tokens: Any) -> Any: ...

    @abstractmethod
    def features(self, raw: Any) -> NDArray[np.float32]: ...

    @abstractmethod
    def normalize(self, decoded: Any) -> NDArray[np.float32]: ...

    @abstractmethod
    def _with_dropped_columns(self, decoded: Any) -> Any: ...

    @abstractmethod
    def _check_columns(self, names: Sequence[str] | None) -> None: ...

    @abstractmethod
    def _codebook_names(self) -> list[str]: ...


def not_fitted(name: str) -> Exception:
    """The error of an estimator before `fit`; scikit-learn's where that is installed."""
    text = f"this {name} is not fitted yet: call fit, or use {name}.from_checkpoint"
    try:
        from sklearn.exceptions import NotFittedError
    except ImportError:
        return DataError(text)
    return NotFittedError(text)  # type: ignore[no-any-return]


def _fields(section: str) -> list[str]:
    kind = RunConfig.model_fields[section].annotation
    return list(getattr(kind, "model_fields", {}))


def _check_settings(names: Iterable[str]) -> None:
    """Raises ConfigError for a name that is no setting; names below `families` are checked by `RunConfig`."""
    for name in names:
        section, _, key = setting_key(str(name)).partition(".")
        if section in RunConfig.model_fields and (not key or section == "families" or key in _fields(section)):
            continue
        known = [
            *PARAMETERS,
            *RunConfig.model_fields,
            *(key for part in RunConfig.model_fields for key in _fields(part)),
        ]
        close = difflib.get_close_matches(key or str(name), known, 1)
        raise ConfigError(f"{name}: unknown setting" + (f"; did you mean {close[0]!r}?" if close else ""))
