from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib.style
import pytest
from dashboards import synthetic_checkpoint

from spinlock_fast.report.style import RC


@pytest.fixture(autouse=True)
def _house_style() -> Iterator[None]:
    """Ticks are chosen anew at each drawing, by the settings of then."""
    with matplotlib.style.context(["default", RC]):
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five categories of 4 to 30 features; its data lie beside it."""
    return synthetic_checkpoint(tmp_path_factory.mktemp("five"), [12, 30, 8, 4, 20], epochs=6)
