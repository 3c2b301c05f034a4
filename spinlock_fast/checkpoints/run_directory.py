"""The output directory of a run: it is built beside an earlier result, and takes its place when it is whole.

    DIR/                 the finished result
    DIR/.partial/        the run that is being made: configuration, resumable states, then its results
    DIR/.new/            `.partial` under this name is whole; its files move to DIR, those that were there to `previous`
    DIR/previous/DATE/   what stood there before, until somebody deletes it

The rename of `.partial` to `.new` decides: before it the earlier result counts, after it the new one does, and the next
run completes a move that a kill has broken off. Until then `find` tells where a file of the result is.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from spinlock_fast.checkpoints.integrity import MANIFEST, STATES, expected_sha256, file_sha256, read_manifest
from spinlock_fast.errors import DataError, OutputError
from spinlock_fast.output.atomic_files import sync_directory, write_json
from spinlock_fast.output.locks import locked

BEST = "best_model.pt"
FINAL = "final_model.pt"
SAFETENSORS = "model.safetensors"
CONFIG = "config.yaml"
NORMALIZATION = "normalization_stats.npz"
HISTORY = "training_history.json"
METRICS = "metrics.json"
CARD = "README.md"
TENSORBOARD = "tensorboard"

FILES = (BEST, FINAL, *STATES, SAFETENSORS, CONFIG, NORMALIZATION, HISTORY, METRICS, CARD, MANIFEST, TENSORBOARD)

PARTIAL = ".partial"
NEW = ".new"
PREVIOUS = "previous"
_MOVES = "moves.json"  # within `.new`: what goes where

log = logging.getLogger(__name__)


def find(directory: Path, name: str) -> Path:
    """Where a file of the result in a directory is, be it that a kill has broken off its publication."""
    new = directory / NEW / name
    return new if os.path.exists(directory / NEW / _MOVES) and os.path.exists(new) else directory / name


def check_integrity(directory: Path, name: str) -> None:
    """Compares a file of a checkpoint directory with the manifest, if it has one.

    Raises:
        DataError: the file is damaged or was replaced, or the manifest cannot be read.
    """
    while True:
        manifest_path = find(directory, MANIFEST)
        manifest = read_manifest(manifest_path)
        expected = expected_sha256(manifest, name)
        path = find(directory, name)
        if expected is None or file_sha256(path) == expected:
            return
        if read_manifest(find(directory, MANIFEST)) == manifest:
            raise DataError(
                f"{path}: is damaged: its SHA-256 is not that of {manifest_path.name} "
                "(delete that file to use a model that was replaced on purpose)"
            )
        # A run has put its result in the place of this one meanwhile.


class RunDirectory:
    """The output directory, under its lock; a context manager.

    Args:
        path: made where it is not there, and removed again where nothing came of it.

    Raises:
        OutputError: another process writes there, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path / PARTIAL
        self._made: list[Path] = []
        self._lock = ExitStack()
        self._resumed = False

    def __enter__(self) -> RunDirectory:
        try:
            self._made = [path for path in (self.path, *self.path.parents) if not path.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(locked(self.path))
            for name in (PARTIAL, NEW, PREVIOUS):
                _check_place(self.path, self.path / name)
            self._finish_moves()
        except BaseException as error:
            self._leave()
            if isinstance(error, (OSError, ValueError)):
                reason = getattr(error, "strerror", None) or error
                raise OutputError(f"{self.path}: cannot be written: {reason}") from None
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A run that ended before its first state leaves nothing that anybody could use.
        if self.partial.is_dir() and not unfinished(self.path):
            shutil.rmtree(self.partial, ignore_errors=True)
        self._leave()

    def _leave(self) -> None:
        self._lock.close()
        for path in self._made:
            with suppress(OSError, ValueError):
                path.rmdir()

    def begin(self, resumed: bool) -> Path:
        """The directory to build the run in.

        Args:
            resumed: go on with what is there; otherwise an unfinished run is moved to `previous`.

        Raises:
            OutputError: it cannot be made.
        """
        self._resumed = resumed
        try:
            if not resumed and self.partial.is_dir():
                self._set_unfinished_aside()
            self.partial.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.partial}: cannot be written: {error.strerror}") from None
        return self.partial

    def publish(self) -> None:
        """Puts the whole run that `.partial` holds in the place of what is there; raises OutputError."""
        try:
            self._remove_hidden()
            published = sorted(path.name for path in self.partial.iterdir() if path.name not in (*STATES, _MOVES))
            aside, removed = self._leaving()
            previous = self._date_of(self.path / aside[0]) if aside else ""
            moves = {"published": published, "previous": previous, "set_aside": aside, "removed": removed}
            write_json(self.partial / _MOVES, moves)
            sync_directory(self.partial)
            os.rename(self.partial, self.path / NEW)
            sync_directory(self.path)
            self._finish_moves()
        except OSError as error:
            raise OutputError(f"{self.path}: the result cannot be moved there: {error.strerror}") from None
        if aside:
            log.warning("%s held an earlier result: moved to %s", self.path, self.path / PREVIOUS / previous)

    def _leaving(self) -> tuple[list[str], list[str]]:
        """Names that go to `previous`, and names of states that this run has gone on with."""
        there = [name for name in FILES if os.path.lexists(self.path / name)]
        consumed = [name for name in there if name in STATES and self._resumed]
        if any(name in (BEST, FINAL, *STATES) and name not in consumed for name in there):
            return [name for name in there if name not in consumed], consumed
        # Without a model, files are left-overs; but no file can replace a directory.
        return [name for name in there if (self.path / name).is_dir()], consumed

    def _finish_moves(self) -> None:
        """Completes a publication from whatever point it has reached."""
        new = self.path / NEW
        if not new.is_dir():
            return
        try:
            moves = json.loads((new / _MOVES).read_bytes())
        except FileNotFoundError:
            # Everything has moved: the list of moves goes last.
            new.rmdir()
            return
        except ValueError:
            raise OutputError(f"{new / _MOVES}: is damaged; move the files of {new} to {self.path} by hand") from None
        aside = self.path / PREVIOUS / moves["previous"]
        if moves["set_aside"]:
            aside.mkdir(parents=True, exist_ok=True)
        for name in moves["set_aside"]:
            _keep(self.path / name, aside / name, stays=name in moves["published"])
        for name in moves["removed"]:
            (self.path / name).unlink(missing_ok=True)
        if moves["set_aside"]:
            sync_directory(aside)
        for name in moves["published"]:
            if (new / name).exists():
                os.replace(new / name, self.path / name)
        for name in STATES:
            (new / name).unlink(missing_ok=True)
        sync_directory(self.path)
        (new / _MOVES).unlink()
        new.rmdir()
        sync_directory(self.path)

    def _remove_hidden(self) -> None:
        """Removes what a writer that was killed has left unfinished."""
        for path in self.partial.glob(".*"):
            path.unlink()

    def _set_unfinished_aside(self) -> None:
        state = next((self.partial / name for name in (*STATES, FINAL) if (self.partial / name).exists()), None)
        if state is None:  # killed before its first state
            shutil.rmtree(self.partial)
            return
        self._remove_hidden()
        aside = self.path / PREVIOUS / self._date_of(state)
        aside.parent.mkdir(exist_ok=True)
        os.rename(self.partial, aside)
        log.warning("%s held an unfinished run: moved to %s", self.path, aside)

    def _date_of(self, path: Path) -> str:
        """A name below `previous` that is free: when a file was written."""
        date = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(path.stat().st_mtime))
        name, count = date, 1
        while os.path.lexists(self.path / PREVIOUS / name):
            count += 1
            name = f"{date}-{count}"
        return name


