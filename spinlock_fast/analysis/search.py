"""The rows that are nearest to a row, or to given codes: by the distance of tokens, or of latents."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from spinlock_fast.analysis.neighbours import scaled_codes
from spinlock_fast.analysis.observations import read_codebooks
from spinlock_fast.analysis.token_index import TokenIndex, has_tokens
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.messages import shown
from spinlock_fast.tokenizer import DEFAULT_BUDGET, Tokenizer

By = Literal["tokens", "latents"]

_ROWS_AT_ONCE = 4096
_SCALE_ROWS = 1024  # rows whose latents give the spread of a codebook
_ANY = -1  # a codebook that does not count

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def nearest(
    tokenizer: Tokenizer,
    index: str | Path,
    like: int | tuple[str | Path, int] | None = None,
    tokens: Sequence[str] | str | None = None,
    *,
    by: By = "tokens",
    top: int = 10,
    memory_budget: int = DEFAULT_BUDGET,
) -> list[dict[str, Any]]:
    """The nearest rows of a file, by exact search block by block.

    The squared distance of two rows is the mean over codebooks of |a - b|^2 / s. By tokens, a and b are code vectors,
    and by latents what the encoder gives before quantization; s is the mean of |a - b|^2 over pairs of rows of the
    index, so that every codebook has the same weight, and two random rows have a mean squared distance of 1.

    Args:
        tokenizer: of a checkpoint directory.
        index: by tokens, the HDF5 file that `tokenize` wrote with this checkpoint; by latents, a file of features.
        like: a row of the index, which is left out of the result, or (file, row) of a file of tokens or of features.
            Features are searched for tokens as those of the index were.
        tokens: codes instead of a row, such as "cluster_3=12/4/7", see `parse_codes`; other codebooks do not count.
        by: "tokens" or "latents".
        top: number of rows, at least 1.
        memory_budget: maximum bytes of raw features in memory.

    Returns:
        Nearest first: {"row", "distance"}, and by tokens "tokens" and "equal_tokens", of the codebooks that count.

    Raises:
        ConfigError: there is no such row or code, not exactly one of `like` and `tokens`, or another `by` or `top`.
        DataError: a file cannot be read, or was made by another checkpoint or with another search of tokens.
    """
    if (like is None) == (tokens is None):
        raise ConfigError("give either a row (like) or codes (tokens)")
    if by not in get_args(By):
        raise ConfigError(f"by: expected tokens or latents, got {shown(by)}")
    if top < 1:
        raise ConfigError(f"top: expected a number of at least 1, got {top}")
    like = like if like is None or isinstance(like, tuple) else operator.index(like)
    tokens = [tokens] if isinstance(tokens, str) else tokens
    if by == "latents":
        if like is None:
            raise ConfigError("codes have no latents: search by tokens")
        return _nearest_latents(tokenizer, index, like, top, memory_budget)
    with TokenIndex(index, tokenizer) as opened:
        query = parse_codes(tokenizer, tokens) if tokens is not None else _query_tokens(tokenizer, opened, like)
        return _nearest_tokens(tokenizer, opened, query, like if isinstance(like, int) else None, top)


def parse_codes(tokenizer: Tokenizer, texts: Iterable[str]) -> Ints:
    """Codes [G], -1 where none is given, of "CATEGORY=CODE/CODE/...", level by level, or "CATEGORY/L1=CODE".

    `*` leaves a level out. "c3" is short for "cluster_3".

    Raises:
        ConfigError: no such category, level or code, or two codes of one codebook.
    """
    model = tokenizer.model
    names, codes = model.codebook_names, np.full(model.num_codebooks, _ANY, np.int64)
    for text in texts:
        name, _, values = text.rpartition("=")
        name = re.sub(r"^c(\d+)(?=$|/)", r"cluster_\1", name) if name.split("/")[0] not in model.levels else name
        if name in names:
            places = [names.index(name)]
        elif name in model.levels:
            part = model.category_slice(name)
            places = list(range(part.start, part.stop))
        else:
            close = difflib.get_close_matches(name, [*model.categories, *names], 1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(model.categories)}"
            raise ConfigError(f"{shown(text)}: no category or codebook {shown(name)}; {hint}")
        given = values.split("/")
        if len(given) > len(places):
            raise ConfigError(f"{shown(text)}: {len(given)} codes, but {name} has {len(places)} levels")
        for g, value in zip(places, given, strict=False):
            count = model.quantizer.num_codes[g]
            if value == "*":
                continue
            if not re.fullmatch(r"\d{1,9}", value, re.ASCII) or int(value) >= count:
                raise ConfigError(f"{shown(text)}: {names[g]} has the codes 0 to {count - 1}, got {shown(value)}")
            if codes[g] not in (_ANY, int(value)):
                raise ConfigError(f"{shown(text)}: {names[g]} already has the code {codes[g]}; a query has one of each")
            codes[g] = int(value)
    if (codes == _ANY).all():
        raise ConfigError("no code is given")
    return codes


def _query_tokens(tokenizer: Tokenizer, index: TokenIndex, like: int | tuple[str | Path, int] | None) -> Ints:
    assert like is not None
    if isinstance(like, int):
        return _tokens_of(index, like)
    path, row = like
    if has_tokens(path):
        with TokenIndex(path, tokenizer) as other:
            if other.search != index.search:
                raise DataError(
                    f"{path}: made by `tokenize` with {other.search.options}, but {index.path} with "
                    f"{index.search.options}: tokenize one of them again"
                )
            return _tokens_of(other, row)
    x = torch.from_numpy(_features(tokenizer, path, np.array([row]))).to(tokenizer.device)
    tokens: Ints = tokenizer.model.get_tokens(x, *index.search)[0].cpu().numpy()
    if (tokens < 0).any():
        raise DataError(f"{path}: row {row} overflows in the encoder")
    return tokens


def _tokens_of(index: TokenIndex, row: int) -> Ints:
    _check_row(index.path, row, index.rows)
    tokens: Ints = index.read(row, row + 1)[0]
    return tokens


def _nearest_tokens(
    tokenizer: Tokenizer, index: TokenIndex, query: Ints, own: int | None, top: int
) -> list[dict[str, Any]]:
    codebooks = read_codebooks(tokenizer)
    used = np.flatnonzero(query != _ANY)
    counts = [np.zeros(codebooks.num_codes[g]) for g in used]
    for _, tokens in index.blocks():
        for total, g in zip(counts, used, strict=True):
            total += np.bincount(tokens[:, g], minlength=len(total))
    vectors = scaled_codes([codebooks.vectors[g] for g in used], counts)
    tables = [
        np.square(codes - codes[query[g]], dtype=np.float64).sum(1) for codes, g in zip(vectors, used, strict=True)
    ]
    best = _Best(top, own)
    for start, tokens in index.blocks():
        best.add(start, sum(table[tokens[:, g]] for table, g in zip(tables, used, strict=True)))
    found = []
    for entry in best.result():
        tokens = _tokens_of(index, entry["row"])
        equal = int((tokens[used] == query[used]).sum())
        found.append({**entry, "equal_tokens": equal, "tokens": tokens.tolist()})
    return found


@torch.no_grad()
def _nearest_latents(
    tokenizer: Tokenizer, index: str | Path, like: int | tuple[str | Path, int], top: int, memory_budget: int
) -> list[dict[str, Any]]:
    if has_tokens(index):
        raise ConfigError(f"{index}: holds tokens; a search by latents reads the file of features")
    model, layout = tokenizer.model, tokenizer.model.quantizer.layout
    path, row = (index, like) if isinstance(like, int) else like
    if has_tokens(path):
        raise ConfigError(f"{path}: holds tokens, which have no latents; name the file of features")

    def latents(x: NDArray[np.float32]) -> Floats:
        parts = torch.from_numpy(x).split(_ROWS_AT_ONCE)
        found: Floats = torch.cat([model.encode(part.to(tokenizer.device)).cpu() for part in parts]).double().numpy()
        return found

    query = latents(_features(tokenizer, path, np.array([row])))[0]
    if not np.isfinite(query).all():
        raise DataError(f"{path}: row {row} overflows in the encoder")
    spread = latents(_features(tokenizer, index, None)).var(0)
    weights = np.zeros(len(query))
    for g in range(layout.groups):
        part = layout.column_slice(g)
        total = 2.0 * spread[part].sum()
        weights[part] = 1.0 / (total * layout.groups) if total > 0 else 0.0
    best = _Best(top, like if isinstance(like, int) else None)
    for start, x in tokenizer.features_file(index, memory_budget):
        best.add(start, (np.square(latents(x) - query) * weights).sum(1))
    return best.result()


def _features(tokenizer: Tokenizer, path: str | Path, rows: Ints | None) -> NDArray[np.float32]:
    """Features [n, F] of some rows of a file of features; by default of up to 1,024 rows, evenly spaced."""
    with tokenizer.source(path) as source:
        if rows is None:
            rows = np.unique(np.linspace(0, source.rows - 1, _SCALE_ROWS).astype(np.int64))
        else:
            _check_row(path, int(rows[0]), source.rows)
        raw = {family.name: source.read_rows(family.name, rows) for family in tokenizer.families}
    return tokenizer.features(raw)


def _check_row(path: str | Path, row: int, rows: int) -> None:
    if not 0 <= row < rows:
        raise ConfigError(f"{path}: no row {row}; rows are 0 to {rows - 1}")


class _Best:
    """The rows of the smallest squared distances; of equal ones, those that come first."""

    def __init__(self, top: int, left_out: int | None) -> None:
        self._top, self._left_out = top, left_out
        self._rows, self._squared = np.empty(0, np.int64), np.empty(0)

    def add(self, start: int, squared: Floats) -> None:
        """Adds consecutive rows from `start` on."""
        rows = np.flatnonzero(np.isfinite(squared))
        squared, rows = squared[rows], rows + start
        if len(rows) > self._top + 1:
            limit = np.partition(squared, self._top)[self._top]
            rows, squared = rows[squared <= limit], squared[squared <= limit]
        rows, squared = np.concatenate([self._rows, rows]), np.concatenate([self._squared, squared])
        kept = np.argsort(squared, kind="stable")
        kept = kept[rows[kept] != self._left_out][: self._top]
        self._rows, self._squared = rows[kept], squared[kept]

    def result(self) -> list[dict[str, Any]]:
        return [
            {"row": int(row), "distance": float(np.sqrt(squared))}
            for row, squared in zip(self._rows, self._squared, strict=True)
        ]
