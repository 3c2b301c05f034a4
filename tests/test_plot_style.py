"""The palette, labels of lines, and files of figures."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("matplotlib", reason="figures need the extra report")
from dashboards import assert_readable
from matplotlib.colors import to_rgb

from spinlock_fast.plot_style import PALETTE, figure_style, label_line_ends, new_figure, save_figure
from spinlock_fast.report.engineering_figure import marker_style, range_of_shares
from spinlock_fast.report.style import shorten

# Machado, Oliveira and Fernandes (2009), severity 1: matrices on linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def cielab(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = (to_xyz @ np.clip(linear, 0, 1)) / (0.9505, 1.0, 1.089)
    f = [np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z)]
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
def test_colours_differ_with_every_colour_vision(vision: str) -> None:
    rgb = np.array([to_rgb(colour) for colour in PALETTE])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = [cielab(np.array(VISION[vision]) @ colour) for colour in linear]
    assert len(PALETTE) == 8
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) >= 27.0
    luminance = linear @ (0.2126, 0.7152, 0.0722)
    assert (1.05 / (luminance + 0.05)).min() > 1.7  # on white
    assert luminance.min() > 0.02  # none is taken for black


def test_labels_of_lines_do_not_overlap_and_files_are_reproducible(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        with figure_style():
            figure = new_figure(5.0, 3.0)
            ax = figure.subplots()
            for i in range(6):
                ax.plot([1.0, 2.0], [1.0, 2.0 + 0.001 * i], label=f"method {i}")
            ax.plot([1.0, 2.0], [0.0, 0.0], label="_hidden")
            label_line_ends(ax)
            assert_readable(figure)
            save_figure(figure, tmp_path / f"{name}.svg")
        places = [text.get_window_extent().y0 for text in ax.texts]
        assert [text.get_text() for text in ax.texts] == [f"method {i}" for i in range(6)]
        assert places == sorted(places)
        files.append((tmp_path / f"{name}.svg").read_bytes())
    assert files[0] == files[1]


def test_axes_use_their_range_and_one_point_is_visible() -> None:
    assert range_of_shares([0.71, 0.88]) == pytest.approx((0.65, 0.9))
    assert range_of_shares([0.5]) == pytest.approx((0.45, 0.65))
    assert range_of_shares([0.0, 1.0]) == (0.0, 1.0)
    assert range_of_shares([0.99, 1.0]) == pytest.approx((0.8, 1.0))
    assert marker_style(1)["markersize"] >= 6
    assert marker_style(3)["marker"] == "o"
    assert marker_style(200)["marker"] == ""


def test_names_are_shortened_between_words() -> None:
    name = "radially_averaged_power_spectrum_of_the_final_state_in_band_12"
    words = set(name.split("_"))
    for most in range(12, len(name) + 1):
        short = shorten(name, most)
        assert len(short) <= most
        assert set(short.replace("…", "_").split("_")) <= words
    assert shorten("x" * 50, 11) == "xxxxx…xxxxx"
