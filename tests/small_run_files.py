"""Small files in place of those of a run, for tests and their subprocesses; does not import torch."""

from __future__ import annotations

from pathlib import Path

from spinlock_fast.checkpoints.integrity import write_manifest
from spinlock_fast.checkpoints.run_directory import BEST, CONFIG, FINAL, METRICS, TENSORBOARD, RunDirectory

NAMES = (BEST, FINAL, CONFIG, METRICS)


def fill(directory: Path, text: str, names: tuple[str, ...] = NAMES, board: bool = True) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        (directory / name).write_text(f"{text} {name}")
    if board:
        (directory / TENSORBOARD).mkdir(exist_ok=True)
        (directory / TENSORBOARD / f"events.{text}").write_text(text)
    write_manifest(directory)


def contents(directory: Path) -> dict[str, str]:
    """Relative path -> text of every non-hidden file."""
    return {
        str(path.relative_to(directory)): path.read_text()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    }


def publish(path: Path, text: str, resumed: bool = False) -> None:
    with RunDirectory(path) as place:
        fill(place.begin(resumed), text)
        place.publish()
