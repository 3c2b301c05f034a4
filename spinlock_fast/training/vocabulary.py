"""What a run from another checkpoint changed in its vocabulary: codes, and the tokens of rows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.data.row_view import RowView
from spinlock_fast.data.split import Split
from spinlock_fast.errors import SpinlockFastError
from spinlock_fast.features.mutual_information import adjusted_mutual_information, contingency
from spinlock_fast.messages import one_line
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE
from spinlock_fast.quantize import GroupedVectorQuantizer
from spinlock_fast.training.initial_model import InitialModel, sampled

log = logging.getLogger(__name__)

FORMAT = 1  # of vocabulary.json
_NEW_ROWS = 8192
_OLD_ROWS = 2048
_BLOCK = 128  # consecutive rows of the earlier data that are read at once
_ROWS_AT_ONCE = 4096

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Row = dict[str, Any]


@dataclass(frozen=True)
class CodeMoves:
    """How far the codes of one codebook have moved.

    Args:
        spacing: median distance of a code of the old codebook to its nearest other one; of a single code, or where
            codes coincide, the root mean square length of the codes.
        shift: [K] distance of each code to its old place, divided by the spacing.
        kept: [K] whether a code is nearest to its own old position; otherwise it was replaced.
    """

    spacing: float
    shift: Floats
    kept: NDArray[np.bool_]

    @classmethod
    def of(cls, old: Tensor, new: Tensor) -> CodeMoves:
        """From the codes [K, D] before and after."""
        old, new = old.detach().double().cpu(), new.detach().double().cpu()
        between = torch.cdist(old, old, compute_mode="donot_use_mm_for_euclid_dist")
        between.fill_diagonal_(torch.inf)
        spacing = float(between.min(1).values.median()) if len(old) > 1 else 0.0
        if spacing == 0.0:
            spacing = float(old.square().sum(1).mean().sqrt()) or 1.0
        distance = torch.cdist(new, old, compute_mode="donot_use_mm_for_euclid_dist")
        moved = distance.diagonal()
        return cls(spacing, (moved / spacing).numpy(), (moved <= distance.min(1).values).numpy())


@dataclass(frozen=True)
class TokenChange:
    """Tokens of the same rows by the old and the new model, and their reconstruction errors."""

    before: Ints  # [N, G]
    after: Ints
    error_rows: int
    error_before: float
    error_after: float

    def codebook(self, g: int, codes: int) -> Row:
        """The entry of one codebook."""
        coded = (self.before[:, g] >= 0) & (self.after[:, g] >= 0)
        table = contingency(self.before[coded, g], self.after[coded, g], (codes, codes))
        before, after = table.sum(1), table.sum(0)
        varies = min(np.count_nonzero(before), np.count_nonzero(after)) > 1
        return {
            "usage_before": before.tolist(),
            "usage_after": after.tolist(),
            "died": np.flatnonzero((before > 0) & (after == 0)).tolist(),
            "newly_used": np.flatnonzero((before == 0) & (after > 0)).tolist(),
            "equal_tokens": float((self.before[:, g] == self.after[:, g]).mean()),
            "adjusted_mutual_information": adjusted_mutual_information(table) if varies else None,
        }

    def total(self, codebooks: list[Row]) -> Row:
        """The entry of all codebooks, from that of each; a codebook with one token for all rows has no information."""
        information = [ami for row in codebooks if (ami := row["adjusted_mutual_information"]) is not None]
        return {
            "rows": len(self.before),
            "in_use_before": sum(int(np.count_nonzero(row["usage_before"])) for row in codebooks),
            "in_use_after": sum(int(np.count_nonzero(row["usage_after"])) for row in codebooks),
            "died": sum(len(row["died"]) for row in codebooks),
            "newly_used": sum(len(row["newly_used"]) for row in codebooks),
            "equal_tokens": float(np.mean([row["equal_tokens"] for row in codebooks])),
            "adjusted_mutual_information": float(np.mean(information)) if information else None,
            "error_rows": self.error_rows,
            "error_before": self.error_before,
            "error_after": self.error_after,
        }


def compare_vocabulary(
    initial: InitialModel,
    model: CategoricalHierarchicalVQVAE,
    rows: Callable[[Ints], RowView],
    split: Split,
    frozen: str,
) -> dict[str, Any]:
    """The contents of vocabulary.json.

    Args:
        initial: the checkpoint that the run started from. Up to 2,048 rows of its own data are compared as well, if
            they can still be read.
        model: the model of the best validation.
        rows: rows of the run's data by their numbers, normalised.
        split: of these; up to 8,192 training and validation rows are compared, and errors are those of validation rows.
        frozen: `training.freeze`.
    """
    used = np.sort(np.concatenate([split.train, split.val]))
    held_out = rows(split.val[sampled(len(split.val), _OLD_ROWS)])[:]
    old = initial.tokenizer.model
    changes = {"new_data": _token_change(old, model, rows(used[sampled(len(used), _NEW_ROWS)])[:], held_out)}
    earlier, missing = _earlier_rows(initial)
    if earlier is not None:
        changes["old_data"] = _token_change(old, model, earlier, earlier)
    names, sizes = model.codebook_names, model.quantizer.num_codes
    moves = _moves(old.quantizer, model.quantizer)
    codebooks: list[Row] = []
    for g, (name, codes) in enumerate(zip(names, sizes, strict=True)):
        row = {"name": name, "codes": codes, "spacing": moves[g].spacing, "shift": moves[g].shift.tolist()}
        row |= {"kept": int(moves[g].kept.sum()), "replaced": np.flatnonzero(~moves[g].kept).tolist()}
        codebooks.append(row | {data: change.codebook(g, codes) for data, change in changes.items()})
    totals = {data: change.total([row[data] for row in codebooks]) for data, change in changes.items()}
    if missing is not None:
        totals["old_data"] = {"missing": missing}
    return {
        "format": FORMAT,
        "init_from": {"name": initial.name, "sha256": initial.tokenizer.checkpoint_hash, "freeze": frozen},
        "codes": _moved_codes(moves, [row["old_data" if earlier is not None else "new_data"] for row in codebooks]),
        **totals,
        "codebooks": codebooks,
    }


def _moves(old: GroupedVectorQuantizer, new: GroupedVectorQuantizer) -> list[CodeMoves]:
    return [CodeMoves.of(old.codebook(g), new.codebook(g)) for g in range(new.layout.groups)]


def _moved_codes(moves: list[CodeMoves], usage: list[Row]) -> Row:
    """Moves of all codes, and of those that the old model uses."""
    shift, kept = (np.concatenate([getattr(move, name) for move in moves]) for name in ("shift", "kept"))
    in_use = np.concatenate([row["usage_before"] for row in usage]) > 0
    return {
        "total": len(shift),
        "kept": int(kept.sum()),
        "in_use": int(in_use.sum()),
        "in_use_kept": int(kept[in_use].sum()),
        "median_shift": float(np.median(shift[in_use])) if in_use.any() else 0.0,
        "largest_shift": float(shift[in_use].max()) if in_use.any() else 0.0,
    }


def _token_change(
    old: CategoricalHierarchicalVQVAE,
    new: CategoricalHierarchicalVQVAE,
    x: NDArray[np.float32],
    error_x: NDArray[np.float32],
) -> TokenChange:
    (before, error_before), (after, error_after) = (
        (_tokens(model, x), _mean_error(model, error_x)) for model in (old, new)
    )
    return TokenChange(before, after, len(error_x), error_before, error_after)


def _tokens(model: CategoricalHierarchicalVQVAE, x: NDArray[np.float32]) -> Ints:
    blocks = torch.from_numpy(x).split(_ROWS_AT_ONCE)
    tokens: Ints = torch.cat([model.get_tokens(block).cpu() for block in blocks]).numpy()
    return tokens


def _mean_error(model: CategoricalHierarchicalVQVAE, x: NDArray[np.float32]) -> float:
    """Mean squared error of the reconstruction from tokens; rows without a finite one are left out."""
    errors = []
    for block in torch.from_numpy(x).split(_ROWS_AT_ONCE):
        tokens = model.get_tokens(block)
        coded = (tokens >= 0).all(1).cpu()
        decoded = model.decode_from_tokens(tokens[coded.to(tokens.device)]).cpu()
        errors.append((decoded.double() - block[coded].double()).square().mean(1))
    finite = torch.cat(errors)
    return float(finite[torch.isfinite(finite)].mean())


def _earlier_rows(initial: InitialModel) -> tuple[NDArray[np.float32] | None, str | None]:
    """Normalised rows of the data that the checkpoint was trained on, or why there are none."""
    config = initial.config
    paths = None if config is None else config.dataset_path
    if config is None or paths is None:
        return None, "the checkpoint does not name its data"
    given = [paths] if isinstance(paths, str) else list(paths)
    if any("://" in path for path in given):
        return None, "the data of the checkpoint are remote"
    tokenizer = initial.tokenizer
    try:
        with tokenizer.source(paths) as source:
            blocks = -(-source.rows // _BLOCK)
            parts = []
            for block in sampled(blocks, _OLD_ROWS // _BLOCK).tolist():
                start = block * _BLOCK
                stop = min(start + _BLOCK, source.rows)
                parts.append({family.name: source.read(family.name, start, stop) for family in tokenizer.families})
            raw = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return tokenizer.features(raw), None
    except (SpinlockFastError, OSError) as error:
        return None, one_line(error, 200)


def log_summary(vocabulary: dict[str, Any]) -> dict[str, Any]:
    """Logs five lines on a vocabulary; returns its entries without those of the codebooks, for metrics.json."""
    start, codes, new, old = (vocabulary[key] for key in ("init_from", "codes", "new_data", "old_data"))
    frozen = "" if start["freeze"] == "none" else f", frozen: {start['freeze']}"
    log.info("vocabulary, compared with %s%s:", start["name"], frozen)
    log.info(
        "%d of %d codes in use: %d kept, %d replaced, median shift %.2f spacings",
        codes["in_use"],
        codes["total"],
        codes["in_use_kept"],
        codes["in_use"] - codes["in_use_kept"],
        codes["median_shift"],
    )
    log.info("new data: %s", _change_text(new))
    log.info("old data: %s", f"not compared: {old['missing']}" if "missing" in old else _change_text(old))
    log.info(
        "codes in use on the new data: %d -> %d (%d died, %d newly used)",
        new["in_use_before"],
        new["in_use_after"],
        new["died"],
        new["newly_used"],
    )
    return {key: value for key, value in vocabulary.items() if key not in ("format", "codebooks")}


def _change_text(data: Row) -> str:
    information = data["adjusted_mutual_information"]
    return (
        f"{data['equal_tokens']:.1%} equal tokens (AMI {'none' if information is None else f'{information:.2f}'}), "
        f"error {data['error_before']:.4f} -> {data['error_after']:.4f}"
    )
