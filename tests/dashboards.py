"""Synthetic checkpoints with any number of categories, and checks of the readability of figures."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import yaml
from helpers import planted_matrix, write_arrays
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from spinlock_fast.commands.console import RunDisplay
from spinlock_fast.config.loading import load_config
from spinlock_fast.training.run import run

LONG = "radially_averaged_power_spectrum_of_the_final_state_in_band"
SHORT = ("summary", "temporal", "architecture")
LONG_FAMILIES = ("summary_statistics_of_trajectories", "temporal_structure_and_memory", "architecture_of_the_operator")


def synthetic_checkpoint(
    directory: Path,
    sizes: list[int],
    *,
    rows: int = 200,
    epochs: int = 3,
    long_names: bool = False,
    stem: str = "feature",
    category: str = "cluster",
    levels: Sequence[dict[str, int]] = (),
    nameless: Sequence[str] = (),
    conditions: bool = False,
    seed: int = 1,
) -> Path:
    """Trains a tokenizer on planted categories of the given sizes; data.h5 is in the parent directory.

    Args:
        nameless: families whose columns have no names.
        conditions: adds a label that follows the first feature, and two parameters of noise.
    """
    directory.mkdir(parents=True, exist_ok=True)
    matrix = planted_matrix(rows, sizes, seed=seed)
    families = LONG_FAMILIES if long_names else SHORT
    F = matrix.shape[1]
    edges = [0, max(F // 2, 1), max(F * 5 // 6, 2), F]
    stem = LONG if long_names else stem
    data = directory / "data.h5"
    parts = [slice(a, b) for a, b in pairwise(edges)]
    write_arrays(data, {f"features/{name}": matrix[:, part] for name, part in zip(families, parts, strict=True)})
    with h5py.File(data, "a") as file:
        for name, part in zip(families, parts, strict=True):
            if name not in nameless:
                file[f"features/{name}"].attrs["feature_names"] = [f"{stem}_{i}" for i in range(part.start, part.stop)]
        if conditions:
            rng = np.random.default_rng(seed)
            file["metadata/noise_regimes"] = np.where(matrix[:, 0] > 0, b"high", b"low")
            file["parameters/params"] = rng.standard_normal((rows, 2))
    ends = np.cumsum(sizes)
    category = "behaviour_that_long_words_describe" if long_names else category
    groups = {
        f"{category}_{c}": list(range(int(end - size), int(end)))
        for c, (end, size) in enumerate(zip(ends, sizes, strict=True), start=1)
    }
    (directory / "categories.json").write_text(json.dumps(groups))
    settings = {
        "dataset_path": str(data),
        "output_dir": str(directory / "checkpoint"),
        "device": "cpu",
        "families": {name: {"encoder": "IdentityEncoder", "dataset": f"features/{name}"} for name in families},
        "model": {"levels": list(levels)},
        "training": {
            "batch_size": 64,
            "topo_samples": 64,
            "num_epochs": epochs,
            "val_every_n_epochs": 1,
            "dead_code_reset_interval": 2,
            "dead_code_threshold": 0.5,
            "orthogonality_target": 10.0,
            "category_mapping_file": str(directory / "categories.json"),
        },
        "logging": {"tensorboard": False},
    }
    (directory / "run.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    config = load_config(directory / "run.yaml")
    with RunDisplay(True, config.logging) as display:
        return run(config, display).directory


def explorer_contents(page: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and columns of an explorer's page."""
    found = re.search(r'id="data">([^<]*)</script>', page)
    assert found
    data = gzip.decompress(base64.b64decode(found[1]))
    length = int.from_bytes(data[:4], "little")
    header = json.loads(data[4 : 4 + length])
    columns = {
        name: np.frombuffer(data, f"<{kind}", count, 4 + length + offset)
        for name, (kind, offset, count) in header["columns"].items()
    }
    return header, columns


def assert_readable(figure: Figure) -> None:
    """Asserts that text has at least 7 points, lies inside the figure without overlap, and that no panel is empty."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    texts = drawn_texts(figure)
    problems = _panel_problems(figure, texts) + _text_problems(figure, texts)
    assert not problems, f"{len(problems)} problems: " + "; ".join(problems[:6])


def drawn_texts(figure: Figure) -> list[tuple[Text, Bbox]]:
    """Every visible text and its position."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer = canvas.get_renderer()
    unseen: set[int] = set()
    for ax in figure.findobj(Axes):
        for axis, limits in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            low, high = sorted(axis.get_transform().transform(np.array(limits)))
            slack = 1e-6 * (high - low)
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                place = axis.get_transform().transform(np.array([tick.get_loc()]))[0]
                if not ax.axison or not axis.get_visible() or not low - slack <= place <= high + slack:
                    unseen |= {id(tick.label1), id(tick.label2)}
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and id(t) not in unseen]
    return [(text, text.get_window_extent(renderer)) for text in texts]


def _text_problems(figure: Figure, texts: list[tuple[Text, Bbox]]) -> list[str]:
    found = [f"below 7 points: {text.get_text()!r}" for text, _ in texts if text.get_fontsize() < 7.0]
    page, boxes = figure.bbox.padded(0.5), [box for _, box in texts]
    for text, box in texts:
        if not (page.x0 <= box.x0 and page.y0 <= box.y0 and box.x1 <= page.x1 and box.y1 <= page.y1):
            found.append(f"clipped: {text.get_text()!r} at {box.extents.round()} of {page.extents}")
    for i, j in np.argwhere(np.triu(_overlaps(boxes, boxes), 1)):
        found.append(f"overlap: {texts[i][0].get_text()!r} and {texts[j][0].get_text()!r}")
    for text, box, patch in ((t, b, p) for t, b in texts for p in _boxes_of(t)):
        if not (patch.x0 <= box.x0 and patch.y0 <= box.y0 and box.x1 <= patch.x1 and box.y1 <= patch.y1):
            found.append(f"outside of its box: {text.get_text()!r}")
    return found


def _boxes_of(text: Text) -> list[Bbox]:
    """The boxes of a schematic that contain the centre of a text."""
    if text.axes is None:
        return []
    box = text.get_window_extent()
    patches = [p.get_window_extent() for p in text.axes.patches if isinstance(p, FancyBboxPatch)]
    middle = ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
    return [patch for patch in patches if patch.contains(*middle)]


def _panel_problems(figure: Figure, texts: list[tuple[Text, Bbox]]) -> list[str]:
    """Empty panels, and texts that overlap another panel."""
    found = []
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer = canvas.get_renderer()
    panels = [ax for ax in figure.axes if ax.axison]
    for ax in figure.axes:
        if not (ax.images or ax.lines or ax.patches or ax.collections or ax.texts or ax.artists):
            found.append(f"empty panel {ax.get_title(loc='left')!r}")
    for ax in panels:
        own = {id(text) for text in ax.findobj(Text)}
        others = [(text, box) for text, box in texts if id(text) not in own]
        for i in np.flatnonzero(_overlaps([ax.get_window_extent(renderer)], [box for _, box in others])):
            found.append(f"{others[i][0].get_text()!r} lies on the panel {ax.get_title(loc='left')!r}")
    return found


def _overlaps(first: list[Bbox], second: list[Bbox]) -> NDArray[np.bool_]:
    """[n, m] whether boxes overlap by more than half a pixel."""
    a, b = (np.array([box.extents for box in boxes]).reshape(-1, 4) for boxes in (first, second))  # x0, y0, x1, y1
    shared = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    return np.asarray((shared > 0.5).all(2))