def _keep(path: Path, aside: Path, stays: bool) -> None:
    """Moves a file to the earlier ones. One whose name is used again is linked: its place is never empty."""
    if os.path.lexists(aside) or not os.path.lexists(path):
        return
    if stays and path.is_file():
        try:
            os.link(path, aside, follow_symlinks=False)
        except OSError:  # a file system without links
            pass
        else:
            return
    os.rename(path, aside)


def _check_place(directory: Path, place: Path) -> None:
    """Raises OutputError where something else than a directory of the same file system has the name."""
    if not os.path.lexists(place):
        return
    if place.is_symlink() or not place.is_dir():
        raise OutputError(f"{place}: is not a directory of {directory}; move it away")
    if os.stat(place).st_dev != os.stat(directory).st_dev:
        raise OutputError(f"{place}: lies on another file system than {directory}; move it away")


def unfinished(directory: Path) -> bool:
    """Whether a directory holds a run that has begun and can be resumed; a final model is a state as well."""
    return any(os.path.exists(directory / PARTIAL / name) for name in (*STATES, FINAL))


def run_to_resume(directory: Path) -> Path:
    """The output directory that a user means, who may name `.partial` within it."""
    return directory.parent if directory.name == PARTIAL else directory


def config_to_resume(directory: Path) -> Path:
    """The settings of the run that --resume goes on with."""
    path = directory / PARTIAL / CONFIG
    return path if unfinished(directory) and path.exists() else find(directory, CONFIG)
