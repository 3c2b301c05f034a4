"""Subprocesses of the benchmarks: Python commands with a log file, and a file of simulated operators."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_python(arguments: Sequence[str], log: Path, environment: Mapping[str, str] = os.environ) -> float:
    """Runs `python *arguments` from the repository root; returns its wall time in seconds.

    Args:
        arguments: of the interpreter.
        log: file for stdout and stderr.
        environment: environment variables.

    Raises:
        SystemExit: the process failed; the message has the end of the log.
    """
    started = time.perf_counter()
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=ROOT, stdout=file, stderr=file, check=False
        )
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed ({process.returncode}):\n{log.read_text()[-4000:]}")
    return seconds


def simulate_operators(directory: Path, operators: int) -> Path:
    """An HDF5 file of simulated operators in `directory`, generated unless it exists."""
    path = directory / f"operators_{operators}.h5"
    if not path.exists():
        options = ["--config", str(ROOT / "configs/data/quickstart.yaml"), "--operators", str(operators), "--quiet"]
        run_python(["-m", "spinlock_fast.generate", *options, "--output", str(path)], directory / "generate.log")
    return path
