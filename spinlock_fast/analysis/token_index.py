"""Reads the HDF5 file of tokens that `tokenize` writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from spinlock_fast.data.backing_files import sources_of
from spinlock_fast.data.hdf5_links import ExternalFilePolicy, LinkTrace, find_dataset
from spinlock_fast.data.input_files import open_file, reporting_damage
from spinlock_fast.errors import DataError
from spinlock_fast.messages import shown
from spinlock_fast.models.code_search import TokenSearch
from spinlock_fast.tokenizer import Tokenizer

TOKENS = "tokens"
HASH = "checkpoint_sha256"
_ROWS_AT_ONCE = 65_536

Ints = NDArray[np.int64]


class TokenIndex:
    """The tokens [N, G] of a file; a context manager.

    Raises:
        DataError: the file cannot be read, has no tokens, or they are those of another checkpoint.
    """

    def __init__(self, path: str | Path, tokenizer: Tokenizer) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() in (".csv", ".npy", ".parquet"):
            raise DataError(f"{path}: tokens are searched in HDF5 files only: `tokenize` with --output FILE.h5")
        self._num_codes = np.array(tokenizer.model.quantizer.num_codes)
        with ExitStack() as stack:
            handle = stack.enter_context(open_file(self.path))
            with reporting_damage(self.path, TOKENS):
                self._dataset = self._open(handle, tokenizer)
            self._stack = stack.pop_all()

    def _open(self, handle: h5py.File, tokenizer: Tokenizer) -> h5py.Dataset:
        policy, trace = ExternalFilePolicy(tokenizer.allow_external), LinkTrace()
        dataset = find_dataset(self.path, handle, TOKENS, policy, trace)
        if dataset is None or HASH not in dataset.attrs:
            raise DataError(
                f"{self.path}: no tokens there; make them with "
                "`python -m spinlock_fast.tokenize CKPT DATA --output FILE.h5`"
            )
        sources_of(trace.files[-1] if trace.files else self.path, dataset, policy)
        made_by = str(dataset.attrs[HASH])
        if made_by != tokenizer.checkpoint_hash:
            raise DataError(
                f"{self.path}: tokens of another checkpoint ({made_by[:12]}..., this one is "
                f"{tokenizer.checkpoint_hash[:12]}...): tokenize the data again"
            )
        G = len(self._num_codes)
        if dataset.ndim != 2 or dataset.shape[1] != G or dataset.dtype.kind not in "iu" or not dataset.shape[0]:
            raise DataError(
                f"{self.path}: {TOKENS}: expected whole numbers [N, {G}], got {dataset.dtype} {list(dataset.shape)}"
            )
        self.search = self._search_of(dataset)
        return dataset

    def _search_of(self, dataset: h5py.Dataset) -> TokenSearch:
        """How the tokens were searched; nearest codes in files of earlier versions, which do not record it."""
        given = {name: dataset.attrs[name] for name in TokenSearch._fields if name in dataset.attrs}
        try:
            kinds = {"search": str, "sweeps": int, "search_weight": float, "perturbations": int}
            return TokenSearch(**{name: kinds[name](value) for name, value in given.items()}).check()
        except (TypeError, ValueError):
            raise DataError(f"{self.path}: {TOKENS}: wrong attributes of the search, {shown(given)}") from None

    def __enter__(self) -> TokenIndex:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def rows(self) -> int:
        return int(self._dataset.shape[0])

    def read(self, start: int, stop: int) -> Ints:
        """Tokens [stop - start, G] of consecutive rows; raises DataError if one is not a code."""
        with reporting_damage(self.path, TOKENS):
            tokens: Ints = self._dataset[start:stop].astype(np.int64)
        wrong = (tokens < 0) | (tokens >= self._num_codes)
        if wrong.any():
            row, g = np.argwhere(wrong)[0]
            raise DataError(
                f"{self.path}: {TOKENS}: row {start + row}, column {g}: {tokens[row, g]} is not a code of its codebook"
            )
        return tokens

    def blocks(self) -> Iterator[tuple[int, Ints]]:
        """(first row, tokens) of consecutive blocks of all rows."""
        for start in range(0, self.rows, _ROWS_AT_ONCE):
            yield start, self.read(start, min(start + _ROWS_AT_ONCE, self.rows))


def has_tokens(path: str | Path) -> bool:
    """Whether a file is one of `tokenize`; raises DataError if it cannot be read."""
    with open_file(Path(path)) as handle, reporting_damage(Path(path), TOKENS):
        node = handle.get(TOKENS, getlink=True)
        return isinstance(node, h5py.HardLink) and HASH in handle[TOKENS].attrs
