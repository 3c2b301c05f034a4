"""A schematic of the model as columns of boxes, with its actual sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from torch import nn

from spinlock_fast.features.encode import ANY_LENGTH
from spinlock_fast.plot_style import FAINT, INK, SMALL, TEXT
from spinlock_fast.report.checkpoint_summary import CheckpointSummary
from spinlock_fast.report.style import (
    WIDTH,
    range_text,
    remove_frame,
    shorten,
)

# Inches.
_SPAN = WIDTH - 0.2
_LINE, _INSIDE, _GAP = 0.135, 0.12, 0.07
_TITLES = 0.27
_MAX_BOXES = 4  # boxes of a column
_ROUND = 0.05

# Left edge and width of each column of boxes, in inches.
_COLUMNS = ((0.0, 1.6), (1.85, 1.7), (3.8, 1.5), (5.55, 1.75), (7.55, 1.6), (9.4, 2.05))
_FILLS = ("#eeeeee", "#eeeeee", "#eeeeee", "#dcebf5", "#fbe9c6", "#dcebf5")


Boxes = list[list[str]]  # lines of text of each box


def schematic_columns(summary: CheckpointSummary) -> list[Boxes]:
    """The boxes of each column."""
    return [
        _data(summary),
        _encoders(summary),
        [_cleaning(summary)],
        [_categories(summary)],
        _levels(summary),
        _decoders(summary),
    ]


def schematic_height(columns: Sequence[Boxes]) -> float:
    """Height of the boxes and their titles in inches."""
    return max(map(_column_height, columns)) + _TITLES


def _column_height(boxes: Boxes) -> float:
    return sum(_LINE * len(lines) + _INSIDE for lines in boxes) + _GAP * (len(boxes) - 1)


def draw_schematic(ax: Axes, columns: Sequence[Boxes]) -> None:
    """Draws data, encoders, cleaning, categories, codebooks and decoders from left to right."""
    height = schematic_height(columns)
    centre = (height - _TITLES) / 2
    remove_frame(ax)
    ax.set_xlim(-0.02, _SPAN)
    ax.set_ylim(-0.02, height)
    names = ("Data", "Encoders, frozen", "Cleaning", "Categories", "Codebooks", "Decoders")
    for (left, width), name in zip(_COLUMNS, names, strict=True):
        ax.text(left + width / 2, height, name, ha="center", va="top", fontsize=TEXT, fontweight="bold")
    for column, boxes in enumerate(columns):
        _draw_column(ax, column, boxes, centre + _column_height(boxes) / 2)
    for before, after in pairwise(_COLUMNS):
        ax.annotate(
            "",
            (after[0] - 0.02, centre),
            (sum(before) + 0.02, centre),
            arrowprops={"arrowstyle": "-|>", "color": FAINT, "linewidth": 1.0, "shrinkA": 0, "shrinkB": 0},
        )


def _draw_column(ax: Axes, column: int, boxes: Boxes, top: float) -> None:
    """Draws one column of boxes from `top` downwards."""
    left, width = _COLUMNS[column]
    style = f"round,pad=0,rounding_size={_ROUND}"
    for lines in boxes:
        height = _LINE * len(lines) + _INSIDE
        top -= height
        ax.add_patch(
            FancyBboxPatch((left, top), width, height, style, facecolor=_FILLS[column], edgecolor=FAINT, linewidth=0.6)
        )
        for i, line in enumerate(lines):
            y = top + height - _INSIDE / 2 - _LINE * (i + 0.5)
            ax.text(left + width / 2, y, line, ha="center", va="center", fontsize=SMALL, color=INK)
        top -= _GAP


def _truncate_boxes(boxes: Boxes, what: str) -> Boxes:
    return (
        boxes
        if len(boxes) <= _MAX_BOXES
        else [*boxes[: _MAX_BOXES - 1], [f"and {len(boxes) - _MAX_BOXES + 1} more {what}"]]
    )


def _data(summary: CheckpointSummary) -> Boxes:
    boxes = []
    for family in summary.tokenizer.families:
        shape = " x ".join("any" if n == ANY_LENGTH else f"{n:,}" for n in family.row_shape)
        boxes.append([shorten(family.name, 24), f"{shape} a sample"])
    return _truncate_boxes(boxes, "families")


def _encoders(summary: CheckpointSummary) -> Boxes:
    boxes = []
    for family in summary.tokenizer.families:
        weights = _parameter_count(family.encoder)
        tail = f", {weights} weights" if weights != "0" else ""
        boxes.append([family.encoder_name, f"{family.encoder.output_dim:,} columns{tail}"])
    return _truncate_boxes(boxes, "encoders")


def _cleaning(summary: CheckpointSummary) -> list[str]:
    keep = summary.tokenizer.cleaner.keep
    return [f"{keep.size:,} → {keep.sum():,} columns", "constant and", "duplicate dropped,", "outliers clipped"]


def _categories(summary: CheckpointSummary) -> list[str]:
    model, sizes = summary.model, [len(members) for members in summary.groups]
    config = model.config
    many = f"{len(sizes)} categories" if len(sizes) > 1 else "1 category"
    return [
        many,
        f"of {range_text(sizes)} features",
        f"each n → {config.group_hidden_dim} → {config.group_embedding_dim}",
        f"{_parameter_count(model.category_mlp)} weights",
    ]


def _levels(summary: CheckpointSummary) -> Boxes:
    boxes = [[f"{len(summary.codebooks)} projections", f"{_parameter_count(summary.model.heads)} weights"]]
    for level in range(summary.levels):
        codebooks = [codebook for codebook in summary.codebooks if codebook.level == level]
        codes, dims = (
            sum(codebook.codes for codebook in codebooks),
            range_text([codebook.dim for codebook in codebooks]),
        )
        boxes.append([f"L{level}: {codes:,} codes", f"in {dims} dimensions"])
    return _truncate_boxes(boxes, "levels")


def _decoders(summary: CheckpointSummary) -> Boxes:
    model = summary.model
    total, features = sum(codebook.dim for codebook in summary.codebooks), model.config.input_dim
    hidden, alone = model.shared_decoder[0].out_features, model.code_decoders.w1.shape[-1]
    return [
        [
            "one from all codes",
            f"{total:,} → {hidden} → {features:,}",
            f"{_parameter_count(model.shared_decoder)} weights",
        ],
        [
            f"{len(summary.codebooks)} from one codebook each",
            f"D → {alone} → {features:,}, for training",
            f"{_parameter_count(model.partial_decoders)} weights",
        ],
    ]


def _parameter_count(module: nn.Module) -> str:
    """Number of parameters in three digits, such as "2.16 M"."""
    count = sum(parameter.numel() for parameter in module.parameters())
    if count < 1000:
        return str(count)
    power = int(math.log10(count) // 3)
    return f"{count / 1000**power:.3g} {'kMG'[power - 1]}"
