from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from dashboards import synthetic_checkpoint

from spinlock_fast.plot_style import figure_style


@pytest.fixture(autouse=True)
def _house_style() -> Iterator[None]:
    """Applies the style during the test: ticks are chosen at each drawing."""
    with figure_style():
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with five categories of 4 to 30 features; data.h5 is in its parent directory."""
    return synthetic_checkpoint(
        tmp_path_factory.mktemp("five"), [12, 30, 8, 4, 20], epochs=6, conditions=True, stem="mean::feature"
    )
