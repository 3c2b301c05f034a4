"""Imports beside the reading of rows."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from spinlock_fast import ahead


def test_what_a_run_needs_later_is_there_when_it_has_read_its_rows() -> None:
    code = """
import sys, torch
from spinlock_fast.ahead import import_ahead
assert "scipy.cluster" not in sys.modules
import_ahead(torch.device("cpu"), False).join()
assert "scipy.cluster.hierarchy" in sys.modules
assert "torch.fx.experimental.symbolic_shapes" in sys.modules
assert "torch.utils.tensorboard" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_can_be_imported_where_it_is_used() -> None:
    pytest.importorskip("triton", reason="the package triton is not installed here")
    thread = ahead.import_ahead(torch.device("cuda"), True)
    thread.join()
    assert set(ahead._ALWAYS + ahead._ON_CUDA) <= set(sys.modules)


def test_what_is_missing_is_left_to_who_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_ALWAYS", ("no_such_module", "colorsys"))
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    ahead.import_ahead(torch.device("cpu"), False).join()
    assert "colorsys" in sys.modules
