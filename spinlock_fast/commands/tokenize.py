"""Implementation of the command `tokenize`."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from spinlock_fast.distributed import SINGLE, Ranks
from spinlock_fast.errors import OutputError
from spinlock_fast.models.code_search import NEAREST, TokenSearch, code_distances
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE
from spinlock_fast.output.locks import locked_output_file
from spinlock_fast.output.part_files import write_in_order
from spinlock_fast.output.token_files import TokenTable, check_format, token_file
from spinlock_fast.tokenizer import DEFAULT_BUDGET, Tokenizer

_ROWS_AT_ONCE = 4096


def write_tokens(
    tokenizer: Tokenizer,
    data: str | list[str],
    output: Path,
    memory_budget: int = DEFAULT_BUDGET,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = SINGLE,
    search: TokenSearch = NEAREST,
    scores: bool = False,
) -> int:
    """Writes the tokens of an HDF5 file to a file whose ending names the format; see `token_file`.

    Holds at most `memory_budget` bytes of raw values at once; an earlier file is replaced when all rows are written.

    Args:
        progress: called with (rows done, all rows).
        ranks: if there are several, each encodes a share of the rows, and rank 0 writes the file.
        search: see `Tokenizer.encode`.
        scores: also writes distances and margins, see `code_distances`.

    Returns:
        Number of rows.

    Raises:
        ConfigError: the format needs a package that is not installed, or cannot hold scores.
        DataError: the data cannot be read.
        OutputError: the file cannot be written, or is the input.
    """
    model = tokenizer.model
    search.check()
    check_format(output, scores)
    with tokenizer.source(data) as source:
        rows = source.rows
        if any(os.path.exists(output) and output.samefile(file) for file in source.all_files):
            raise OutputError(f"{output}: is the input file")
    if os.path.isdir(output):
        raise OutputError(f"{output}: is a directory; name a file")
    sizes, made_by = model.quantizer.num_codes, tokenizer.checkpoint_hash
    table = TokenTable(rows, model.codebook_names, sizes, made_by, scores, search.settings)
    blocks = (
        _with_scores(model, tokens, x) if scores else tokens
        for _, tokens, x in tokenizer.tokens_and_features(data, memory_budget, ranks, search)
    )
    with ExitStack() as stack:
        write = None
        if ranks.is_main:
            stack.enter_context(locked_output_file(output))
            write = stack.enter_context(token_file(output, table))
        write_in_order(blocks, (rows, len(table.columns)), table.block_dtype, output, write, ranks, progress)
    ranks.barrier()  # the file is complete
    return rows


@torch.no_grad()
def _with_scores(
    model: CategoricalHierarchicalVQVAE, tokens: NDArray[np.int64], x: NDArray[np.float32]
) -> NDArray[np.float64]:
    """[B, 3 G] tokens [B, G] of features [B, F], distances to their codes, and margins."""
    quantizer, device, parts = model.quantizer, model.feature_order.device, []
    for start in range(0, len(x), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        latents = model.encode(torch.from_numpy(x[rows]).to(device))
        chosen = torch.from_numpy(tokens[rows]).to(device)
        scores = code_distances(latents, quantizer.embedding, chosen, quantizer.layout)
        parts.append(torch.cat([chosen.double(), *(score.double() for score in scores)], 1).cpu().numpy())
    return np.concatenate(parts)
