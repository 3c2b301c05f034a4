"""The model as a row of boxes, with the sizes that it really has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from torch import nn

from spinlock_fast.features.encode import ANY_LENGTH
from spinlock_fast.report.contents import Contents
from spinlock_fast.report.style import FAINT, INK, SMALL, TEXT, WIDTH, bare, shorten, spread

# Inches.
_SPAN = WIDTH - 0.2
_LINE, _INSIDE, _GAP = 0.135, 0.12, 0.07
_TITLES = 0.27
_MOST = 4  # boxes on top of each other
_ROUND = 0.05

# Left edge and width of each column of boxes, in inches.
_COLUMNS = ((0.0, 1.6), (1.85, 1.7), (3.8, 1.5), (5.55, 1.75), (7.55, 1.6), (9.4, 2.05))
_FILLS = ("#eeeeee", "#eeeeee", "#eeeeee", "#dcebf5", "#fbe9c6", "#dcebf5")


Boxes = list[list[str]]  # the lines of each


def stages(contents: Contents) -> list[Boxes]:
    """The texts of the boxes, column after column."""
    return [
        _data(contents),
        _encoders(contents),
        [_cleaning(contents)],
        [_categories(contents)],
        _levels(contents),
        _decoders(contents),
    ]


def schematic_height(columns: Sequence[Boxes]) -> float:
    """Inches that the boxes and their titles take."""
    return max(map(_column_height, columns)) + _TITLES


def _column_height(boxes: Boxes) -> float:
    return sum(_LINE * len(lines) + _INSIDE for lines in boxes) + _GAP * (len(boxes) - 1)


def draw_schematic(ax: Axes, columns: Sequence[Boxes]) -> None:
    """Data, encoders, cleaning, categories, codebooks, decoders."""
    height = schematic_height(columns)
    centre = (height - _TITLES) / 2
    bare(ax)
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
    """Boxes on top of each other."""
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


def _at_most(boxes: Boxes, what: str) -> Boxes:
    return boxes if len(boxes) <= _MOST else [*boxes[: _MOST - 1], [f"and {len(boxes) - _MOST + 1} more {what}"]]


def _data(contents: Contents) -> Boxes:
    boxes = []
    for family in contents.tokenizer.families:
        shape = " x ".join("any" if n == ANY_LENGTH else f"{n:,}" for n in family.row_shape)
        boxes.append([shorten(family.name, 24), f"{shape} a sample"])
    return _at_most(boxes, "families")


def _encoders(contents: Contents) -> Boxes:
    boxes = []
    for family in contents.tokenizer.families:
        weights = _size(family.encoder)
        tail = f", {weights} weights" if weights != "0" else ""
        boxes.append([family.encoder_name, f"{family.encoder.output_dim:,} columns{tail}"])
    return _at_most(boxes, "encoders")


def _cleaning(contents: Contents) -> list[str]:
    keep = contents.tokenizer.cleaner.keep
    return [f"{keep.size:,} → {keep.sum():,} columns", "without constant", "and doubled ones;", "outliers clipped"]


def _categories(contents: Contents) -> list[str]:
    model, sizes = contents.model, [len(members) for members in contents.groups]
    config = model.config
    many = f"{len(sizes)} categories" if len(sizes) > 1 else "1 category"
    return [
        many,
        f"of {spread(sizes)} features",
        f"each n → {config.group_hidden_dim} → {config.group_embedding_dim}",
        f"{_size(model.category_mlp)} weights",
    ]


def _levels(contents: Contents) -> Boxes:
    boxes = [[f"{len(contents.codebooks)} projections", f"{_size(contents.model.heads)} weights"]]
    for level in range(contents.levels):
        books = [book for book in contents.codebooks if book.level == level]
        codes, dims = sum(book.codes for book in books), spread([book.dim for book in books])
        boxes.append([f"L{level}: {codes:,} codes", f"in {dims} dimensions"])
    return _at_most(boxes, "levels")


def _decoders(contents: Contents) -> Boxes:
    model = contents.model
    total, features = sum(book.dim for book in contents.codebooks), model.config.input_dim
    hidden, alone = model.shared_decoder[0].out_features, model.code_decoders.w1.shape[-1]
    return [
        ["one from all codes", f"{total:,} → {hidden} → {features:,}", f"{_size(model.shared_decoder)} weights"],
        [
            f"{len(contents.codebooks)} from one codebook each",
            f"D → {alone} → {features:,}, for training",
            f"{_size(model.partial_decoders)} weights",
        ],
    ]


def _size(module: nn.Module) -> str:
    """Number of weights in three digits: 2.16 M."""
    count = sum(parameter.numel() for parameter in module.parameters())
    if count < 1000:
        return str(count)
    power = int(math.log10(count) // 3)
    return f"{count / 1000**power:.3g} {'kMG'[power - 1]}"
