"""Compiles every kernel for three generations of GPUs, in a process without the interpreter."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spinlock_fast.kernels import report
from spinlock_fast.kernels._compile_report.launch import CATEGORY_SIZES, LAYOUT
from spinlock_fast.quantize import resolve_levels

triton = pytest.importorskip("triton", reason="the package triton is not installed here")
# Triton 3.6 and 3.7 (the versions of torch 2.11 and 2.13 for CUDA) need more registers for the rotation gradient than
# later ones (72 to 256 bytes of stack on sm_90), and their cosine, in normal random numbers, has 32 bytes of stack for
# the range reduction of large arguments.
OLD_TRITON = triton.__version__.startswith(("3.6.", "3.7."))
KNOWN_SPILLS = {"residual_vq_fwd_kernel", "augment_fwd_kernel"} if OLD_TRITON else set()
MAX_STACK = 64 if OLD_TRITON else 0  # bytes; with Triton 3.7, ten other launches have 8 to 56
KERNELS = Path(report.__file__).parent
# Codes and distances need float32 precision; networks may use TF32, as the baseline does.
EXACT = ("vq_", "topo_", "ema_", "residual_")


@pytest.fixture(
    scope="module",
    params=[["--quick", "--capability", "90"], pytest.param([], marks=pytest.mark.slow)],
    ids=["quick", "all"],
)
def rows(request, tmp_path_factory):
    """The rows that the report writes. Triton finds unchanged kernels in its cache, whose keys hash their sources."""
    file = tmp_path_factory.mktemp("report") / "report.json"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    if cache := getattr(request.config, "cache", None):
        environment["TRITON_CACHE_DIR"] = str(cache.mkdir("triton"))
    done = subprocess.run(
        [sys.executable, "-m", "spinlock_fast.kernels.report", "--json", str(file), *request.param],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (1 if KNOWN_SPILLS else 0), done.stdout[-3000:] + done.stderr[-3000:]
    assert "least us, H100" in done.stdout
    return json.loads(file.read_text())


def test_no_kernel_spills(rows):
    assert {row["kernel"] for row in rows if row["stack"] > MAX_STACK or row["local"]} <= KNOWN_SPILLS
    assert {row["capability"] for row in rows} in ({90}, {80, 90, 100})
    assert all(0 < row["registers"] <= 255 for row in rows)


def test_every_kernel_is_compiled(rows):
    """A kernel is a function named `*_kernel`; other functions under `triton.jit` are inlined into kernels."""
    written = {
        node.name
        for file in KERNELS.rglob("*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    assert written == {row["kernel"] for row in rows}


def test_codes_and_distances_are_not_computed_in_plain_tf32(rows):
    exact = [row for row in rows if row["kernel"].startswith(EXACT) and row["dots"]]
    assert len(exact) >= 5
    for row in exact:
        assert set(row["precisions"]) <= {"tf32x3", "ieee"}, row["kernel"]
        # At least three instructions per product: high x high, high x low, low x high.
        assert row["matrix_instructions"] >= 3 * row["dots"], row["kernel"]


def test_bytes_and_operations_are_counted(rows):
    assert all(row["bytes"] > 0 and row["h100_least_us"] > 0 for row in rows)
    (search, *_) = [row for row in rows if row["kernel"] == "vq_search_fwd_kernel"]
    assert search["dot_ops"] == 2 * 65536 * 1024 * 256


def test_a_spill_exits_with_status_1(monkeypatch, capsys):
    row = {
        "kernel": "k", "shape": "s", "capability": 90, "num_warps": 4, "registers": 9, "shared": 0, "stack": 8,
        "local": 0, "matrix_instructions": 0, "bytes": 1, "float_ops": 0, "dot_ops": 0, "h100_least_us": 1.0,
    }  # fmt: skip
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(report, "rows", lambda capabilities, quick: [row])
    assert report.main([]) == 1
    row["stack"] = 0
    assert report.main([]) == 0
    assert "compiled ahead of time" in capsys.readouterr().out


def test_interpreter_mode_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        report.main([])
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_layout_is_that_of_the_100k_run():
    levels = resolve_levels({f"c{i}": n for i, n in enumerate(CATEGORY_SIZES)}, [], "0.5:1:1.5")
    codebooks = [codebook for level in levels.values() for codebook in level]
    assert LAYOUT.num_codes == tuple(codebook.num_tokens for codebook in codebooks)
    assert LAYOUT.dims == tuple(codebook.latent_dim for codebook in codebooks)
